"""Ways of stepping that can be undone."""
