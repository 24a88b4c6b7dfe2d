"""A CT and its marks for a browser: one JPEG per slice, and runs of marked voxels."""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
from PIL import Image

from ctflow.core.processes import usable_cpus
from ctflow.report.views import PLANES, Grey, Oriented, picture_of_slice

# One byte per voxel for every window: steps of 8 HU in lung, 4 HU in soft tissue, 27 HU in bone and 250 HU in metal.
_KNOTS_HU, _KNOTS = (-1024, -160, 240, 1300, 3071), (0, 108, 208, 248, 255)
MOST_VOXELS = 2**28  # a browser holds two bytes of each
MOST_BYTES = 18_000_000  # of all JPEGs; in base64 a third more
_QUALITIES = (85, 75, 60, 45, 30, 15)
_SAMPLES = 12  # slices tried before a quality is chosen
_AXIAL = PLANES[0]


def hu_of_codes() -> list[float]:
    """The HU of each of a picture's 256 codes."""
    return [round(float(hu), 1) for hu in np.interp(np.arange(256), _KNOTS, _KNOTS_HU)]


def steps_for(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[int, int, int]:
    """Step between shown voxels along each axis.

    Args:
        shape: Voxels along each axis.
        spacing_mm: Their distance along each axis.

    Returns:
        1 for each axis up to `MOST_VOXELS`; above, the axis with the closest shown voxels is halved until they fit.
    """
    steps = [1, 1, 1]
    while np.prod([-(-count // step) for count, step in zip(shape, steps, strict=True)]) > MOST_VOXELS:
        shown_mm = [mm * step for mm, step in zip(spacing_mm, steps, strict=True)]
        steps[int(np.argmin(shown_mm))] *= 2
    return steps[0], steps[1], steps[2]


class Slices:
    """The axial slices of a volume as codes, (posterior, left), from the lowest to the highest.

    Args:
        oriented: The volume.
        steps: Steps between shown voxels along left, posterior and superior.
    """

    def __init__(self, oriented: Oriented, steps: tuple[int, int, int]) -> None:
        self._hu = oriented.hu[:: steps[0], :: steps[1], :: steps[2]]
        values = np.interp(np.arange(-(2**15), 2**15), _KNOTS_HU, _KNOTS)
        # By the bits of int16: index 0 is 0 HU, and the upper half holds the values below it.
        self._codes = np.roll(np.rint(values).astype(np.uint8), 2**15)

    def __len__(self) -> int:
        return int(self._hu.shape[2])

    def __getitem__(self, index: int) -> Grey:
        picture: npt.NDArray[np.generic] = picture_of_slice(self._hu, _AXIAL, index)
        if picture.dtype != np.int16:
            picture = np.clip(np.rint(picture.astype(np.float32)), -(2**15), 2**15 - 1).astype(np.int16)
        codes: Grey = self._codes.take(picture.view(np.uint16))  # half the time of an index
        return codes


def jpegs_from_slices(slices: Slices, most_bytes: int = MOST_BYTES) -> tuple[list[bytes], int]:
    """Compress every slice.

    Args:
        slices: The codes.
        most_bytes: Most bytes in total; a sample decides on the best quality within them.

    Returns:
        A JPEG each, and their quality (1 to 95).
    """
    sample = [slices[index] for index in np.unique(np.linspace(0, len(slices) - 1, _SAMPLES).astype(int)).tolist()]
    for quality in _QUALITIES:
        expected = sum(len(_jpeg(picture, quality)) for picture in sample) / len(sample) * len(slices)
        if expected <= most_bytes:
            break
    with ThreadPoolExecutor(usable_cpus()) as pool:  # Pillow compresses without the GIL
        return list(pool.map(lambda index: _jpeg(slices[index], quality), range(len(slices)))), quality


def _jpeg(picture: Grey, quality: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, format="JPEG", quality=quality)
    return stream.getvalue()


def runs_from_labels(oriented: Oriented, steps: tuple[int, int, int]) -> bytes:
    """Positions of the label values, in the order of the slices.

    Args:
        oriented: The labels.
        steps: As for `Slices`.

    Returns:
        zlib-compressed little-endian uint32: first voxel, number of voxels and value of every run that is not 0.
    """
    labels = oriented.labels[:: steps[0], :: steps[1], :: steps[2]]
    marked = np.flatnonzero(oriented.areas[2][:: steps[2]])
    runs = [_runs(picture_of_slice(labels, _AXIAL, index), index) for index in marked.tolist()]
    return zlib.compress(np.concatenate([np.zeros((0, 3), "<u4"), *runs]).astype("<u4").tobytes(), 6)


def _runs(picture: Grey, index: int) -> npt.NDArray[np.int64]:
    flat = picture.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    lengths = np.diff(np.append(starts, flat.size))
    runs = np.column_stack([starts + index * flat.size, lengths, flat[starts]])
    marked: npt.NDArray[np.int64] = runs[runs[:, 2] != 0]
    return marked
