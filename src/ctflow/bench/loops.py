"""Three loops over a whole volume: stock MONAI's, the starting article's own, and ctflow's.

All take the same prepared volume in host memory and return the same kind of mask there, so that their times are
comparable.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from ctflow.core.errors import DeviceOutOfMemory, counted
from ctflow.core.model import ModelSpec
from ctflow.core.volume import Labels, Size3
from ctflow.transforms.postprocess import bytes_on_host, labels_from_probabilities, probabilities_from_logits
from ctflow.window.blend import importance_map
from ctflow.window.devices import Predict, Worker
from ctflow.window.grid import shares_of_windows, window_starts
from ctflow.window.predict import predict_volume

_ChannelBox = tuple[slice, ...]  # a window of every channel


@dataclass(frozen=True)
class Windows:
    """How a volume is cut into windows.

    Attributes:
        overlap: Overlap of neighbouring windows, 0 <= overlap < 1.
        batch_size: Windows per call.
    """

    overlap: float
    batch_size: int


def stock_volume(
    worker: Worker, volume: Tensor, spec: ModelSpec, windows: Windows, *, half: bool, stitch: str
) -> Labels:
    """`monai.inferers.sliding_window_inference` and an argmax.

    Args:
        worker: (B, C_in, *roi) -> (B, C_out, *roi), in the precision of `half`.
        volume: (1, C_in, X, Y, Z) float32 in host memory.
        spec: The model's window and blend.
        windows: Overlap and batch.
        half: Whether the volume becomes fp16 on the device.
        stitch: torch device on which windows are blended and the argmax is taken.

    Returns:
        (X, Y, Z) uint8 in host memory.
    """
    from monai.inferers import sliding_window_inference  # noqa: PLC0415  # takes seconds, which the other loops do not need

    source = volume.to(worker.device)
    logits = sliding_window_inference(
        source.half() if half else source,
        spec.roi,
        windows.batch_size,
        worker.predict,
        overlap=windows.overlap,
        mode=spec.blend,
        sw_device=worker.device,
        device=stitch,
    )
    labels: Labels = logits.argmax(dim=1)[0].to(torch.uint8).cpu().numpy()
    return labels


def article_volume(
    workers: Sequence[Worker],
    volume: Tensor,
    spec: ModelSpec,
    windows: Windows,
    threads: Sequence[Executor],
    *,
    one_channel: bool,
) -> Labels:
    """The starting article's loop: windows go to the GPU, and their results are merged in host memory.

    While a batch is merged the GPU computes the next one, so that the rows with this loop show its best speed.

    Args:
        workers: One for each device; results in any floating-point format.
        volume: (1, C_in, X, Y, Z) float32 in host memory, no axis smaller than the window.
        spec: The model's window, blend and number of channels.
        windows: Overlap and batch.
        threads: A thread for each of several workers, always the same one, as cuDNN's tuning results belong to a
            thread. The calling thread serves a single worker.
        one_channel: Whether softmax is computed on the device and only the channel of class 1 comes back; else every
            channel does, and softmax and argmax are computed in host memory.

    Returns:
        (X, Y, Z) uint8.
    """
    size: Size3 = tuple(volume.shape[2:])  # type: ignore[assignment]  # a volume has three
    weight = importance_map(spec.roi, spec.blend, torch.device("cpu"))
    total = torch.zeros((1 if one_channel else spec.out_channels, *size))
    weights = torch.zeros(size)
    merging = threading.Lock()

    def merge(boxes: Sequence[_ChannelBox], coming: _Coming) -> None:
        found = coming.wait().float()
        parts = found if one_channel else torch.softmax(found, dim=1)
        with merging:
            for box, part in zip(boxes, parts, strict=True):
                total[box] += part * weight
                weights[box[1:]] += weight

    def compute(worker: Worker, starts: Sequence[Size3]) -> None:
        on_gpu = worker.device.type == "cuda"
        last: tuple[Sequence[_ChannelBox], _Coming] | None = None
        with torch.inference_mode(), torch.cuda.device(worker.device) if on_gpu else nullcontext():
            for first in range(0, len(starts), windows.batch_size):
                boxes = [_box(start, spec.roi) for start in starts[first : first + windows.batch_size]]
                logits = worker.predict(_sent(volume, boxes, worker.device))
                coming = _Coming(torch.softmax(logits.float(), dim=1)[:, 1:2] if one_channel else logits)
                if last is not None:
                    merge(*last)
                last = boxes, coming
            if last is not None:
                merge(*last)

    shares = shares_of_windows(window_starts(size, spec.roi, windows.overlap), len(workers))
    if len(shares) == 1:
        compute(workers[0], shares[0])
    else:
        jobs = zip(threads, workers, shares, strict=False)  # fewer windows than workers leave some idle
        for ended in [thread.submit(compute, worker, share) for thread, worker, share in jobs]:
            ended.result()
    total /= weights
    labels: Labels = (total[0] > 0.5 if one_channel else total.argmax(dim=0)).to(torch.uint8).numpy()
    return labels


class _Coming:
    """A result in transfer to host memory; the device continues meanwhile.

    Args:
        found: On any device; the device's next work may overwrite it.
    """

    def __init__(self, found: Tensor) -> None:
        on_gpu = found.device.type == "cuda"
        self._host = torch.empty(found.shape, dtype=found.dtype, pin_memory=on_gpu)
        self._host.copy_(found, non_blocking=True)
        self._arrived = torch.cuda.current_stream(found.device).record_event() if on_gpu else None

    def wait(self) -> Tensor:
        """The result, whole."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def _sent(volume: Tensor, boxes: Sequence[_ChannelBox], device: torch.device) -> Tensor:
    """Windows of a volume in host memory, (B, C, *roi) on the device, without waiting for its pending work."""
    views = [volume[0][box] for box in boxes]
    batch = torch.empty((len(views), *views[0].shape), pin_memory=device.type == "cuda")
    for window, view in zip(batch, views, strict=True):
        window.copy_(view)
    return batch.to(device, non_blocking=True)


def _box(start: Size3, roi: Size3) -> _ChannelBox:
    """A window of every channel."""
    return (slice(None), *(slice(first, first + size) for first, size in zip(start, roi, strict=True)))


def resident_volume(workers: Sequence[Worker], volume: Tensor, spec: ModelSpec, windows: Windows) -> Labels:
    """The loop of ctflow: everything stays on the devices, and only the mask is copied back.

    Args:
        workers: One for each device.
        volume: (1, C_in, X, Y, Z) float32 in host memory.
        spec: The model.
        windows: Overlap and batch.

    Returns:
        (X, Y, Z) uint8 in host memory.

    Raises:
        DeviceOutOfMemory: A device has too little memory for a batch; smaller ones would not be comparable.
    """
    logits = predict_volume(
        volume,
        workers,
        roi=spec.roi,
        overlap=windows.overlap,
        blend=spec.blend,
        batch_size=windows.batch_size,
        on_halved=_refuse,
    )
    return bytes_on_host(labels_from_probabilities(probabilities_from_logits(logits, spec), spec))


def _refuse(device: torch.device, tried: int, left: int) -> None:
    raise DeviceOutOfMemory(f"{device} has too little memory for {counted(tried, 'window')} at once")


def two_channels(predict: Predict) -> Predict:
    """Both channels of a folded two-class head, whose one logit is their difference: (0, difference)."""

    def both(windows: Tensor) -> Tensor:
        logits = predict(windows)
        return torch.cat([torch.zeros_like(logits), logits], dim=1) if logits.shape[1] == 1 else logits

    return both
