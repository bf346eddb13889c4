"""Images in, rewards and image gradients out."""
