"""The model being trained, and all that is needed to draw with it."""
