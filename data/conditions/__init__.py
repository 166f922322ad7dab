"""Kinds of conditions: computed by functions or networks, their values, and how they are resized."""
