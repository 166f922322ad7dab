"""Files as all of the project writes them: whole, locked, and checked when they are read."""
