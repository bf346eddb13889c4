"""What a Ray job runs besides training: encode, evaluate, sample."""
