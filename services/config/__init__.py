"""The configuration of a run: one YAML file becomes one frozen tree. KEYS.md lists every key."""
