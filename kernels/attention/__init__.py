"""Attention of many sequences, each over a cache of its own, as an operator of ours."""
