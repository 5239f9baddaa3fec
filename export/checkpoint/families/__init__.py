"""Decoder families, one module each: docs/adding-a-model.md says how to write one."""
