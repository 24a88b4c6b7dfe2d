"""Without a GPU Triton's interpreter computes the kernels."""

from __future__ import annotations

import os

import torch

# Read by Triton where a kernel is defined, so before any test imports one.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
