"""A checkpoint's configuration, tensors and their names."""
