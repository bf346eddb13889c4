"""Measure how fast the reward service is, against Flask and against the bare model: `make bench-reward`."""
