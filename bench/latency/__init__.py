"""Time and memory of one bundle."""
