"""The clients of the reward service, of Ray jobs and of MLflow."""
