"""Sliding-window prediction on any number of devices, equal to `monai.inferers.sliding_window_inference`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.model import Blend, Overlap, Placement, WindowPadding
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Box, Size3
from ctflow.window.blend import SIGMA_SCALE, importance_map, total_weight
from ctflow.window.constant import alike_windows
from ctflow.window.devices import Predict, Say, Worker, run_on_devices
from ctflow.window.grid import padding_for_window, shares_of_windows, window_axes
from ctflow.window.slab import AlikeWindows, Halved, RollingSlab, Slab, fetched

_ZEROS = WindowPadding()


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
        ValueError: An argument is out of range, no window is wanted, or `predict` returns another number of windows.
        BundleInvalid: It returns another window size: the network is no segmentation network.
        DeviceOutOfMemory: A device has too little memory for one window, or for as many as its worker always computes.

    Source: equal to `monai.inferers.sliding_window_inference` (MONAI 1.6.1) within float tolerance, on any number of
    devices.
    """
    plan = _planned(volume, predict, roi, overlap, blend, placement, sigma_scale, padding, batch_size, is_wanted)
    shares = _shares(plan.workers, plan.starts, plan.size, roi)
    logits = _sum_of_windows(plan.padded, plan.weight, shares, batch_size, progress, on_halved)
    logits.div_(plan.total_weight)
    return plan.inside(logits, slice(0, volume.shape[2]), axis=0)


def predict_blocks(
    volume: Tensor,
    predict: Predict | Sequence[Worker],
    *,
    axis: int,
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
) -> Iterator[tuple[slice, Tensor]]:
    """`predict_volume` for logits that are too many for memory: rows are returned once no later window touches them.

    The windows move along `axis` of the volume (0 to 2), and the sum of their logits has as many rows as a window. On
    one device, along axis 0, the logits have the same bits as those of `predict_volume`, provided that a window's
    logits do not depend on the batch that it is in; along another axis windows are added in another order. Batches end
    with a row of windows. All other arguments are those of `predict_volume`.

    Yields:
        Rows of that axis, in order and without gaps, and their (1, C_out, D, H, W) float32 logits on the first
        worker's device, which are valid until the next ones are asked for.

    Raises:
        ValueError: As `predict_volume`.
        DeviceOutOfMemory: As `predict_volume`.
    """
    plan = _planned(volume, predict, roi, overlap, blend, placement, sigma_scale, padding, batch_size, is_wanted)
    before, size = plan.missing[axis][0], volume.shape[2 + axis]
    for first, logits in _finished_rows(plan, axis, batch_size, progress, on_halved):
        low, high = max(first - before, 0), min(first - before + logits.shape[2 + axis], size)
        if low < high:
            yield slice(low, high), plan.inside(logits, slice(low - first, high - first), axis)


@dataclass(frozen=True, eq=False)
class _Plan:
    """The windows of a volume.

    Attributes:
        workers: Those that compute them.
        padded: The volume, at least as large as a window.
        missing: What was padded, before and after each axis.
        weight: Weight of each voxel of a window.
        axes: First voxel of the windows along each axis, wanted or not.
        starts: The windows that are wanted, in MONAI's order; at least one.
    """

    workers: tuple[Worker, ...]
    padded: Tensor
    missing: tuple[tuple[int, int], ...]
    weight: Tensor
    axes: tuple[list[int], list[int], list[int]]
    starts: list[Size3]

    @cached_property
    def total_weight(self) -> Tensor:
        """Sum of all windows' weights at each voxel of the padded volume."""
        return total_weight(self.weight, self.axes, self.size)

    @property
    def roi(self) -> Size3:
        d, h, w = self.weight.shape
        return d, h, w

    @property
    def size(self) -> Size3:
        d, h, w = self.padded.shape[2:]
        return d, h, w

    def inside(self, logits: Tensor, rows: slice, axis: int) -> Tensor:
        """Some rows of logits along an axis, counted from the volume's first, without what was padded."""
        for each, (before, after) in enumerate(self.missing):
            first, end = (rows.start, rows.stop) if each == axis else (0, self.size[each] - before - after)
            logits = logits.narrow(2 + each, before + first, end - first)
        return logits


