"""Rendered scenes with every kind of condition, and subjects that the built-in base has never seen."""
