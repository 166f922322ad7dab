"""Blind comparisons by people: what is shown, what they answered, and what that says."""
