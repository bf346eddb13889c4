"""Say before a run what it needs: memory, FLOPs, seconds, disk. Arithmetic on the checkpoint's configs, no torch."""
