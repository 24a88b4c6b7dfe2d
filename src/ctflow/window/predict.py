"""Sliding-window prediction on any number of devices, equal to `monai.inferers.sliding_window_inference`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.errors import DeviceOutOfMemory, UnsupportedPixels
from ctflow.core.model import Blend, Overlap, Placement, WindowPadding
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Box, Size3
from ctflow.engines.cudagraph import free_cached_memory
from ctflow.window.blend import SIGMA_SCALE, importance_map, total_weight
from ctflow.window.constant import alike_windows
from ctflow.window.devices import Predict, Say, Worker, run_on_devices
from ctflow.window.grid import padding_for_window, shares_of_windows, window_axes, window_starts

_ZEROS = WindowPadding()
Halved = Callable[[torch.device, int, int], None]


def unheard(device: torch.device, tried: int, left: int) -> None:
    """An `on_halved` that does nothing."""


def every_window(start: Size3) -> bool:
    """An `is_wanted` that accepts all."""
    return True


def predict_volume(
    volume: Tensor,
    predict: Predict | Sequence[Worker],
    *,
    roi: Size3,
    overlap: Overlap = 0.25,
    blend: Blend = "gaussian",
    placement: Placement = "dense",
    sigma_scale: tuple[float, float, float] = SIGMA_SCALE,
    padding: WindowPadding = _ZEROS,
    batch_size: int = 4,
    is_wanted: Callable[[Size3], bool] = every_window,
    progress: Progress = silent,
    on_halved: Halved = unheard,
) -> Tensor:
    """Predict a volume window by window and blend the logits.

    Windows with a single value (mostly padding) are computed once per value and device: the same input has the same
    logits.

    Args:
        volume: (1, C_in, D, H, W) float32, on the first worker's device or in host memory; page-locked memory is
            uploaded faster.
        predict: (B, C_in, *roi) -> (B, C_out, *roi), on the volume's device, B at most `batch_size`; or several
            workers. Each gets a contiguous run of windows, and only the part of the volume that they touch.
        roi: Window size in voxels. A smaller volume is padded on both sides.
        overlap: Overlap of neighbouring windows, 0 <= overlap < 1, for all axes or each.
        blend: Weight of each voxel of a window.
        placement: Where windows are (see `ctflow.window.grid`).
        sigma_scale: Width of the gaussian blend, as a fraction of the window along each axis.
        padding: With what a smaller volume is padded.
        batch_size: Windows per call of `predict`.
        is_wanted: Whether to compute the window that begins at this voxel of the volume (before the first voxel if the
            volume was padded); called once per window, in order. A voxel whose windows are all wanted has the same
            logits as without this; a voxel in no wanted window has 0.
        progress: Called after each batch, in windows, as stage "segment"; only in the calling thread.
        on_halved: Called, in the calling thread, if a device had too little memory for `tried` windows at once and
            continues with `left`.

    Returns:
        (1, C_out, D, H, W) float32 logits on the first worker's device.

    Raises:
        ValueError: An argument is out of range, no window is wanted, or `predict` returns another window size.
        DeviceOutOfMemory: A device has too little memory for one window, or for as many as its worker always computes.

    Source: equal to `monai.inferers.sliding_window_inference` (MONAI 1.6.1) within float tolerance, on any number of
    devices.
    """
    workers = (Worker(predict, volume.device),) if callable(predict) else tuple(predict)
    _check(volume, workers, roi, overlap, batch_size)
    size: Size3 = tuple(volume.shape[2:])  # type: ignore[assignment]  # three by the check above
    missing = padding_for_window(size, roi)
    padded = _padded(volume, missing, padding)
    padded_size: Size3 = tuple(padded.shape[2:])  # type: ignore[assignment]
    weight = importance_map(roi, blend, workers[0].device, sigma_scale)
    (d, _), (h, _), (w, _) = missing
    every = window_starts(padded_size, roi, overlap, placement)
    starts = [start for start in every if is_wanted((start[0] - d, start[1] - h, start[2] - w))]
    if not starts:
        raise ValueError("no window is wanted")
    shares = _shares(workers, starts, padded_size, roi)
    logits = _sum_of_windows(padded, weight, shares, batch_size, progress, on_halved)
    logits.div_(total_weight(weight, window_axes(padded_size, roi, overlap, placement), padded_size))
    return logits[:, :, d : d + size[0], h : h + size[1], w : w + size[2]]


def _padded(volume: Tensor, missing: Sequence[tuple[int, int]], padding: WindowPadding) -> Tensor:
    flat = [n for pair in reversed(missing) for n in pair]  # F.pad starts with the last axis
    if not any(flat):
        return volume
    if padding.mode == "constant":
        return functional.pad(volume, flat, value=padding.value)
    if padding.mode != "replicate" and any(
        max(pair) > n - (padding.mode == "reflect") for pair, n in zip(missing, volume.shape[2:], strict=True)
    ):
        raise UnsupportedPixels(
            f"the volume is too small for the bundle's padding_mode {padding.mode!r} of its windows", reason="scaling"
        )
    return functional.pad(volume, flat, mode=padding.mode)


def _check(volume: Tensor, workers: Sequence[Worker], roi: Size3, overlap: Overlap, batch_size: int) -> None:
    if volume.ndim != 5 or volume.shape[0] != 1:
        raise ValueError(f"a volume is (1, C, D, H, W), not {tuple(volume.shape)}")
    if not workers or volume.device not in (workers[0].device, torch.device("cpu")):
        raise ValueError(f"a volume is in host memory or on the first worker's device, not on {volume.device}")
    if len(roi) != 3 or min(roi) < 1:
        raise ValueError(f"a window has three sizes of at least 1, not {roi}")
    if not all(0.0 <= share < 1.0 for share in (overlap if isinstance(overlap, tuple) else (overlap,))):
        raise ValueError(f"overlap is at least 0 and below 1, not {overlap}")
    if batch_size < 1:
        raise ValueError(f"batch_size is at least 1, not {batch_size}")


# ------------------------------------------------------------------------------------------------- several devices


@dataclass(frozen=True, eq=False)
class _Share:
    """A worker's part.

    Attributes:
        worker: The worker that computes it.
        box: The slab of the padded volume that its windows touch.
        places: Each window's position in the slab.
    """

    worker: Worker
    box: Box
    places: list[Box]


def _shares(workers: Sequence[Worker], starts: Sequence[Size3], size: Size3, roi: Size3) -> list[_Share]:
    """Divide the windows; the first worker's slab is the whole volume, to which the others are added."""
    shares: list[_Share] = []
    for worker, run in zip(workers, shares_of_windows(starts, len(workers)), strict=False):
        first, last = ((0, 0, 0), size) if not shares else _bounds(run, roi)
        box = (slice(first[0], last[0]), slice(first[1], last[1]), slice(first[2], last[2]))
        shares.append(_Share(worker, box, [_place(start, first, roi) for start in run]))
    return shares


