"""Weights packed for one CPU."""
