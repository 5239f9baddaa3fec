"""Measuring: every figure beside its limit."""
