"""`make faults`: break a training in every way that a cluster does, and compare it with one that nothing disturbs."""
