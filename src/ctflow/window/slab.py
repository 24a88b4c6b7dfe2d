"""The sum of a device's windows: of a whole slab of the volume, or of the rows that windows still to come may touch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ctflow.core.errors import BundleInvalid, DeviceOutOfMemory
from ctflow.core.volume import Box
from ctflow.engines.cudagraph import free_cached_memory
from ctflow.window.devices import Say, Worker

AlikeWindows = Sequence[Box]  # windows with the same content
Halved = Callable[[torch.device, int, int], None]


class Slab:
    """A part of a volume, and the sum of the logits of windows in it, on a worker's device.

    Args:
        part: (C_in, D, H, W), on the worker's device.
        weight: Weight of each voxel of a window.
        worker: Computes windows.
        batch_size: Most windows at once; becomes less if memory does not suffice.
    """

    def __init__(self, part: Tensor, weight: Tensor, worker: Worker, batch_size: int) -> None:
        self.part, self.weight, self.worker = part, weight.to(worker.device), worker
        self._batch_size = batch_size
        self._batch: Tensor | None = None
        self._sum: Tensor | None = None

    @property
    def sum(self) -> Tensor:
        """(1, C_out, D, H, W) float32 sum of the weighted logits so far."""
        if self._sum is None:
            raise ValueError("no window has been computed")
        return self._sum

    def compute(
        self, groups: Sequence[AlikeWindows], say: Say, advance: Callable[[int], None], on_halved: Halved
    ) -> Tensor:
        """Compute windows, in smaller batches if memory does not suffice; returns `sum`."""
        done = 0
        with torch.no_grad():  # a thread does not inherit the caller's no_grad
            while done < len(groups):
                some = groups[done : done + self._batch_size]
                if self._add(some):
                    done += len(some)
                    say(partial(advance, sum(map(len, some))))
                else:
                    self._batch_size = max(len(some) // 2, self.worker.fewest)
                    say(partial(on_halved, self.worker.device, len(some), self._batch_size))
        return self.sum

    def _add(self, groups: Sequence[AlikeWindows]) -> bool:
        """Compute a window of some groups; False if the device lacks memory for it, but may have enough for fewer.

        Nothing here waits for a GPU, and only the first call allocates memory.
        """
        roi = self.weight.shape
        if self._batch is None or len(self._batch) < len(groups):
            self._batch = self.part.new_empty((len(groups), len(self.part), *roi))
        windows = self._batch[: len(groups)]
        for window, group in zip(windows, groups, strict=True):
            window.copy_(self.part[(slice(None), *group[0])])
        answer = self._answer(windows)
        if answer is None:
            return False
        if len(answer) != len(groups):
            raise ValueError(f"predict returned {len(answer)} answers to {len(groups)} windows")
        if answer.shape[2:] != roi:
            problem = f"answers {len(groups)} windows of {tuple(roi)} with {tuple(answer.shape)}"
            raise BundleInvalid(f"the network {problem}, not with a value for each voxel", reason="network")
        if self._sum is None:
            self._sum = torch.zeros((1, answer.shape[1], *self._shape()), device=self.part.device)
        for window, group in zip(answer, groups, strict=True):
            self._blend(window.to(torch.float32), group)
        return True

    def _shape(self) -> Sequence[int]:
        return self.part.shape[1:]

    def _blend(self, logits: Tensor, group: AlikeWindows) -> None:
        for place in group:
            self.sum[0][(slice(None), *place)].addcmul_(logits, self.weight)

    def _answer(self, windows: Tensor) -> Tensor | None:
        try:
            return self.worker.predict(windows)
        except DeviceOutOfMemory:
            if len(windows) <= self.worker.fewest:
                raise
        if self.part.is_cuda:
            free_cached_memory()  # not above: the error's frames hold memory until the error is gone
        return None


class RollingSlab(Slab):
    """The sum of as many rows as a window has, which moves along an axis with the windows.

    Every voxel's sum is added up in the order in which `Slab` adds it up, so that both have the same bits.

    Args:
        part: As in `Slab`: the whole volume.
        weight: As in `Slab`.
        worker: As in `Slab`.
        batch_size: As in `Slab`.
        axis: The axis of the volume, 0 to 2.
    """

    def __init__(self, part: Tensor, weight: Tensor, worker: Worker, batch_size: int, axis: int) -> None:
        super().__init__(part, weight, worker, batch_size)
        self._axis, self._first = axis, 0
        self._known: list[tuple[Tensor, AlikeWindows]] = []  # windows with the same content as some that come later

    @property
    def has_sum(self) -> bool:
        """Whether any window has been computed."""
        return self._sum is not None

    @property
    def _end(self) -> int:
        return self._first + self.weight.shape[self._axis]

    def move(self, first: int) -> None:
        """Move the rows, of which those before `first` are finished."""
        end, step, depth = self._end, first - self._first, self.weight.shape[self._axis]
        self._first = first
        if self._sum is None or not step:
            return
        rows = self._sum[0]
        for to in range(0, depth - step, step):  # never onto itself
            count = min(step, depth - step - to)
            rows.narrow(1 + self._axis, to, count).copy_(rows.narrow(1 + self._axis, to + step, count))
        kept = max(depth - step, 0)
        rows.narrow(1 + self._axis, kept, depth - kept).zero_()
        for logits, group in self._known:
            self._blend_rows(logits, group, end)
        self._known = [each for each in self._known if max(place[self._axis].stop for place in each[1]) > self._end]

    def _shape(self) -> Sequence[int]:
        shape = list(self.part.shape[1:])
        shape[self._axis] = self.weight.shape[self._axis]
        return shape

    def _blend(self, logits: Tensor, group: AlikeWindows) -> None:
        self._blend_rows(logits, group, self._first)
        if max(place[self._axis].stop for place in group) > self._end:
            self._known.append((logits.clone(), group))  # the worker's memory may be written to again

    def _blend_rows(self, logits: Tensor, group: AlikeWindows, begin: int) -> None:
        """Add windows' rows from `begin` on, as far as the sum reaches."""
        for place in group:
            start = place[self._axis].start
            low, high = max(start, begin, self._first), min(place[self._axis].stop, self._end)
            if low >= high:
                continue
            box = [slice(None), *place]
            box[1 + self._axis] = slice(low - self._first, high - self._first)
            weight = self.weight.narrow(self._axis, low - start, high - low)
            self.sum[0][tuple(box)].addcmul_(logits.narrow(1 + self._axis, low - start, high - low), weight)


def fetched(part: Tensor, rows: slice, device: torch.device) -> Tensor:
    """A part of a volume on a device; if copied, only those rows of the first axis have values."""
    if part.device == device:
        return part
    copied = torch.empty(part.shape, dtype=part.dtype, device=device)
    # A CPU must wait for a GPU's bytes; a GPU's stream orders this itself.
    copied[:, rows].copy_(part[:, rows], non_blocking=device.type == "cuda")
    return copied