def _place(start: Size3, corner: Size3, roi: Size3) -> Box:
    """A window in the slab that begins at `corner`."""
    d, h, w = (slice(n - low, n - low + length) for n, low, length in zip(start, corner, roi, strict=True))
    return d, h, w


def _bounds(starts: Sequence[Size3], roi: Size3) -> tuple[Size3, Size3]:
    d, h, w = zip(*starts, strict=True)
    return (min(d), min(h), min(w)), (max(d) + roi[0], max(h) + roi[1], max(w) + roi[2])


def _sum_of_windows(
    volume: Tensor,
    weight: Tensor,
    shares: Sequence[_Share],
    batch_size: int,
    progress: Progress,
    on_halved: Halved,
) -> Tensor:
    """(1, C_out, D, H, W) sum of all windows' weighted logits; the volume is at least as large as a window."""
    done, total = 0, sum(len(share.places) for share in shares)

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        progress("segment", done, total)

    def job(index: int, say: Say) -> Tensor:
        slab = _Slab(volume, weight, shares[index], batch_size)
        return _sum_of_share(slab, batch_size, say, advance, on_halved)

    advance(0)
    logits, *slabs = run_on_devices([share.worker.device for share in shares], job)
    for share, slab in zip(shares[1:], slabs, strict=True):
        for channel, added in enumerate(slab[0]):  # one at a time: the first device needs memory for one only
            logits[0, channel][share.box].add_(added.to(logits.device))
    return logits


