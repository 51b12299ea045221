"""Three plugins that fail to load."""
