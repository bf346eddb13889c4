"""The programs beside training that a Ray job runs: encode, evaluate, sample."""
