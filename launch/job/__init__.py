"""A job's folder: what was submitted, to which cluster, and what its attempts came to."""
