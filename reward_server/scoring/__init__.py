"""Images and prompt pairs in, rewards and image gradients out."""
