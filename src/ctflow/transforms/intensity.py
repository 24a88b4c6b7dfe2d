"""Hounsfield units to the intensities that the network was trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctflow.core.model import Normalize, ScalePercentiles, ScaleRange


def scale(image: Tensor, step: ScaleRange) -> Tensor:
    """Scale to another range, as MONAI does."""
    width = step.a_max - step.a_min
    if width == 0:  # as MONAI does; a bundle's a_min and a_max differ, but percentiles of a flat image do not
        return image - step.a_min + (step.b_min or 0.0)
    image = (image - step.a_min) / width
    if step.b_min is not None and step.b_max is not None:
        image = image * (step.b_max - step.b_min) + step.b_min
    return image.clamp(step.b_min, step.b_max) if step.clip else image


def range_from_percentiles(image: Tensor, step: ScalePercentiles) -> ScaleRange:
    """The range between an image's percentiles."""
    lower, upper = np.percentile(image.cpu().numpy(), [step.lower, step.upper])
    b_min, b_max = step.b_min, step.b_max
    if step.relative and b_min is not None and b_max is not None:
        width = b_max - b_min
        b_min, b_max = width * step.lower / 100 + b_min, width * step.upper / 100 + b_min
    return ScaleRange(float(lower), float(upper), b_min, b_max, step.clip)


def normalize(image: Tensor, step: Normalize) -> Tensor:
    """Normalize to mean 0 and variance 1, as MONAI does."""
    chosen = image[image != 0] if step.nonzero else image
    if not chosen.numel():
        return image
    subtrahend = float(chosen.mean()) if step.subtrahend is None else step.subtrahend
    divisor = float(chosen.std(unbiased=False)) if step.divisor is None else step.divisor
    normalized = (image - subtrahend) / (divisor or 1.0)
    return torch.where(image != 0, normalized, image) if step.nonzero else normalized
