"""A model with an engine open on each device, which segments volumes one after another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from ctflow.core.errors import DeviceOutOfMemory, ParityFailed, SettingsInvalid
from ctflow.core.model import Model, ModelSpec
from ctflow.core.progress import Progress, silent, startup
from ctflow.core.volume import Labels, Size3, Volume
from ctflow.engines.contract import Engine
from ctflow.export.examples import telling_windows, window_at
from ctflow.export.figures import Agreement
from ctflow.pipeline.finishing import finished, labels_and_masks
from ctflow.pipeline.opened import OpenEngines
from ctflow.pipeline.prediction import InBlocks, Predicted, Prediction, roi_of_prepared
from ctflow.pipeline.segmentation import Segmentation, memory_of, timed
from ctflow.settings.run import Settings
from ctflow.transforms.by_monai.case import PreparedByMonai, prepared_for
from ctflow.transforms.labels import in_voxels
from ctflow.transforms.postprocess import bytes_on_host
from ctflow.transforms.restore import source_boxes
from ctflow.transforms.state import Prepared
from ctflow.transforms.tilt import untilted_grid
from ctflow.window.body import Body
from ctflow.window.find_body import find_body

_NO_BODY = "no body was found in the volume (--roi body): all windows were computed"
_UNKNOWN_BODY = "MONAI runs the bundle's transforms, so --roi body is not possible: all windows were computed"
_TILTED = "MONAI runs the bundle's transforms: the gantry tilt of this CT was not removed before them"

log = logging.getLogger(__name__)


def _nothing() -> None:
    """Do nothing meanwhile."""


class Segmenter:
    """A model with an engine open on each device; segments any number of volumes, one after another.

    Args:
        model: The model.
        settings: Engine, precision, device, overlap, roi, constant windows and cache are used.
        logits_only: Whether masks do not count where an engine is compared with PyTorch in fp32: labels of random
            weights change with any rounding.

    Raises:
        SettingsInvalid: The settings ask for probabilities of regions that overlap.
    """

    def __init__(self, model: Model, settings: Settings, *, logits_only: bool = False) -> None:
        _check_form(model, settings)
        self.model = model
        self._settings = settings
        self._opened = OpenEngines(model, settings, logits_only=logits_only)

    def with_settings(self, settings: Settings) -> Segmenter:
        """The same open engines, for other settings than engine, precision, device and cache.

        Raises:
            SettingsInvalid: As of the class.
        """
        _check_form(self.model, settings)
        other = copy(self)
        other._settings = settings  # its own kind
        return other

    @property
    def warnings(self) -> tuple[str, ...]:
        """Notes on the engine for every result."""
        return self._opened.warnings

    @property
    def _engines(self) -> tuple[Engine, ...]:
        return self._opened.engines

    def open(self, progress: Progress = silent) -> None:
        """Open the engines; their files are made first if not in the cache, which takes seconds to minutes.

        Args:
            progress: Receives the making and measuring of engines.

        Raises:
            SettingsInvalid: The backend is unknown.
            ResourceError: The backend or device cannot be used here.
            ModelError: The engine cannot be made from the model.
            OutputError: The cache cannot be written and the engine was requested by name.
        """
        self._opened.open(progress)
        startup.lap("engine")

    def close(self) -> None:
        """Close the engines; may be called twice."""
        self._opened.close()

    def __enter__(self) -> Segmenter:
        if not self._engines:
            self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def segment(
        self, volume: Volume, progress: Progress = silent, meanwhile: Callable[[], None] = _nothing
    ) -> tuple[Segmentation, dict[str, float]]:
        """Segment a volume.

        Args:
            volume: CT in HU.
            progress: Receives every window.
            meanwhile: Called once, after a GPU has received all windows and before the wait for its result.

        Returns:
            The segmentation, and the seconds of each stage.

        Raises:
            DeviceOutOfMemory: The device has too little memory.
            ParityFailed: The named engine differs from PyTorch in fp32 on this CT, or with "auto" every engine does.
            ModelError: The network's result is not finite.
        """
        self._opened.open_missing(progress)
        if not self._engines:
            raise ValueError("open the segmenter before segmenting")
        seconds: dict[str, float] = {}
        with memory_of(self._opened.info.device):
            with timed(seconds, "prepare"):
                startup.lap("reading")
                prepared, found_body = self._prepare(volume)
                body = self._part_to_compute(found_body, prepared)
                startup.lap("preparation")
            startup.first_window()
            with timed(seconds, "segment"):
                found = self._predict(prepared, body, volume, progress, meanwhile)
            restored_s = found.restore_s
            seconds["segment"] -= restored_s
            agreement = self._opened.earlier
            if self._opened.is_to_be_compared and found.starts:
                with timed(seconds, "compare"):
                    found, agreement = self._compared(prepared, body, volume, found, progress)
            with timed(seconds, "restore"):
                labels, fractions = self._finished(prepared, found, volume, progress)
            seconds["restore"] += restored_s
        warnings = found.warnings
        for warning in _warnings_of_workflow(self.model.spec, volume, self._settings.roi == "body" and body is None):
            log.warning(warning)
            warnings = (*warnings, warning)
        small = _warnings_of_small_volume(prepared, roi_of_prepared(self.model, prepared))
        warnings = (*warnings, *small, *_warnings_of_threshold(self.model.spec, fractions))
        info, measured = self._opened.info, self._opened.measured
        return Segmentation(labels, info, found.window, warnings, fractions, agreement, measured, found_body), seconds

    def _prepare(self, volume: Volume) -> tuple[Prepared, Body | None]:
        """The network's input, and the body if one is found."""
        spec, device = self.model.spec, self._engines[0].info.device
        found: list[Body | None] = []
        spacing_mm = volume.geometry.spacing_mm
        prepared = prepared_for(spec, volume, device, lambda source: found.append(find_body(source, spacing_mm)))
        (body,) = found
        return prepared, body

    def _part_to_compute(self, body: Body | None, prepared: Prepared) -> Body | None:
        """The body, if the settings ask for no more and a window would touch it."""
        if self.model.spec.workflow is not None:  # what its windows see is unknown
            return None
        return body if self._settings.roi == "body" and body is not None and _is_seen(body, prepared) else None

    def _compared(
        self, prepared: Prepared, body: Body | None, volume: Volume, found: Predicted, progress: Progress
    ) -> tuple[Predicted, Agreement | None]:
        """A result that agrees with PyTorch in fp32: this engine's, or that of the next one that agrees.

        For this, a few windows of the first CT of a machine, model and versions are computed once more.
        """
        opened, roi, told = self._opened, roi_of_prepared(self.model, prepared), found.warnings
        agreement = None
        while agreement is None and opened.is_to_be_compared:
            progress("compare", 0, 1)
            some = telling_windows(prepared.tensor, found.marked(self.model), found.starts, roi)
            windows = [window_at(prepared.tensor, start, roi) for start in some]
            try:
                agreement = opened.compare(windows, len(found.starts), found.window["batch_size"])
            except ParityFailed as error:
                told = (*told, opened.take_next(error, progress))
                found = self._predict(prepared, body, volume, progress, _nothing)
                told = (*told, *found.warnings)
            except DeviceOutOfMemory as error:  # of PyTorch, which needs more than the engine that has finished
                told = (*told, f"the engine was not compared with PyTorch on this CT: {error}")
                log.warning(told[-1])
                break
            progress("compare", 1, 1)
        return replace(found, warnings=told), agreement

    def _predict(
        self,
        prepared: Prepared,
        body: Body | None,
        volume: Volume,
        progress: Progress,
        meanwhile: Callable[[], None],
    ) -> Predicted:
        spec = _in_voxels(self.model.spec, prepared, volume)
        prediction = Prediction(replace(self.model, spec=spec), self._settings, self._engines, prepared, body, volume)
        return prediction.run(progress, meanwhile, is_compared=self._opened.is_to_be_compared)

    def _finished(
        self, prepared: Prepared, found: Predicted, volume: Volume, progress: Progress
    ) -> tuple[Labels, Labels | None]:
        """Labels on the source grid, and fractions if asked for."""
        if isinstance(found.logits, InBlocks):
            labels, fractions = found.logits.finishing.result()
            progress("restore", len(labels), len(labels))
            return labels, fractions
        spec, fractional = _in_voxels(self.model.spec, prepared, volume), self._settings.seg == "fractional"
        shape = volume.geometry.shape
        if isinstance(prepared, PreparedByMonai) and prepared.case is not None:
            return labels_and_masks(bytes_on_host(prepared.case.labels(found.logits).contiguous()), spec, fractional)
        return finished(prepared, found.logits, spec, found.parts, shape, fractional=fractional, progress=progress)


