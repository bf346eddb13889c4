"""How fast the reward service is, against what people run today and against the bare model: `make bench-reward`."""
