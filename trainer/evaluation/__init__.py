"""Draw pictures, measure them, decide whether a run may go on."""
