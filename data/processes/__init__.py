"""Processes that end with their parent, and pools of them."""
