"""Hounsfield units to the intensities that the network was trained on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ctflow.core.steps import ClipPercentiles, Linear, Normalize, ScaleMinMax, ScalePercentiles, ScaleRange, Threshold


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


def scale_min_max(image: Tensor, step: ScaleMinMax) -> Tensor:
    """Map the image's own range to another, as MONAI does."""
    if step.low is None and step.high is None:
        return image if step.factor is None else image * (1 + step.factor)
    least, most = image.min(), image.max()
    if bool(least == most):
        return image if step.low is None else image * step.low
    image = (image - least) / (most - least)
    return image if step.low is None or step.high is None else image * (step.high - step.low) + step.low


def clip_percentiles(image: Tensor, step: ClipPercentiles) -> Tensor:
    """Clip to the image's percentiles, as MONAI does."""
    sides = [0.0 if step.lower is None else step.lower, 100.0 if step.upper is None else step.upper]
    lower, upper = np.percentile(image.cpu().numpy(), sides)
    if step.sharpness is None:
        return image.clamp(float(lower), float(upper))
    clipped, zero = image, image.new_zeros(())
    if step.lower is not None:
        clipped = clipped + torch.logaddexp(zero, step.sharpness * (float(lower) - image)) / step.sharpness
    if step.upper is not None:
        clipped = clipped - torch.logaddexp(zero, step.sharpness * (image - float(upper))) / step.sharpness
    return clipped


def threshold(image: Tensor, step: Threshold) -> Tensor:
    """Replace what is not above (or below) a value."""
    kept = image > step.threshold if step.above else image < step.threshold
    return torch.where(kept, image, step.value)


def linear(image: Tensor, step: Linear) -> Tensor:
    """Multiply and add."""
    return image * step.factor + step.offset
