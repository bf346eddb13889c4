"""Train the embedded default: real emoji pictures in, a small FLUX, reward and judges out."""
