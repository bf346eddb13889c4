"""Draw images of fixed prompts, measure them, guard a running training, and report with confidence intervals."""
