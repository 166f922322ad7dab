"""Where jobs run: the background of this machine, Slurm, Kubernetes. trainer/engine is another thing, DeepSpeed."""
