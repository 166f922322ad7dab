"""Which sample comes when, and every random draw about it, as arithmetic on positions."""
