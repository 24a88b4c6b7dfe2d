"""Whether an engine's results match the model's: the one gate, for windows of a phantom and of a CT."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext

import torch
from torch import Tensor

from ctflow.core.errors import DeviceOutOfMemory, ParityFailed
from ctflow.core.model import Model
from ctflow.engines.contract import Engine
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.figures import ParityResult
from ctflow.networks.head import is_two_class
from ctflow.transforms.postprocess import channels_marked, class_given, combined_probabilities

# Smallest overlap of a segment's masks on a phantom, and on a CT. Engines with correct logits had 0.998 and more on
# whole CTs, where a model leaves more voxels undecided than on its phantoms, and 0.9944 on a small one
# (OpenVINO, 48 slices); a wrong plan had 0.9936, and is found by its logits, which were 0.12 off.
LOWEST_DICE, LOWEST_DICE_OF_CT = 0.999, 0.99
# e4m3 in the largest convolutions kept 0.9984 to 0.9987 (docs/exactness.md); it is taken by name only.
LOWEST_DICE_OF_FP8 = 0.998
# A mask of fewer voxels says little: one voxel of 500 is a Dice of 0.999.
FEWEST_VOXELS = 1000
# Largest difference of logits to fp32, relative to the largest logit, where masks are also compared.
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 1e-1, "fp16": 2e-2, "fp8": 1.5e-1}
# The same where they are not. About twice the difference seen for correct engines on a chest
# (docs/performance.md): fp32 2.9e-3 (OpenVINO 2026.4; ONNX Runtime 6e-5), tf32 8e-4, fp16 4.6e-3 (TensorRT 10.6),
# bf16 1.3e-2, fp8 7.2e-2 (SwinUNETR, feature_size 48, random weights on noise).
TOLERANCE_ALONE = {"fp32": 6e-3, "tf32": 2e-3, "bf16": 3e-2, "fp16": 1e-2, "fp8": 1.4e-1}


def is_reference(backend: str, precision: str) -> bool:
    """Whether an engine is the reference: PyTorch in strict fp32, one operation after another."""
    return (backend, precision) == ("eager", "fp32")


def reference_logits(model: Model, windows: Sequence[Tensor], device: str) -> list[Tensor]:
    """Logits of windows by PyTorch in strict fp32, one window at a time.

    Args:
        model: The model.
        windows: (1, C_in, D, H, W) float32 each.
        device: torch device; where its memory does not suffice, the CPU computes.

    Returns:
        (1, C_out, D, H, W) float32 each, in host memory.

    Raises:
        DeviceOutOfMemory: The host also has too little memory.
        BundleInvalid: The network does not take the windows.
    """
    roi = windows[0].shape[2:]
    try:
        request = EngineRequest("eager", device, "fp32", (roi[0], roi[1], roi[2]), (1, 1))
        with closing(open_engine(request, model)) as engine:
            return [_logits(engine, window) for window in windows]
    except DeviceOutOfMemory:
        if torch.device(device).type == "cpu":
            raise
    return reference_logits(model, windows, "cpu")


def check_parity(
    engine: Engine,
    model: Model,
    windows: Sequence[Tensor],
    *,
    expected: Sequence[Tensor] | None = None,
    batch: int | None = None,
    lowest_dice: float = LOWEST_DICE,
    logits_only: bool = False,
) -> ParityResult:
    """Compare an engine with the plain network in strict fp32.

    Each window is computed in full batches with others, and the first one also alone: TensorRT 8.5 built plans
    that are right for one window and wrong for eight (docs/performance.md).

    Args:
        engine: Open.
        model: The model that it was made from.
        windows: (1, C_in, D, H, W) float32 each; with structure, as on noise the masks say little.
        expected: Their logits by `reference_logits`; computed on the engine's device if not given.
        batch: Windows per batch; None takes the engine's largest.
        lowest_dice: Smallest overlap of each segment's masks.
        logits_only: Whether masks do not count: random weights have labels that any rounding changes. TensorRT 10.6 on
            an H200 had a Dice of 0.99788 on SwinUNETR of feature_size 48 with random weights, at a relative error of
            0.0046 (2026-11-29).

    Returns:
        The result of the comparison.

    Raises:
        ParityFailed: Logits or masks differ more than they may, or a logit is not finite.
        ValueError: There is no window.
    """
    if not windows:
        raise ValueError("parity needs at least one window")
    if expected is None:
        expected = reference_logits(model, windows, engine.info.device)
    masks = _Masks(model)
    largest = difference = 0.0
    for number, found in _found(engine, windows, batch or engine.info.batch_range[1]):
        wanted = expected[number]
        masks.add(wanted, found)
        if wanted.shape[1] != found.shape[1]:
            wanted = wanted[:, 1:2] - wanted[:, 0:1]
        largest = max(largest, float(wanted.abs().nan_to_num(torch.inf).max()))
        difference = max(difference, float((found - wanted).abs().nan_to_num(torch.inf).max()))
    error = difference / max(largest, torch.finfo(torch.float32).tiny)
    dice, telling = masks.dice()
    result = ParityResult(error, dice, len(windows), "labels" if telling and not logits_only else "logits")
    _judge(engine, result, lowest_dice)
    return result


def _judge(engine: Engine, result: ParityResult, lowest_dice: float) -> None:
    """Raise ParityFailed if a result exceeds the limits."""
    backend, precision = engine.info.backend, engine.info.precision
    alone = result.judged == "logits"
    limit = (TOLERANCE_ALONE if alone else TOLERANCE)[precision]
    lowest_dice = min(lowest_dice, LOWEST_DICE_OF_FP8) if precision == "fp8" else lowest_dice
    if result.relative_error <= limit and (alone or (result.dice or 0.0) >= lowest_dice):  # NaN also fails
        return
    masks = "masks do not count" if alone else f"Dice {result.dice:.5f} (at least {lowest_dice})"
    raise ParityFailed(
        f"{backend} {precision} differs from PyTorch in fp32 on {result.windows} windows: relative error "
        f"{result.relative_error:.1e} (at most {limit:.0e}), {masks}; use --engine eager --precision fp32",
        reason="differs",
    )


def _found(engine: Engine, windows: Sequence[Tensor], batch: int) -> Iterator[tuple[int, Tensor]]:
    """An engine's logits of each window in full batches, and of the first one alone, with the window's number."""
    count = len(windows)
    places = range(-(-count // batch) * batch)
    order = [place % count for place in places]
    if batch > 1:
        yield 0, _logits(engine, windows[0])
    if batch > count:  # windows repeat, at other positions than the first time, which exposes a mix-up
        order += [(place + place // count) % count for place in places]
    for first in range(0, len(order), batch):
        some = order[first : first + batch]
        together = _logits(engine, torch.cat([windows[number] for number in some]))
        yield from ((number, together[place : place + 1]) for place, number in enumerate(some))


def _logits(engine: Engine, windows: Tensor) -> Tensor:
    device = torch.device(engine.info.device)
    # Launches go to the current GPU's stream, which need not be this engine's.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return engine.predict(windows.to(device)).to("cpu", copy=True)


class _Masks:
    """The voxels that two sets of logits mark, counted over all windows together."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._overlap, self._sizes = torch.zeros(0), torch.zeros(0)

    def add(self, expected: Tensor, found: Tensor) -> None:
        both = [marked(logits[0], self._model).flatten(1) for logits in (expected, found)]
        if not len(self._sizes):
            self._overlap, self._sizes = torch.zeros(2, len(both[0]), dtype=torch.float64)
        self._overlap += (both[0] & both[1]).sum(1)
        self._sizes += both[0].sum(1) + both[1].sum(1)

    def dice(self) -> tuple[float | None, bool]:
        """The overlap of the masks (see `ParityResult.dice`), and whether they are large enough to decide."""
        if not self._sizes.sum():
            return None, False
        telling = self._sizes >= 2 * FEWEST_VOXELS
        if not telling.any():
            return float(2 * self._overlap.sum() / self._sizes.sum()), False
        return float((2 * self._overlap / self._sizes)[telling].min()), True


def marked(logits: Tensor, model: Model) -> Tensor:
    """(segments, D, H, W) bool: what each channel of (C, D, H, W) logits marks; nothing where they are not finite."""
    spec = model.spec
    if is_two_class(spec):
        return logits > 0 if len(logits) == 1 else logits[1:2] > logits[0:1]
    if spec.network.is_stacked:
        probabilities = combined_probabilities(logits, spec)
        if spec.threshold is not None:
            return channels_marked(probabilities, spec, spec.threshold)
        best = class_given(probabilities, spec)
        return torch.stack([best == channel for channel in range(1, len(logits) // spec.network.members)])
    if spec.threshold is None:
        best = logits.argmax(0)
        return torch.stack([best == channel for channel in range(1, len(logits))])
    if spec.activation == "softmax":
        logits = logits.softmax(0)
    elif spec.activation == "sigmoid":
        logits = logits.sigmoid()
    return logits >= spec.threshold
