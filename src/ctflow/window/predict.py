"""Sliding-window prediction, equal to `monai.inferers.sliding_window_inference`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.model import Blend
from ctflow.progress import Progress, silent
from ctflow.volume import Size3
from ctflow.window.blend import importance_map
from ctflow.window.grid import padding_for_window, window_starts


def predict_volume(
    volume: Tensor,
    predict: Callable[[Tensor], Tensor],
    *,
    roi: Size3,
    overlap: float = 0.25,
    blend: Blend = "gaussian",
    batch_size: int = 4,
    progress: Progress = silent,
) -> Tensor:
    """Predict a volume window by window and blend the logits.

    Args:
        volume: (1, C_in, D, H, W) float32.
        predict: (B, C_in, *roi) -> (B, C_out, *roi), on the volume's device, B at most `batch_size`.
        roi: Window size in voxels. A smaller volume is padded with zeros on both sides.
        overlap: Overlap of neighbouring windows, 0 <= overlap < 1.
        blend: Weight of each voxel of a window.
        batch_size: Windows a call of `predict`.
        progress: Told of each batch, in windows, as stage "segment".

    Returns:
        (1, C_out, D, H, W) float32 logits on the volume's device.

    Raises:
        ValueError: An argument is out of range, or `predict` returns another window size.

    Source: equal to `monai.inferers.sliding_window_inference` (MONAI 1.6.1) within float tolerance.
    """
    _check(volume, roi, overlap, batch_size)
    size: Size3 = tuple(volume.shape[2:])  # type: ignore[assignment]  # checked to be three
    padding = padding_for_window(size, roi)
    flat = [n for pair in reversed(padding) for n in pair]  # F.pad begins at the last axis
    padded = functional.pad(volume, flat) if any(flat) else volume
    padded_size: Size3 = tuple(padded.shape[2:])  # type: ignore[assignment]
    starts = window_starts(padded_size, roi, overlap)
    logits = _blend_windows(padded, predict, starts, importance_map(roi, blend, volume.device), batch_size, progress)
    (d, _), (h, _), (w, _) = padding
    return logits[:, :, d : d + size[0], h : h + size[1], w : w + size[2]]


def _check(volume: Tensor, roi: Size3, overlap: float, batch_size: int) -> None:
    if volume.ndim != 5 or volume.shape[0] != 1:
        raise ValueError(f"a volume is (1, C, D, H, W), not {tuple(volume.shape)}")
    if len(roi) != 3 or min(roi) < 1:
        raise ValueError(f"a window has three sizes of at least 1, not {roi}")
    if not 0.0 <= overlap < 1.0:
        raise ValueError(f"overlap is at least 0 and below 1, not {overlap}")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")


def _blend_windows(
    volume: Tensor,
    predict: Callable[[Tensor], Tensor],
    starts: list[Size3],
    weight: Tensor,
    batch_size: int,
    progress: Progress,
) -> Tensor:
    """Weighted mean of all windows' logits; the volume is at least as large as a window."""
    roi: Size3 = tuple(weight.shape)  # type: ignore[assignment]  # a map has three axes
    total = torch.zeros(volume.shape[2:], device=volume.device)
    logits: Tensor | None = None
    batch = torch.empty((batch_size, volume.shape[1], *roi), dtype=volume.dtype, device=volume.device)
    progress("segment", 0, len(starts))
    for first in range(0, len(starts), batch_size):
        places = [_place(start, roi) for start in starts[first : first + batch_size]]
        for row, place in enumerate(places):
            batch[row] = volume[0][(slice(None), *place)]
        answer = predict(batch[: len(places)])
        if answer.shape[0] != len(places) or tuple(answer.shape[2:]) != roi:
            raise ValueError(f"predict returned {tuple(answer.shape)} for {len(places)} windows of {roi}")
        if logits is None:
            logits = torch.zeros((1, answer.shape[1], *volume.shape[2:]), device=volume.device)
        for window, place in zip(answer, places, strict=True):
            logits[0][(slice(None), *place)].addcmul_(window.to(logits.dtype), weight)
            total[place] += weight
        progress("segment", first + len(places), len(starts))
    if logits is None:
        raise ValueError("there is no window")
    return logits.div_(total)


def _place(start: Size3, roi: Size3) -> tuple[slice, slice, slice]:
    d, h, w = (slice(first, first + length) for first, length in zip(start, roi, strict=True))
    return d, h, w
