"""The command srpo: main.py puts the verbs together."""