def _check_form(model: Model, settings: Settings) -> None:
    if model.spec.painted and settings.seg == "fractional":
        raise SettingsInvalid(
            "fractional: this model's regions overlap, and their probabilities do not make a label map; use "
            "another --seg",
            reason="conflict",
        )


def _in_voxels(spec: ModelSpec, prepared: Prepared, volume: Volume) -> ModelSpec:
    """A specification whose steps on labels count voxels of this volume."""
    return replace(
        spec,
        network_label_steps=in_voxels(spec.network_label_steps, prepared.spacing_mm),
        label_steps=in_voxels(spec.label_steps, volume.geometry.spacing_mm),
    )


def _is_seen(body: Body, prepared: Prepared) -> bool:
    """Whether a window would touch the body: plane by plane, as the box around a whole tilted grid holds more."""
    axis = prepared.source_axes.index(0)
    size = [1 if each == axis else count for each, count in enumerate(prepared.tensor.shape[2:])]
    boxes = source_boxes(prepared, (size[0], size[1], size[2]))
    planes = np.eye(3, dtype=int)[axis] * np.arange(prepared.tensor.shape[2 + axis])[:, None]
    return any(body.touches(boxes((x, y, z))) for x, y, z in planes.tolist())


def _warnings_of_workflow(spec: ModelSpec, volume: Volume, is_all_computed: bool) -> Iterator[str]:
    """What was not done for this volume: windows were not left out, or a tilt was not removed."""
    if is_all_computed:
        yield _NO_BODY if spec.workflow is None else _UNKNOWN_BODY
    if spec.workflow is not None and untilted_grid(volume.geometry) is not None:
        yield _TILTED


def _warnings_of_small_volume(prepared: Prepared, roi: Size3) -> tuple[str, ...]:
    """A sentence if the volume fills less than half of the model's window along an axis."""
    sizes = zip(prepared.source_axes, prepared.tensor.shape[2:], prepared.spacing_mm, roi, strict=True)
    small = [
        f"{count * mm:.0f} of {window * mm:.0f} mm along the {('slices', 'rows', 'columns')[axis]}"
        for axis, count, mm, window in sorted(sizes)
        if 2 * count < window
    ]
    if not small:
        return ()
    warning = (
        f"the volume fills less than half of the model's window ({', '.join(small)}); the rest of the window is empty, "
        "so the model may mark more or less than in a larger volume"
    )
    log.warning(warning)
    return (warning,)


def _warnings_of_threshold(spec: ModelSpec, fractions: npt.NDArray[np.uint8] | None) -> tuple[str, ...]:
    """Warn of another threshold than one half, which readers of a fractional SEG take for the border."""
    if fractions is None or spec.threshold in (None, 0.5):
        return ()
    threshold = f"{spec.threshold:g}"
    return (f"the SEG holds probabilities; the bundle marks, and ctflow measures, voxels of {threshold} or more",)
