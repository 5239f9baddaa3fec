"""Kernels beside their peers."""
