"""Which precision each layer gets, from pictures shown to the model."""
