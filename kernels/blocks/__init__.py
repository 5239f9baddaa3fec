"""The product of float rows and weights in blocks, with its operator for ONNX Runtime."""
