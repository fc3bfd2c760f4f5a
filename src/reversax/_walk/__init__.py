"""The way forward through a solve and the way back over it."""
