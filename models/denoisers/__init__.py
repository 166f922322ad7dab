"""How each family's network and its ControlNet are built and called."""
