"""True sizes with random weights."""
