"""Writing shards: from folders, tables and scenes, with conditions added afterwards."""
