"""The configuration of a run: one YAML file becomes one frozen tree. KEYS.md and EVALUATION_KEYS.md list every key."""
