"""From prompts to a loss: rollouts, Direct-Align, its baselines."""
