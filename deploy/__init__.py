"""What surrounds training: templates for schedulers, retraining on a schedule, promotion of models."""
