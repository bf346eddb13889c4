"""`make bench-method`: methods side by side on the embedded default at equal CPU-seconds, without Ray."""
