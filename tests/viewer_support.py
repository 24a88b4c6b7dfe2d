"""CT of every geometry that a viewer may show, ctflow's objects of them, and what those mark on each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from highdicom.seg import Segmentation

from ctflow.core.model import Code, Model, Segment
from ctflow.core.progress import silent
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.write.ct_series import Adjust, write_ct_series
from ctflow.pipeline import segmenter
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from dicom_support import axes, rotation, spec_of
from marking_support import MarkingSegmenter, marking_model

SHAPE = (14, 48, 40)
SPACING_MM = (2.5, 0.8, 0.8)
TILT_MM, UNEVEN_MM = 0.6, 5.0
_BODY = Code("123037004", "SCT", "Anatomical Structure")
SEGMENTS = (
    Segment(1, "Lung", _BODY, Code("39607008", "SCT", "Lung"), colour=(66, 135, 245)),
    Segment(2, "Liver", _BODY, Code("10200004", "SCT", "Liver"), colour=(221, 84, 84)),
)
# What a run may be asked for, as docs/viewers.md calls it.
FORMS: dict[str, dict[str, object]] = {
    "binary": {},
    "binary, every frame": {"omit_empty_frames": False},
    "binary, by finding": {"segments": "finding"},
    "labelmap": {"seg": "labelmap"},
    "labelmap, every frame": {"seg": "labelmap", "omit_empty_frames": False},
    "fractional": {"seg": "fractional"},
    "binary, resampled": {"seg_grid": "resampled"},
    "labelmap, resampled": {"seg_grid": "resampled", "seg": "labelmap"},
}
Labels = dict[str, npt.NDArray[np.uint8]]  # (H, W) of each image, by its SOPInstanceUID


def _oblique() -> npt.NDArray[np.float64]:
    affine = axes((2, 1, 0), (1, 1, 1), SPACING_MM)
    affine[:3, :3] = rotation((0.3, -0.2, 0.15)) @ affine[:3, :3]
    return affine


def _tilted(dataset: pydicom.Dataset, d: int) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, f"{float(y) + TILT_MM * d:.4f}", z]


def _uneven(dataset: pydicom.Dataset, d: int) -> None:
    x, y, z = dataset.ImagePositionPatient
    dataset.ImagePositionPatient = [x, y, f"{float(z) + (UNEVEN_MM - SPACING_MM[0]) * max(0, d - 6):.4f}"]


def _volume(affine=None, shape=SHAPE, spacing=SPACING_MM) -> Volume:
    affine = axes((2, 1, 0), (1, 1, 1), spacing) if affine is None else affine
    values = np.random.default_rng(0).integers(-200, 200, shape, dtype=np.int16)
    return Volume(values, Geometry(shape, affine))


_FEET_FIRST = axes((2, 1, 0), (-1, 1, -1), SPACING_MM)
SERIES: dict[str, tuple[Callable[[], Volume], Adjust | None]] = {
    "plain": (_volume, None),
    "feet first": (lambda: _volume(_FEET_FIRST), None),
    "oblique": (lambda: _volume(_oblique()), None),
    "tilted": (_volume, _tilted),
    "uneven": (_volume, _uneven),
    "anisotropic": (lambda: _volume(spacing=(2.5, 0.6, 0.9)), None),
    "odd-sized": (lambda: _volume(shape=(14, 47, 41)), None),
}


def forms_of(series: str) -> tuple[str, ...]:
    """The forms in which a series' SEG may be asked for: only some series have another grid."""
    return tuple(form for form in FORMS if "resampled" not in form or series in ("tilted", "uneven"))


class MarkingParts(MarkingSegmenter):
    """Marks two classes in parts that no mirroring, turn or shift maps to themselves, and nothing at both ends."""

    def __init__(self, model: Model, settings: Settings) -> None:
        super().__init__(model, settings)
        self._fractional = settings.seg == "fractional"

    def segment(self, volume, progress=silent, meanwhile=lambda: None):
        found, seconds = super().segment(volume, progress, meanwhile)
        labels = np.zeros_like(found.labels)
        depth = len(labels)
        d, h, w = np.indices(labels.shape)
        inside = (d >= depth // 5) & (d < depth - 2) & (d != depth // 2)
        labels[inside & ((h - 14 - d // 2) ** 2 + (w - 12) ** 2 < 40 + 6 * d)] = 1
        labels[inside & (d % 3 > 0) & (h > 30) & (h < 44) & (w > 18 + d % 5) & (w < 36) & (h + w < 74)] = 2
        labels[depth // 5, 3, 2:9] = 2
        if self.model.spec.name == "nothing":
            labels[:] = 0
        sure = [np.where(labels == segment.number, 204, 51).astype(np.uint8) for segment in SEGMENTS]
        return replace(found, labels=labels, fractions=np.stack(sure) if self._fractional else None), seconds


def write_series(name: str, folder: Path, seed: int = 0) -> Path:
    """The CT of this name in a new folder; each seed makes another study."""
    volume, adjust = SERIES[name]
    write_ct_series(volume(), folder, seed=seed, adjust=adjust)
    return folder


def objects_of(ct: Path, output: Path, *, nothing: bool = False, **chosen) -> Path:
    """The folder with what a run of ctflow writes of a CT."""
    settings = Settings(device="cpu", cache=None, force=True, report="none", **chosen)
    model = marking_model(spec_of(SEGMENTS, name="nothing" if nothing else "parts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmenter, "Segmenter", MarkingParts)
        (case,) = run_folder(ct, output, model, settings).cases
    assert case.error is None, case.error
    return case.folder


def labels_on_images(seg: Path, ct: Path) -> Labels:
    """What a SEG marks on each image, as highdicom reads it: each frame on the image to which it refers.

    A frame on a grid of its own refers to none; it belongs to the image that lies in its place and has its size.
    """
    dataset = Segmentation.from_dataset(pydicom.dcmread(seg))
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in sorted(ct.iterdir())]
    labels = {header.SOPInstanceUID: np.zeros((header.Rows, header.Columns), np.uint8) for header in headers}
    pixels = dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns)
    for groups, frame in zip(dataset.PerFrameFunctionalGroupsSequence, pixels, strict=True):
        uid = _image_of(groups, headers)
        if uid is not None and frame.shape == labels[uid].shape:
            numbers = groups.get("SegmentIdentificationSequence")
            labels[uid][frame > 0] = numbers[0].ReferencedSegmentNumber if numbers else frame[frame > 0]
    return labels


def _image_of(groups: pydicom.Dataset, headers: Sequence[pydicom.Dataset]) -> str | None:
    if derivation := groups.get("DerivationImageSequence"):
        (source,) = derivation[0].SourceImageSequence
        return source.ReferencedSOPInstanceUID
    position = groups.PlanePositionSequence[0].ImagePositionPatient
    apart = [np.abs(np.subtract(header.ImagePositionPatient, position)).max() for header in headers]
    return headers[int(np.argmin(apart))].SOPInstanceUID if min(apart) < 0.01 else None


def outcome_of(found: Labels, truth: Labels) -> str:
    """What a viewer makes of a SEG: "right", "shows nothing" or "wrong"."""
    assert found.keys() == truth.keys()
    if not any(each.any() for each in found.values()):
        return "shows nothing"
    return "right" if all(np.array_equal(found[uid], truth[uid]) for uid in truth) else "wrong"
