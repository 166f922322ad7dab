"""Networks that read the rendered scenes: attributes and conditions."""
