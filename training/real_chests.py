"""Real CTs as backgrounds: cubic voxels, usable boxes, and matching noise and slice thickness for insertions."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from backgrounds import Background, load_backgrounds, read_catalogue
from lungs import lung_distance
from scipy import ndimage

from ctflow.core.volume import Box, Geometry, Size3, Volume
from ctflow.phantom.grid import FloatVolume

SPACING_MM = 1.5  # the model's
CLEAR_MM = 30.0
SMALLEST_BOX_MM = 110.0
Bounds = tuple[tuple[int, int], ...]  # (first, last excluded) of each axis


def prepare_background(index: int, name: str, volume: Volume, lesions_mm: Sequence[npt.NDArray[Any]]) -> dict[str, Any]:
    """A background on cubic voxels, head first and supine, with the boxes of its lesions in voxels.

    Args:
        index: Its position in the list, a part of the seed.
        name: Of its cases.
        volume: As read.
        lesions_mm: (2, 3) LPS corners each.
    """
    hu, to_index = on_cubic_grid(volume)
    lesions = []
    for corners in lesions_mm:
        x, y, z = np.array(np.meshgrid(*np.asarray(corners, dtype=float).T)).reshape(3, -1)
        index_of = to_index @ np.stack([x, y, z, np.ones_like(x)])
        lesions.append(np.stack([np.floor(index_of[:3].min(axis=1)), np.ceil(index_of[:3].max(axis=1)) + 1], axis=1))
    return {
        "index": index,
        "name": name,
        "hu": np.rint(hu).astype(np.int16),
        "thickness_mm": volume.geometry.spacing_mm[0],
        "lesions": np.array(lesions, int).reshape(-1, 3, 2),
        "flip": not lesions,  # mirroring would move a lesion
    }


def read_backgrounds(folder: Path, use: str, processes: int) -> list[dict[str, Any]]:
    """Each background from `prepare_background`, now or earlier (`--prepare`).

    Args:
        folder: As checked by training/backgrounds.py, or as written by `--prepare`.
        use: "train", "validation" or "held-out".
        processes: Number of processes.

    Raises:
        ValueError: A CT is missing, or differs from the catalogue.
    """
    if any(folder.glob("*.npz")):
        return [_prepared(folder, entry) for entry in read_catalogue() if entry.use == use]
    found = list(load_backgrounds(folder, use))
    jobs = [
        (n, entry.name, volume, [lesion.lps_mm for lesion in entry.lesions]) for n, (entry, volume) in enumerate(found)
    ]
    with multiprocessing.Pool(processes) as pool:
        prepared = pool.starmap(prepare_background, jobs, chunksize=1)
    return [{**background, "entry": repr(entry)} for background, (entry, _) in zip(prepared, found, strict=True)]


def _prepared(folder: Path, entry: Background) -> dict[str, Any]:
    """The CT stored by `--prepare`, if its use, lesions and digest in the catalogue are unchanged."""
    path = folder / f"{entry.use}-{entry.name}.npz"
    if not path.exists():
        raise ValueError(f"{path} is missing: prepare the backgrounds with training/make_set.py --prepare")
    with np.load(path) as stored:
        background = dict(stored)
    if str(background.get("entry")) != repr(entry):
        raise ValueError(f"{path} was prepared from another entry of the catalogue: prepare the backgrounds again")
    return background


def lung_of_background(background: dict[str, Any]) -> FloatVolume:
    """`lung_distance` of a background, in half precision: a thirtieth of a millimetre at 30 mm."""
    return lung_distance(background["hu"].astype(np.float32), (SPACING_MM,) * 3).astype(np.float16)


def on_cubic_grid(volume: Volume) -> tuple[FloatVolume, npt.NDArray[Any]]:
    """Linear interpolation to `SPACING_MM` along superior, posterior and left; HU, and (4, 4) LPS mm to its index."""
    shape, grid_to_world = cubic_grid(volume.geometry)
    to_source = np.linalg.inv(volume.geometry.affine_mm) @ grid_to_world
    hu = ndimage.affine_transform(
        volume.array.astype(np.float32), to_source[:3, :3], to_source[:3, 3], shape, order=1, mode="nearest"
    )
    return hu, np.linalg.inv(grid_to_world)


def cubic_grid(geometry: Geometry) -> tuple[Size3, npt.NDArray[Any]]:
    """Voxels, and (4, 4) index to LPS mm, of the grid of `SPACING_MM` that covers another."""
    affine = geometry.affine_mm
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in geometry.shape])).reshape(3, -1)
    world = affine[:3, :3] @ corners + affine[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    depth, height, width = (int((b - a) / SPACING_MM) + 1 for a, b in zip(low[::-1], high[::-1], strict=True))
    grid_to_world = np.zeros((4, 4))
    grid_to_world[2, 0] = grid_to_world[1, 1] = grid_to_world[0, 2] = SPACING_MM
    grid_to_world[:3, 3], grid_to_world[3, 3] = low, 1.0
    return (depth, height, width), grid_to_world


def boxes_clear_of(
    lesions: Sequence[npt.NDArray[Any]] | npt.NDArray[Any], shape: tuple[int, ...], spacing_mm: float
) -> list[Box]:
    """Large boxes at least `CLEAR_MM` from every lesion.

    Args:
        lesions: Bounding boxes, (3, 2) voxels each, the second bound excluded.
        shape: Voxels of the volume (D, H, W).
        spacing_mm: Of its cubic voxels.

    Returns:
        The largest boxes before and behind each lesion on each axis, cut again for each further lesion; none is smaller
        than `SMALLEST_BOX_MM` on a side or contained in another.
    """
    away = int(np.ceil(CLEAR_MM / spacing_mm)) + 1
    boxes = [tuple((0, n) for n in shape)]
    for lesion in lesions:
        low, high = lesion[:, 0] - away, lesion[:, 1] + away
        boxes = [part for box in boxes for part in _around(box, low, high)]
        boxes = [box for box in boxes if all((b - a) * spacing_mm >= SMALLEST_BOX_MM for a, b in box)]
        boxes = [box for n, box in enumerate(boxes) if not any(_within(box, other) for other in boxes[:n])]
    return [(slice(*box[0]), slice(*box[1]), slice(*box[2])) for box in boxes]


def _around(box: Bounds, low: npt.NDArray[Any], high: npt.NDArray[Any]) -> list[Bounds]:
    """The box if it is clear of the forbidden one, otherwise its parts before and behind that on each axis."""
    if any(
        b <= forbidden_a or a >= forbidden_b for (a, b), forbidden_a, forbidden_b in zip(box, low, high, strict=True)
    ):
        return [box]
    parts = []
    for axis, (a, b) in enumerate(box):
        for start, stop in ((a, int(low[axis])), (int(high[axis]), b)):
            if start < stop:
                parts.append((*box[:axis], (start, stop), *box[axis + 1 :]))
    return sorted(parts, key=lambda part: -int(np.prod([b - a for a, b in part])))


def _within(box: Bounds, other: Bounds) -> bool:
    return all(c <= a and b <= d for (a, b), (c, d) in zip(box, other, strict=True))


def noise_hu(hu: FloatVolume) -> float:
    """Standard deviation of noise in soft tissue: the part that a 3 x 3 median removes, corrected for the rest.

    The deviation is that of a normal distribution with the same median of absolute values, so edges do not count.
    """
    slices = hu[:: max(1, len(hu) // 24)]
    smooth = ndimage.median_filter(slices, (1, 3, 3))
    soft = (smooth > 0) & (smooth < 100)
    return float(1.4826 * 1.2 * np.median(np.abs(slices - smooth)[soft])) if soft.any() else 15.0


def as_acquired(rng: np.random.Generator, before: FloatVolume, drawn: FloatVolume, thickness_mm: float) -> FloatVolume:
    """Give the drawn content the real slices' thickness and the real image's noise."""
    change = drawn - before
    if thickness_mm > SPACING_MM:
        change = ndimage.uniform_filter1d(change, max(1, round(thickness_mm / SPACING_MM)), axis=0)
    noise = ndimage.gaussian_filter(rng.standard_normal(drawn.shape, dtype=np.float32), 0.6)
    noise *= np.float32(noise_hu(before) / noise.std())
    replaced = np.clip(np.abs(change) / 300, 0, 1)  # where real tissue and its noise were painted over
    hu: FloatVolume = before + change + replaced * noise
    return hu
