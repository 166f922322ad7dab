"""Pictures as arrays: decoding, orientation, resizing, likeness."""
