"""Load prompts, captioned images and what was encoded of them, and batch them by step."""
