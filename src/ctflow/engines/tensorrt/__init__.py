"""TensorRT on NVIDIA GPUs: plans, the same with TensorRT-RTX, and Torch-TensorRT's programs, over one runtime."""