def _planned(
    volume: Tensor,
    predict: Predict | Sequence[Worker],
    roi: Size3,
    overlap: Overlap,
    blend: Blend,
    placement: Placement,
    sigma_scale: tuple[float, float, float],
    padding: WindowPadding,
    batch_size: int,
    is_wanted: Callable[[Size3], bool],
) -> _Plan:
    workers = (Worker(predict, volume.device),) if callable(predict) else tuple(predict)
    _check(volume, workers, roi, overlap, batch_size)
    size: Size3 = tuple(volume.shape[2:])  # type: ignore[assignment]  # three by the check above
    missing = padding_for_window(size, roi)
    padded = _padded(volume, missing, padding)
    padded_size: Size3 = tuple(padded.shape[2:])  # type: ignore[assignment]
    weight = importance_map(roi, blend, workers[0].device, sigma_scale)
    (d, _), (h, _), (w, _) = missing
    axes = window_axes(padded_size, roi, overlap, placement)
    starts = [start for start in itertools.product(*axes) if is_wanted((start[0] - d, start[1] - h, start[2] - w))]
    if not starts:
        raise ValueError("no window is wanted")
    return _Plan(workers, padded, missing, weight, axes, starts)


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
        share = shares[index]
        touched = slice(min(place[0].start for place in share.places), max(place[0].stop for place in share.places))
        part = fetched(volume[0][(slice(None), *share.box)], touched, share.worker.device)
        slab = Slab(part, weight, share.worker, batch_size)
        return slab.compute(alike_windows(part, share.places), say, advance, on_halved)

    advance(0)
    logits, *slabs = run_on_devices([share.worker.device for share in shares], job)
    for share, slab in zip(shares[1:], slabs, strict=True):
        for channel, added in enumerate(slab[0]):  # one at a time: the first device needs memory for one only
            logits[0, channel][share.box].add_(added.to(logits.device))
    return logits


# --------------------------------------------------------------------------------------------------------- in blocks


def _finished_rows(
    plan: _Plan, axis: int, batch_size: int, progress: Progress, on_halved: Halved
) -> Iterator[tuple[int, Tensor]]:
    """The first row, in the padded volume, and the blended (1, C_out, D, H, W) logits of one block after another."""
    places = [_place(start, (0, 0, 0), plan.roi) for start in sorted(plan.starts, key=lambda start: start[axis])]
    everything = slice(0, plan.size[0])
    slabs = [
        RollingSlab(fetched(plan.padded[0], everything, each.device), plan.weight, each, batch_size, axis)
        for each in plan.workers
    ]
    done, total, end = 0, len(places), 0

    def advance(windows: int) -> None:
        nonlocal done
        done += windows
        progress("segment", done, total)

    advance(0)
    groups = alike_windows(slabs[0].part, places)
    layers = itertools.groupby(groups, key=lambda group: group[0][axis].start)
    firsts = sorted({place[axis].start for place in places})
    todo = {first: list(layer) for first, layer in layers}
    for first, following in itertools.zip_longest(firsts, firsts[1:], fillvalue=plan.size[axis]):
        for slab in slabs:
            slab.move(first)
        _compute_layer(slabs, todo.get(first, []), advance, on_halved)
        if end < first:
            yield end, _zeros(slabs[0].sum, axis, first - end)
        end = min(following, first + plan.roi[axis])
        yield first, _blended(slabs, plan, axis, slice(first, end))
    if end < plan.size[axis]:
        yield end, _zeros(slabs[0].sum, axis, plan.size[axis] - end)


def _compute_layer(
    slabs: Sequence[RollingSlab], groups: Sequence[AlikeWindows], advance: Callable[[int], None], on_halved: Halved
) -> None:
    """Compute windows that begin at one row, on all devices at the same time."""
    shares = shares_of_windows(groups, len(slabs))

    def job(index: int, say: Say) -> Tensor:
        return slabs[index].compute(shares[index], say, advance, on_halved)

    if shares:
        run_on_devices([slab.worker.device for slab, _ in zip(slabs, shares, strict=False)], job)


def _blended(slabs: Sequence[RollingSlab], plan: _Plan, axis: int, rows: slice) -> Tensor:
    """The finished first rows of the sum of all devices, divided by the weights, in the first one's memory."""
    count = rows.stop - rows.start
    logits = slabs[0].sum.narrow(2 + axis, 0, count)
    for slab in slabs[1:]:
        if slab.has_sum:
            for channel, added in enumerate(slab.sum[0].narrow(1 + axis, 0, count)):
                logits[0, channel].add_(added.to(logits.device))
    return logits.div_(plan.total_weight.narrow(axis, rows.start, count))


def _zeros(like: Tensor, axis: int, count: int) -> Tensor:
    """Logits of rows that no window touches."""
    shape = list(like.shape)
    shape[2 + axis] = count
    return like.new_zeros(()).expand(shape)
