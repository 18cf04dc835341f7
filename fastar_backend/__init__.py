"""FAST-AR attention and the stream engine behind the Triton model `fastar`."""
