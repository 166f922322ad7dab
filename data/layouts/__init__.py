"""Layouts of data that other trainers read: what is in a folder of theirs, as rows that are packed."""
