"""The command srpo: one file a verb."""
