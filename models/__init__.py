"""nn.Modules for one device, and their weights."""
