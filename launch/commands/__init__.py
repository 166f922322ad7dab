"""The verbs of the command line: a parser each, and what it starts.

What takes long to import is imported after the words are known to be right: so help comes at once.
"""
