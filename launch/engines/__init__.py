"""Where jobs run: the background of this machine, Slurm, Kubernetes."""
