"""From prompts to a loss: rollouts, the reward loss, and one learner for each training method."""
