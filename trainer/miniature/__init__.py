"""The recipe of the built-in base."""
