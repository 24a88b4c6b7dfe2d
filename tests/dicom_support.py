"""Small synthetic series for the tests of the DICOM room."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from ctflow.core.model import ModelSpec, NetworkSpec, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.dicom.read.assemble import Assembled, assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.read.select.series import Selection
from ctflow.dicom.write.ct_series import write_ct_series

DEPTH, ROWS, COLUMNS = 16, 12, 10

# Character sets of sources, and names in them that must keep their bytes.
NAMES = [
    (["ISO_IR 192"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["ISO_IR 100"], "Müller^Jürgen"),
    (["ISO_IR 144"], "Люксембург"),  # Cyrillic is meant
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["ISO 2022 IR 13", "ISO 2022 IR 87"], "ﾔﾏﾀﾞ^ﾀﾛｳ=山田^太郎=やまだ^たろう"),
    (["GB18030"], "Wang^XiaoDong=王^小东"),
    ([""], "Plain^Name"),
]


def small_volume(affine=None, shape=(DEPTH, ROWS, COLUMNS), seed=0) -> Volume:
    """Random HU on a grid that differs along every axis."""
    if affine is None:
        affine = axes((2, 1, 0), (1, 1, 1))
    values = np.random.default_rng(seed).integers(-1024, 1500, shape, dtype=np.int16)
    return Volume(values, Geometry(shape, np.asarray(affine, float)))


def spec_of(
    segments: tuple[Segment, ...], name: str = "lung_tumour", version: str = "0.1.0", demonstration: bool = True
) -> ModelSpec:
    """A model of which only the written objects speak."""
    return ModelSpec(
        name=name,
        version=version,
        network=NetworkSpec("SwinUNETR", {}),
        in_channels=1,
        out_channels=1 + len(segments),
        preprocessing=(),
        roi=(64, 64, 64),
        overlap=0.25,
        blend="gaussian",
        batch_size=1,
        activation="softmax",
        threshold=None,
        segments=segments,
        intended_use="",
        demonstration=demonstration,
    )


def axes(order, signs, spacing=(2.5, 0.6, 0.9), origin=(-10.5, 20.25, -300.0)) -> npt.NDArray[np.float64]:
    """The affine of a grid whose array axes run along the patient's axes in some order, forwards or backwards."""
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (target, sign) in enumerate(zip(order, signs, strict=True)):
        affine[target, axis] = sign * spacing[axis]
    affine[:3, 3] = origin
    return affine


def rotation(angles) -> npt.NDArray[np.float64]:
    """(3, 3): turns about x, y and z one after another, in radians."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = (other for other in range(3) if other != axis)
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = turn @ matrix
    return matrix


def setter(**attributes) -> Callable[[Dataset, int], None]:
    """Sets attributes of every slice; None takes one away."""

    def adjust(dataset: Dataset, _index: int) -> None:
        for keyword, value in attributes.items():
            if value is None:
                del dataset[keyword]
            else:
                setattr(dataset, keyword, value)

    return adjust


def moved(index_of: Callable[[int], float], offset_mm: float) -> Callable[[Dataset, int], None]:
    """Moves some slices along z."""

    def adjust(dataset: Dataset, index: int) -> None:
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, float(z) + offset_mm * index_of(index)]

    return adjust


@dataclass(frozen=True)
class LinearField:
    """HU that change evenly through the patient: linear interpolation between any samples is exact."""

    origin_hu: float = 200.0
    gradient_hu: tuple[float, float, float] = (3.0, -2.0, 1.5)

    def at(self, points_mm: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """(..., 3) LPS mm -> (...) HU."""
        return np.asarray(points_mm) @ np.array(self.gradient_hu) + self.origin_hu


def indices_of(shape) -> npt.NDArray[np.intp]:
    """(D, H, W, 3): every index of an array."""
    return np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)


def assert_same_world(found: Volume, truth: Volume | LinearField, within: float = 1e-3) -> None:
    """Every voxel has the value that the truth has at its place, to a share of a voxel, and none is missing."""
    points = found.geometry.world_from_index(indices_of(found.array.shape))
    if isinstance(truth, LinearField):
        inside = ~found.padding if found.padding is not None else np.ones(found.array.shape, bool)
        assert np.abs(found.array - truth.at(points))[inside].max() < 0.06  # stored in steps of 0.05 HU
        return
    assert found.array.size == truth.array.size
    back = np.linalg.inv(truth.geometry.affine_mm)
    index = points @ back[:3, :3].T + back[:3, 3]
    nearest = np.rint(index).astype(int)
    assert np.abs(index - nearest).max() < within, "voxels lie between the true ones"
    assert (nearest >= 0).all()
    assert (nearest < truth.array.shape).all()
    assert np.array_equal(found.array, truth.array[tuple(np.moveaxis(nearest, -1, 0))])


def write_volumes(folder: Path, *volumes: dict[str, object], shape=(DEPTH, ROWS, COLUMNS)) -> list[Volume]:
    """Volumes at the same positions in one series, each with attributes that tell it apart."""
    shared = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.4", "FrameOfReferenceUID": "1.2.5"}
    written = []
    for number, attributes in enumerate(volumes):
        volume = small_volume(shape=shape, seed=number)
        adjust = setter(PatientID="P", **shared, **attributes)
        for path in write_ct_series(volume, folder / str(number), seed=number, adjust=adjust):
            path.rename(folder / f"{number}-{path.name}")
        (folder / str(number)).rmdir()
        written.append(volume)
    return written


def selection_of(folder: Path, **options) -> Selection:
    return select_series(scan_folder(folder), **options)


def assembled(folder: Path) -> Assembled:
    (candidate,) = selection_of(folder, force=True).selected
    return assemble_series(candidate.series)
