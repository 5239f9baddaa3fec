"""Operators of ours for ONNX Runtime, in one library for every CPU of a kind."""
