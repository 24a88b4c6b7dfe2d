"""A volume as a radiologist expects to see it: three planes, patient right on the left, anterior and head up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import Geometry, Size3, Volume, marked_lines

COLOURS = (
    (255, 92, 92),
    (92, 200, 255),
    (140, 230, 120),
    (255, 190, 80),
    (210, 140, 255),
    (255, 140, 200),
    (110, 235, 215),
    (225, 225, 110),
    (120, 150, 255),
    (200, 120, 60),
    (60, 170, 120),
    (190, 80, 150),
    (160, 100, 80),
    (120, 190, 200),
    (170, 160, 60),
    (200, 190, 255),
)

Grey = npt.NDArray[np.uint8]
_Counts = npt.NDArray[np.int64]
_Value = TypeVar("_Value", bound=np.generic)


@dataclass(frozen=True)
class Plane:
    """One view: which patient axes run across and down the picture, and the letters at its borders."""

    name: str
    across: int  # patient axis: 0 left, 1 posterior, 2 superior
    down: int
    down_sign: int
    letters: tuple[str, str, str, str]  # left, right, top, bottom of the picture
    position: str

    @property
    def through(self) -> int:
        """The patient axis that neither runs across nor down."""
        return 3 - self.across - self.down


# Patient right on the picture's left, anterior up in axial views, head up in the others.
PLANES = (
    Plane("axial", 0, 1, 1, ("R", "L", "A", "P"), "S"),
    Plane("coronal", 0, 2, -1, ("R", "L", "H", "F"), "P"),
    Plane("sagittal", 1, 2, -1, ("A", "P", "H", "F"), "L"),
)


@dataclass(frozen=True, eq=False)
class Oriented:
    """Views reoriented so that axes 0, 1, 2 run to the patient's left, posterior and superior, by nearest axis.

    Attributes:
        hu: Values.
        labels: Label values.
        geometry: Position of the reoriented arrays.
        areas: Marked voxels of every slice across axis 0, 1 and 2.
        present: The label values that occur, ascending.
        shown: The slices across axis 0, 1 and 2 to show first.
    """

    hu: npt.NDArray[np.generic]
    labels: Grey
    geometry: Geometry
    areas: tuple[_Counts, _Counts, _Counts]
    present: tuple[int, ...]
    shown: tuple[int, int, int]


def oriented_from_volume(volume: Volume, labels: Grey, at: Size3 | None = None) -> Oriented:
    """Reorient a volume and its labels without a copy.

    Args:
        volume: CT in HU.
        labels: (D, H, W) uint8 on the same grid; 0 is background.
        at: Array index (d, h, w) to show first; None takes the middle.
    """
    areas, present = _marked(labels)
    directions = volume.geometry.directions  # one column per array axis
    order = _nearest_axes(directions)
    flips = tuple(axis for axis, source in enumerate(order) if directions[axis, source] < 0)
    hu = np.flip(volume.array.transpose(order), flips)
    turn = np.zeros((4, 4))  # reoriented index -> array index
    turn[3, 3] = 1
    for axis, source in enumerate(order):
        turn[source, axis] = -1 if axis in flips else 1
        turn[source, 3] = hu.shape[axis] - 1 if axis in flips else 0
    left, posterior, superior = (
        areas[source][::-1] if axis in flips else areas[source] for axis, source in enumerate(order)
    )
    geometry = Geometry((hu.shape[0], hu.shape[1], hu.shape[2]), volume.geometry.affine_mm @ turn)
    turned = np.flip(labels.transpose(order), flips)
    first = tuple(count // 2 for count in labels.shape) if at is None else at
    x, y, z = (
        hu.shape[axis] - 1 - first[source] if axis in flips else first[source] for axis, source in enumerate(order)
    )
    return Oriented(hu, turned, geometry, (left, posterior, superior), present, (x, y, z))


def _marked(labels: Grey) -> tuple[tuple[_Counts, _Counts, _Counts], tuple[int, ...]]:
    """Marked voxels of every slice across each array axis, and the label values that occur.

    Slice by slice along the first axis, where the memory is contiguous: reductions over reoriented views take seconds.
    """
    areas = tuple(np.zeros(count, np.int64) for count in labels.shape)
    occurs = np.zeros(256, np.int64)
    lines = marked_lines(labels)
    for index in np.flatnonzero(lines.any(axis=1)).tolist():
        rows = labels[index][lines[index]]
        mask = rows != 0
        areas[0][index] = np.count_nonzero(mask)
        areas[1][lines[index]] += np.count_nonzero(mask, axis=1)
        areas[2][:] += np.count_nonzero(mask, axis=0)
        occurs += np.bincount(rows[mask], minlength=256)
    return (areas[0], areas[1], areas[2]), tuple(np.flatnonzero(occurs).tolist())


def _nearest_axes(directions: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    """For each patient axis (left, posterior, superior) the array axis that runs along it best."""
    strength = np.abs(directions)
    order = [0, 0, 0]
    for _ in range(3):
        patient, axis = np.unravel_index(int(strength.argmax()), strength.shape)
        order[int(patient)] = int(axis)
        strength[patient] = -1
        strength[:, axis] = -1
    return order[0], order[1], order[2]


def picture_of_slice(array: npt.NDArray[_Value], plane: Plane, index: int) -> npt.NDArray[_Value]:
    """One slice of a reoriented array, in viewing orientation.

    Args:
        array: `Oriented.hu` or `Oriented.labels`.
        plane: Which view.
        index: Slice number along `plane.through`.

    Returns:
        (down, across), C-contiguous.
    """
    whole = slice(None)
    picture = array[tuple(index if axis == plane.through else whole for axis in range(3))]
    if plane.across < plane.down:
        picture = picture.T
    picture_of_plane: npt.NDArray[_Value] = np.ascontiguousarray(picture[::-1] if plane.down_sign < 0 else picture)
    return picture_of_plane
