"""A run's folder: who holds it, its checkpoints, its failures, and whether it can go on."""
