"""Pages that show run folders in a browser, live: what `controlbooth watch` serves."""
