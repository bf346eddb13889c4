"""What processes say to each other, and what people call."""
