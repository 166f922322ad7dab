"""What MLflow is told, through a spool on disk, and at no cost to the step."""
