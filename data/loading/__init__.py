"""From shards to the batches of a step: decoding, captions, prefetching, held-out samples."""
