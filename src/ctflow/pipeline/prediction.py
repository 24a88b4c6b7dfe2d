"""A model's windows in one volume, on the open engines: logits, whole or in blocks."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctflow.core.errors import counted
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3, Volume
from ctflow.engines.contract import Engine
from ctflow.engines.eager import EagerEngine
from ctflow.export.examples import anything_marked
from ctflow.pipeline.finishing import Finishing, axis_of_blocks
from ctflow.settings.run import Settings
from ctflow.transforms.by_monai.case import PreparedByMonai
from ctflow.transforms.restore import source_boxes
from ctflow.transforms.state import Prepared
from ctflow.window.body import Body
from ctflow.window.cells import CellMask
from ctflow.window.constant import ConstantWindows
from ctflow.window.devices import Worker
from ctflow.window.find_body import mask_of_body
from ctflow.window.grid import roi_in_volume
from ctflow.window.mirror import mirrored
from ctflow.window.predict import predict_blocks, predict_volume

# Logits of more bytes are blended in blocks. Not a share of the memory that is free: a CT is computed in the same way
# on every machine. Three classes of 512 x 512 x 300 voxels at 1.5 mm take 0.4 GiB, 105 classes 14 GiB.
WHOLE_BYTES = 2**31
_NOT_COMPARED = "the precision was not compared with fp32 on this CT: the bundle's inferer is its own"

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class InBlocks:
    """What has become of logits that were blended in blocks.

    Attributes:
        finishing: Has taken all of them.
        marked: (X, Y, Z) bool: where they mark anything; None if that was not asked for.
        seconds: How long that took.
    """

    finishing: Finishing
    marked: Tensor | None
    seconds: float


@dataclass(frozen=True, eq=False)
class Predicted:
    """The result of a volume's windows.

    Attributes:
        logits: (1, C, X, Y, Z) float32 on the network's grid, or what has become of them.
        window: As `Segmentation.window`.
        starts: First voxel of each window that was computed.
        parts: Outside each of the known ones nothing is marked: there, windows are missing or show nothing.
        warnings: One for each device that had too little memory for a batch.
    """

    logits: Tensor | InBlocks
    window: Mapping[str, Any]
    starts: Sequence[Size3]
    parts: tuple[CellMask | None, ...]
    warnings: tuple[str, ...]

    @property
    def restore_s(self) -> float:
        """Seconds of the restoring that was done while windows were computed."""
        return self.logits.seconds if isinstance(self.logits, InBlocks) else 0.0

    def marked(self, model: Model) -> Tensor:
        """(X, Y, Z) bool: where the logits mark anything."""
        if isinstance(self.logits, Tensor):
            return anything_marked(self.logits[0], model)
        if self.logits.marked is None:
            raise ValueError("predict with is_compared to know what is marked")
        return self.logits.marked


class Prediction:
    """A volume's windows.

    Args:
        model: The model.
        settings: Overlap, mirroring and constant windows are used.
        engines: One on each device.
        prepared: The network's input.
        body: Windows outside it are left out; None computes all.
        volume: The CT.

    Attributes:
        roi: Size of a window in this volume.
    """

    def __init__(
        self,
        model: Model,
        settings: Settings,
        engines: Sequence[Engine],
        prepared: Prepared,
        body: Body | None,
        volume: Volume,
    ) -> None:
        self._model, self._settings, self._engines = model, settings, engines
        self._prepared, self._body, self._volume = prepared, body, volume
        self.roi = roi_of_prepared(model, prepared)
        is_looked_for = settings.constant_windows == "background" and model.spec.workflow is None
        self._constant = ConstantWindows(volume.array) if is_looked_for else None
        self._wanted: list[bool] = []
        self._starts: list[Size3] = []
        self._halved: dict[str, tuple[int, int]] = {}
        self._boxes = source_boxes(prepared, self.roi)

    @property
    def is_in_blocks(self) -> bool:
        """Whether the logits are too many to be kept whole."""
        voxels = math.prod(self._prepared.tensor.shape[2:])
        if self._model.spec.workflow is not None:  # MONAI's post-processing takes them whole
            return False
        return 4 * self._model.spec.out_channels * voxels > WHOLE_BYTES

    def run(self, progress: Progress, meanwhile: Callable[[], None], *, is_compared: bool) -> Predicted:
        """Compute the windows.

        Args:
            progress: Receives every window.
            meanwhile: Called once, after a GPU has received windows and before the wait for their result.
            is_compared: Whether `Predicted.marked` is wanted.
        """
        logits: Tensor | InBlocks
        workflow = self._model.spec.workflow
        if workflow is not None and (workflow.infers or workflow.evaluates):
            return _by_own_inferer(self._prepared, self._engines[0], progress, meanwhile)
        if self.is_in_blocks:
            logits = self._in_blocks(progress, meanwhile, is_compared=is_compared)
        else:
            logits = predict_volume(self._prepared.tensor, **self._arguments(progress))
            meanwhile()
            _wait_for(logits)
        return Predicted(logits, self._facts(), self._starts, self._parts(), _warnings_of_memory(self._halved))

    def _in_blocks(self, progress: Progress, meanwhile: Callable[[], None], *, is_compared: bool) -> InBlocks:
        """Each block becomes labels before the next one is computed."""
        spec, prepared, settings = self._model.spec, self._prepared, self._settings
        axis = axis_of_blocks(prepared, spec)
        log.info("%d channels on a grid of %s: blended in blocks along axis %d", spec.out_channels,
                 " x ".join(map(str, prepared.tensor.shape[2:])), axis)  # fmt: skip
        finishing: Finishing | None = None
        marked: list[Tensor] = []
        seconds = 0.0
        for rows, logits in predict_blocks(prepared.tensor, axis=axis, **self._arguments(progress)):
            if finishing is None:
                meanwhile()
                finishing = Finishing(
                    prepared,
                    spec,
                    self._parts(),
                    self._volume.geometry.shape,
                    fractional=settings.seg == "fractional",
                    progress=silent,
                )
            _wait_for(logits)
            start = time.perf_counter()
            if is_compared:
                marked.append(anything_marked(logits[0], self._model))
            finishing.take(rows, logits)
            seconds += time.perf_counter() - start
        if finishing is None:
            raise ValueError("no logits")
        return InBlocks(finishing, torch.cat(marked, dim=axis) if is_compared else None, seconds)

    def _arguments(self, progress: Progress) -> dict[str, Any]:
        spec, mirror = self._model.spec, self._mirror
        return {
            "predict": [worker_from_engine(engine, mirror) for engine in self._engines],
            "roi": self.roi,
            "overlap": self._overlap,
            "blend": spec.blend,
            "sigma_scale": spec.sigma_scale,
            "padding": spec.window_padding,
            "placement": spec.placement,
            "batch_size": self._batch_size,
            "is_wanted": self._is_wanted,
            "progress": progress,
            "on_halved": self._on_halved,
        }

    @property
    def _overlap(self) -> Any:
        return self._model.spec.overlap if self._settings.overlap is None else self._settings.overlap

    @property
    def _mirror(self) -> tuple[int, ...]:
        return self._model.spec.mirror_axes if self._settings.mirror == "plans" else ()

    @property
    def _batch_size(self) -> int:
        return min(engine.info.batch_range[1] for engine in self._engines)

    def _is_wanted(self, start: Size3) -> bool:
        box = self._boxes(start)
        self._wanted.append(self._body is None or self._body.touches(box))
        if self._wanted[-1]:
            self._starts.append(start)
            if self._constant:
                self._constant.look_at(box)
        return self._wanted[-1]

    def _on_halved(self, device: torch.device, tried: int, left: int) -> None:
        first, _ = self._halved.get(str(device), (tried, left))
        self._halved[str(device)] = (first, left)

    def _parts(self) -> tuple[CellMask | None, ...]:
        """What was looked at, once all windows have been chosen."""
        device = self._prepared.tensor.device
        body = mask_of_body(self._body, device) if self._body else None
        return body, self._constant.seen(device) if self._constant else None

    def _facts(self) -> dict[str, Any]:
        """The window settings as used, in the terms of result.json."""
        least = min([self._batch_size, *(left for _, left in self._halved.values())])
        facts: dict[str, Any] = {"roi": list(self.roi), "overlap": self._overlap, "blend": self._model.spec.blend}
        if isinstance(self._overlap, tuple):
            facts["overlap"] = list(self._overlap)
        facts["batch_size"] = least
        if self._mirror:
            facts["mirror"] = list(self._mirror)
        if self._body is not None:
            facts |= {"part": "body", "windows": sum(self._wanted), "windows_of_all": len(self._wanted)}
        if self._constant is None:
            facts["constant_windows"] = "compute"
        elif self._constant.count:
            facts["windows_constant"] = self._constant.count
        return facts


def _by_own_inferer(prepared: Prepared, engine: Engine, progress: Progress, meanwhile: Callable[[], None]) -> Predicted:
    """The network's answer by the bundle's own inferer or evaluator, which may ask it for more than windows."""
    if not isinstance(prepared, PreparedByMonai) or prepared.case is None or not isinstance(engine, EagerEngine):
        raise TypeError("only PyTorch computes a bundle's own inferer")
    progress("segment", 0, 1)
    logits = engine.run(prepared.case.inferred)
    meanwhile()
    _wait_for(logits)
    progress("segment", 1, 1)
    window = {"roi": list(prepared.tensor.shape[2:]), "inferer": "own", "batch_size": 1}
    return Predicted(logits, window, [], (), () if engine.info.precision == "fp32" else (_NOT_COMPARED,))


def roi_of_prepared(model: Model, prepared: Prepared) -> Size3:
    """A window's size in a prepared volume."""
    x, y, z = prepared.tensor.shape[2:]
    return roi_in_volume(model.spec.roi, (x, y, z))


def worker_from_engine(engine: Engine, mirror: Sequence[int] = ()) -> Worker:
    """An engine as a worker for `predict_volume`, which also mirrors each window along these axes."""
    return Worker(mirrored(engine.predict, mirror), torch.device(engine.info.device), engine.info.fewest_computed)


def _wait_for(logits: Tensor) -> None:
    """Wait for a GPU: else a stage's seconds would miss its pending work."""
    if logits.is_cuda:
        torch.cuda.current_stream(logits.device).synchronize()


def _warnings_of_memory(halved: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """A sentence per device: for how many windows it had too little memory, and how many it computed instead."""
    warnings = tuple(
        f"{device} had too little memory for {counted(tried, 'window')} at once; they were computed {left} at a time"
        for device, (tried, left) in halved.items()
    )
    for warning in warnings:
        log.warning(warning)
    return warnings
