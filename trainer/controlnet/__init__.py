"""The first paper: training a ControlNet."""
