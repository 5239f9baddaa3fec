"""The product of float rows and 4-bit weights in C++, with its operator for ONNX Runtime."""
