"""Prompts in, better weights out: the file list of this package is the algorithm."""