# ------------------------------------------------------------------------------------------------------ one device


class _Slab:
    """The part of a volume that a share's windows touch, and the sum of logits, on the share's device.

    Args:
        volume: (1, C_in, D, H, W), padded.
        weight: Weight of each voxel of a window.
        share: The worker and its windows.
        batch_size: Most windows at once.

    Attributes:
        groups: The share's windows: those with the same single value in one group, every other in its own.
    """

    def __init__(self, volume: Tensor, weight: Tensor, share: _Share, batch_size: int) -> None:
        self.share = share
        device = share.worker.device
        self._part = _fetched(volume[0][(slice(None), *share.box)], share.places, device)
        self._weight = weight.to(device)
        self.groups = alike_windows(self._part, share.places)
        self._batch = self._part.new_empty((min(batch_size, len(self.groups)), len(self._part), *weight.shape))
        self._sum: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        """(1, C_out, D, H, W) float32 sum of the weighted logits so far."""
        if self._sum is None:
            raise ValueError("no window has been computed")
        return self._sum

    def add(self, groups: Sequence[Sequence[Box]]) -> bool:
        """Compute a window of some groups; False if the device lacks memory for it, but may have enough for fewer.

        Nothing here waits for a GPU, and only the first call allocates memory.
        """
        roi = self._weight.shape
        windows = self._batch[: len(groups)]
        for window, group in zip(windows, groups, strict=True):
            window.copy_(self._part[(slice(None), *group[0])])
        answer = self._answer(windows)
        if answer is None:
            return False
        if len(answer) != len(groups) or answer.shape[2:] != roi:
            raise ValueError(f"predict returned {tuple(answer.shape)} for {len(groups)} windows of {tuple(roi)}")
        if self._sum is None:
            shape = (1, answer.shape[1], *self._part.shape[1:])
            self._sum = torch.zeros(shape, device=self._part.device)
        for window, group in zip(answer, groups, strict=True):
            logits = window.to(torch.float32)
            for place in group:
                self._sum[0][(slice(None), *place)].addcmul_(logits, self._weight)
        return True

    def _answer(self, windows: Tensor) -> Tensor | None:
        try:
            return self.share.worker.predict(windows)
        except DeviceOutOfMemory:
            if len(windows) <= self.share.worker.fewest:
                raise
        if self._part.is_cuda:
            free_cached_memory()  # not above: the error's frames hold memory until the error is gone
        return None


def _fetched(part: Tensor, places: Sequence[Box], device: torch.device) -> Tensor:
    """A part of a volume on a device; if copied, only the slices that windows touch have values."""
    if part.device == device:
        return part
    touched = slice(min(place[0].start for place in places), max(place[0].stop for place in places))
    fetched = torch.empty(part.shape, dtype=part.dtype, device=device)
    # A CPU must wait for a GPU's bytes; a GPU's stream orders this itself.
    fetched[:, touched].copy_(part[:, touched], non_blocking=device.type == "cuda")
    return fetched


def _sum_of_share(slab: _Slab, batch_size: int, say: Say, advance: Callable[[int], None], on_halved: Halved) -> Tensor:
    """Compute all windows of a share, in smaller batches if memory does not suffice."""
    groups, device, done = slab.groups, slab.share.worker.device, 0
    with torch.no_grad():  # a thread does not inherit the caller's no_grad
        while done < len(groups):
            some = groups[done : done + batch_size]
            if slab.add(some):
                done += len(some)
                say(partial(advance, sum(map(len, some))))
            else:
                batch_size = max(len(some) // 2, slab.share.worker.fewest)
                say(partial(on_halved, device, len(some), batch_size))
    return slab.sum
