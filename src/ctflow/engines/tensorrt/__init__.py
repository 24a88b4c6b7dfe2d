"""TensorRT on NVIDIA GPUs: plans, those of TensorRT-RTX, and Torch-TensorRT's programs, over one runtime.

Plans are built in `ctflow.export.tensorrt_plan`.
"""
