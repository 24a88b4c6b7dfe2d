"""Whether an engine computes what the model computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.engines.contract import Engine
from ctflow.errors import ParityFailed
from ctflow.model import Model
from ctflow.networks.build import network_from_model
from ctflow.networks.head import is_two_class
from ctflow.phantom import phantom_from_seed
from ctflow.preprocess import prepare_volume
from ctflow.volume import Size3

_PHANTOM: Size3 = (120, 128, 128)  # a whole chest of 3 mm voxels: drawn in a second or two
LOWEST_DICE = 0.999
# Largest difference of logits to fp32 eager, relative to the largest logit, on windows of a CT. For a trained SwinUNETR
# the worst voxel of ONNX Runtime is off by 6e-5, that of OpenVINO 2026.4 by 2.5e-3.
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 1e-1, "fp16": 2e-2}


@dataclass(frozen=True)
class ParityResult:
    """How near an engine is to PyTorch in fp32.

    Attributes:
        relative_error: Largest difference of logits, also of a window's in a full batch to its own alone, relative to
            the largest logit.
        dice: Overlap of the masks of all windows together; the smallest of all segments.
        windows: How many windows were compared.
    """

    relative_error: float
    dice: float
    windows: int


def example_window(model: Model, roi: Size3) -> Tensor:
    """A window of a synthetic chest with its largest tumour in the middle, prepared as the model wants it.

    Returns:
        (1, C_in, *roi) float32 on the CPU.
    """
    phantom = phantom_from_seed(0, _PHANTOM, tumours=3)
    prepared = prepare_volume(phantom.volume, model.spec.preprocessing, "cpu")
    short = [max(0, n - have) for n, have in zip(roi, prepared.tensor.shape[2:], strict=True)]
    padded = functional.pad(prepared.tensor, [m for n in reversed(short) for m in (0, n)])
    largest = max(phantom.tumours, key=lambda tumour: tumour.diameter_mm)
    inverse = np.linalg.inv(phantom.volume.geometry.affine_mm)
    index = np.rint(inverse[:3, :3] @ largest.centre_mm + inverse[:3, 3]).astype(int)
    place = [slice(None), slice(None)]
    for axis, length in enumerate(roi):
        middle = int(prepared.back[axis][index[prepared.source_axes[axis]]].argmax())
        first = min(max(middle - length // 2, 0), padded.shape[2 + axis] - length)
        place.append(slice(first, first + length))
    return padded[tuple(place)].expand(-1, model.spec.in_channels, -1, -1, -1).contiguous()


def check_parity(
    engine: Engine,
    model: Model,
    windows: Iterable[Tensor],
    *,
    tolerance: float | None = None,
    lowest_dice: float = LOWEST_DICE,
) -> ParityResult:
    """Compare an engine with the plain network in fp32 on the CPU, and with itself in its largest batch.

    Args:
        engine: Open.
        model: The model that it was made from.
        windows: (1, C_in, D, H, W) float32 each; a CT's, as on noise the masks say little. The first is also computed
            as a full batch of its mirror images.
        tolerance: Largest relative error; None takes `TOLERANCE` of the engine's precision.
        lowest_dice: Smallest overlap of each segment's masks.

    Returns:
        What was found.

    Raises:
        ParityFailed: An error is larger, a mask differs more, or a logit is not finite.
        ValueError: There is no window.
    """
    network = network_from_model(model)
    limit = TOLERANCE[engine.info.precision] if tolerance is None else tolerance
    largest = difference = 0.0
    overlap, sizes, count = torch.zeros(0), torch.zeros(0), 0
    for window in windows:
        if not count:
            difference = _apart_in_a_batch(engine, window)
        with torch.inference_mode():
            expected = network(window)
        found = _logits(engine, window)
        both = [_marked(logits, model) for logits in (expected, found)]
        if not count:
            overlap, sizes = torch.zeros(len(both[0])), torch.zeros(len(both[0]))
        overlap += (both[0] & both[1]).sum(1)
        sizes += both[0].sum(1) + both[1].sum(1)
        if expected.shape[1] != found.shape[1]:
            expected = expected[:, 1:2] - expected[:, 0:1]
        largest = max(largest, float(expected.abs().max()))
        difference = max(difference, _largest_difference(found, expected))
        count += 1
    if not count:
        raise ValueError("parity needs at least one window")
    dice = float(torch.where(sizes > 0, 2 * overlap / sizes.clamp(min=1), torch.ones(())).min())
    result = ParityResult(difference / max(largest, torch.finfo(torch.float32).tiny), dice, count)
    if not (result.relative_error <= limit and result.dice >= lowest_dice):
        raise ParityFailed(
            f"{engine.info.backend} {engine.info.precision} differs from PyTorch: relative error "
            f"{result.relative_error:.1e} (at most {limit:.0e}), Dice {dice:.5f} (at least {lowest_dice}); "
            "use --engine eager"
        )
    return result


def _apart_in_a_batch(engine: Engine, window: Tensor) -> float:
    """Largest difference of logits between windows computed together and one by one.

    TensorRT 8.5 has built plans that are right for one window and wrong for eight (docs/performance.md).
    """
    count = engine.info.batch_range[1]
    if count == 1:
        return 0.0
    mirrored = [window.flip([axis + 2 for axis in range(3) if number >> axis & 1]) for number in range(8)]
    together = _logits(engine, torch.cat([mirrored[number % 8] for number in range(count)]))
    alone = [_logits(engine, one) for one in mirrored[:count]]
    return max(_largest_difference(together[n], alone[n % 8][0]) for n in range(count))


def _logits(engine: Engine, windows: Tensor) -> Tensor:
    return engine.predict(windows.to(engine.info.device)).to("cpu", copy=True)


def _largest_difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().nan_to_num(torch.inf).max())


def _marked(logits: Tensor, model: Model) -> Tensor:
    """(segments, voxels) bool: what each channel marks in (1, C, D, H, W) logits."""
    spec = model.spec
    flat = logits[0].flatten(1)
    if is_two_class(spec):
        return flat > 0 if len(flat) == 1 else flat[1:2] > flat[0:1]
    if spec.threshold is None:
        return torch.nn.functional.one_hot(flat.argmax(0), len(flat)).T[1:].bool()
    if spec.activation == "softmax":
        flat = flat.softmax(0)
    elif spec.activation == "sigmoid":
        flat = flat.sigmoid()
    return flat >= spec.threshold
