"""What a vision tower computes between its integer products, the same bits on every CPU."""
