"""The verbs of the command line: a parser each, and what it starts."""
