"""Config in, weights out: the training step, the engine, checkpoints, tracking and measurements."""
