"""Tar shards: reading, indexing, manifests, object stores, the cache on disk, the latent cache."""
