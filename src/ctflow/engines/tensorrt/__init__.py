"""TensorRT on NVIDIA GPUs: plans, those of TensorRT-RTX, and Torch-TensorRT's programs, over one runtime; `export/tensorrt_plan` builds plans."""
