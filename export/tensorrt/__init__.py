"""TensorRT engines: building, targets, the gate without a GPU."""
