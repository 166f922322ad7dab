"""Which sample comes next, and what it looks like: plain tar shards, an order that is arithmetic, exact resume."""
