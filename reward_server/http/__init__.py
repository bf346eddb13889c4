"""The HTTP side of the reward service: routes, limits, errors, access."""
