"""Scheduled retraining: when it is due, what is trained, whether it is better, and promotion."""
