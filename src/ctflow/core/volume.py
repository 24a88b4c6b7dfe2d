"""Volume and Geometry: an array in Hounsfield units and its position in the patient."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
LabelArray = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
Indices = npt.NDArray[np.int64]  # of voxels or lines
Labels = npt.NDArray[np.uint8]  # of a model's classes; a SEG from a file may have more
Size3 = tuple[int, int, int]
Box = tuple[slice, slice, slice]  # of voxels
PADDING_HU = -1024  # outside the scanner's field of view
LEAST_SHARE = 1e-6  # of padding in an interpolated voxel: less is rounding and must not spread padding


def digest_of_uid(uid: str) -> str:
    """A short name of a DICOM UID for messages and logs.

    Args:
        uid: Any UID, well formed or not.

    Returns:
        The first 12 hexadecimal digits of its SHA-256 digest.
    """
    return hashlib.sha256(uid.encode("utf-8", "surrogateescape")).hexdigest()[:12]


def marked_lines(marks: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which lines along the last axis hold anything but zeros.

    Args:
        marks: Any number of axes, of integers; most of it is background, which is checked eight bytes at a time.

    Returns:
        The shape of all other axes.
    """
    lines: npt.NDArray[np.bool_] = np.bitwise_or.reduce(_in_words(marks), axis=-1) != 0
    return lines


def box_of_marked(marks: npt.NDArray[Any], lines: npt.NDArray[np.bool_] | None = None) -> tuple[slice, ...] | None:
    """The smallest box that holds everything but zeros.

    Args:
        marks: Any number of axes, of integers.
        lines: Its `marked_lines`, if known.

    Returns:
        One slice per axis; None if there are only zeros.
    """
    left = marked_lines(marks) if lines is None else lines
    if not left.any():
        return None
    box: list[slice] = []
    for axis in range(left.ndim):
        occurs = np.flatnonzero(left[tuple(box)].any(axis=tuple(other for other in range(left.ndim) if other != axis)))
        box.append(slice(int(occurs[0]), int(occurs[-1]) + 1))
    words = np.bitwise_or.reduce(_in_words(marks[tuple(box)]), axis=tuple(range(left.ndim)))
    along = np.flatnonzero(words.view(marks.dtype))
    return (*box, slice(int(along[0]), int(along[-1]) + 1))


def _in_words(marks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as integers of eight bytes, if lines consist of whole ones."""
    whole = marks.strides[-1] == marks.itemsize and marks.shape[-1] * marks.itemsize % 8 == 0
    return marks.view(np.uint64) if whole else marks


@dataclass(frozen=True, eq=False)
class Geometry:
    """Positions of a volume's voxels.

    Attributes:
        shape: Voxels along (D, H, W).
        affine_mm: (4, 4) float64; maps the array index (d, h, w, 1) of a voxel's centre to LPS coordinates in mm
            (DICOM PS3.3 C.7.6.2.1.1, with the columns ordered for the array).
    """

    shape: Size3
    affine_mm: FloatArray

    def __post_init__(self) -> None:
        affine = np.array(self.affine_mm, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine)) < 1e-12:
            raise ValueError("affine_mm must be an invertible (4, 4) matrix of finite numbers")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_mm", affine)

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Distance between neighbouring voxel centres along (D, H, W), in mm."""
        d, h, w = np.linalg.norm(self.affine_mm[:3, :3], axis=0)
        return float(d), float(h), float(w)

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres (also right for a sheared grid)."""
        return float(abs(np.linalg.det(self.affine_mm[:3, :3]))) / 1000.0

    @property
    def directions(self) -> FloatArray:
        """(3, 3) float64: the unit direction in LPS of each array axis, one per column."""
        columns: FloatArray = self.affine_mm[:3, :3] / np.asarray(self.spacing_mm)
        return columns

    @property
    def tilt_degrees(self) -> float:
        """Angle between the slices' normal and the step from slice to slice: 0 for a right-angled grid."""
        normal = np.cross(self.affine_mm[:3, 1], self.affine_mm[:3, 2])
        step = self.affine_mm[:3, 0]
        along = abs(float(step @ normal)) / float(np.linalg.norm(normal))
        beside = float(np.sqrt(max(float(step @ step) - along**2, 0.0)))
        return float(np.degrees(np.arctan2(beside, along)))

    @property
    def is_tilted(self) -> bool:
        """Whether slices are displaced by more than 0.11 degrees, which is 0.8 mm in 400 mm of body."""
        return bool(self.tilt_degrees > np.degrees(2e-3))

    @property
    def is_orthogonal(self) -> bool:
        """Whether the array axes are at right angles to within 0.06 degrees."""
        gram = self.directions.T @ self.directions
        return bool(np.abs(gram - np.eye(3)).max() < 1e-3)

    def world_from_index(self, index: npt.ArrayLike) -> FloatArray:
        """LPS coordinates in mm of array indices.

        Args:
            index: (..., 3) indices (d, h, w); fractions are allowed.

        Returns:
            (..., 3) float64 (x, y, z) in mm.
        """
        points: FloatArray = np.asarray(index, dtype=np.float64) @ self.affine_mm[:3, :3].T + self.affine_mm[:3, 3]
        return points


@dataclass(frozen=True, eq=False)
class Volume:
    """A CT volume.

    Attributes:
        array: (D, H, W) int16 or float32, in HU, C-contiguous.
        geometry: Position of the voxels; its shape equals the array's.
        padding: (D, H, W) bool, true where the scanner wrote padding (those voxels are `PADDING_HU`); None if nowhere.
    """

    array: npt.NDArray[Any]
    geometry: Geometry
    padding: npt.NDArray[np.bool_] | None = field(default=None)

    def __post_init__(self) -> None:
        if self.array.shape != self.geometry.shape:
            raise ValueError(f"array {self.array.shape} and geometry {self.geometry.shape} differ in shape")
        if self.array.dtype not in (np.dtype(np.int16), np.dtype(np.float32)):
            raise ValueError(f"a volume is int16 or float32, not {self.array.dtype}")
        if self.padding is not None and self.padding.shape != self.array.shape:
            raise ValueError("padding and array differ in shape")
