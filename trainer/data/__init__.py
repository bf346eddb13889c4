"""Prompts, captioned images and what is stored of them, as a step's batches."""
