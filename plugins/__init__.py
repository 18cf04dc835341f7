"""FAST-AR's attention stack for TensorRT: operators, their kernels, export, engines. See docs/tensorrt.md."""
