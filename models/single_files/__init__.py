"""Bases that came as one file, in the layouts of their authors."""
