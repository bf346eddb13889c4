"""One YAML file, one frozen tree."""
