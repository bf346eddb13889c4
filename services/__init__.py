"""What trainer, reward service and people share: messages, run files, clients and the command `srpo`."""
