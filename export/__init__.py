"""Checkpoint to bundle: graphs built directly, weights streamed layer by layer."""
