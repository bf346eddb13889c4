"""What a worker does beside training: steering, recording, checkpoints, failures."""
