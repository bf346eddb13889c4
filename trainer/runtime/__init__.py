"""The work of a training process around the steps: load, steer, record, save checkpoints, evaluate, handle failures."""
