"""Kernels of ours, beside their references; they know no framework."""
