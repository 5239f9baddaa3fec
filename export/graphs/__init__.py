"""Graphs built directly as ONNX."""
