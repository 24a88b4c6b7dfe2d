"""Make the training set of the demonstration model: phantoms, and tumours put into the lung of a real CT.

    python training/make_set.py DIR --phantoms 240 --processes 16 [--background lidc.npz --insertions 48]
    python training/make_set.py DIR --phantoms 24 --shape 300,512,512

Writes DIR/<name>/{image,label}.nii, as configs/train.json reads them; a label is the tumour's number, so that small
ones are sampled as often as large ones. Nothing within 30 mm of the real nodule of the
background ever reaches the disk: each insertion is cut into boxes that keep clear of it.
"""

from __future__ import annotations

import argparse
import multiprocessing
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from ctflow.phantom import phantom_from_seed
from ctflow.phantom.grid import Field, Grid
from ctflow.phantom.paint import Tubes
from ctflow.phantom.tumours import draw_mimics, draw_tumours, plans_from_rng
from ctflow.volume import Size3

# Seeds from here on; 1000-1019 and 2000-2009 are for the evaluation and never drawn.
FIRST_SEED = 100_000
# Voxel sizes from thick slices to thin ones; what a model sees is resampled to its own spacing.
SHAPES: tuple[Size3, ...] = ((160, 256, 256), (160, 256, 256), (200, 320, 320), (130, 300, 300), (240, 384, 384))
CLEAR_MM = 30.0
SMALLEST_BOX_MM = 110.0


def write_case(folder: Path, hu: np.ndarray, labels: np.ndarray, affine_lps: np.ndarray) -> None:
    """Write image.nii (int16 HU) and label.nii (uint8, tumour number or 0), in RAS as NIfTI has it."""
    folder.mkdir(parents=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_lps
    nib.save(nib.Nifti1Image(hu, affine), folder / "image.nii")
    nib.save(nib.Nifti1Image(labels, affine), folder / "label.nii")


def make_phantom(folder: Path, number: int, shape: Size3) -> None:
    """One phantom of `shape` (D, H, W) voxels; every tenth has no tumour."""
    seed = FIRST_SEED + number
    rng = np.random.default_rng([seed, 99])
    count = 0 if number % 10 == 9 else int(rng.integers(2, 6))
    phantom = phantom_from_seed(seed, shape, tumours=count)
    write_case(folder / f"phantom-{seed}", phantom.volume.array, phantom.numbers, phantom.volume.geometry.affine_mm)


def lung_distance(hu: np.ndarray, spacing_mm: float) -> np.ndarray:
    """Signed distance to the lungs of a CT, in mm, negative inside; vessels count as lung."""
    air = ndimage.binary_opening(hu < -450, iterations=1)
    parts, _ = ndimage.label(air)
    faces = np.concatenate([parts[:, 0].ravel(), parts[:, -1].ravel(), parts[:, :, 0].ravel(), parts[:, :, -1].ravel()])
    sizes = np.bincount(parts.ravel())
    sizes[np.unique(faces)] = 0
    sizes[0] = 0
    lungs = np.isin(parts, np.flatnonzero(sizes > 0.05 * sizes.sum()))
    lungs = ndimage.binary_closing(np.pad(lungs, 8), iterations=5)[8:-8, 8:-8, 8:-8]
    outside = ndimage.distance_transform_edt(~lungs, sampling=spacing_mm)
    return (outside - ndimage.distance_transform_edt(lungs, sampling=spacing_mm)).astype(np.float32)


def make_insertion(folder: Path, number: int, background: dict[str, Any]) -> None:
    """Tumours in the real CT, cut into boxes that keep clear of its real nodule."""
    rng = np.random.default_rng([FIRST_SEED, number, 7])
    hu = background["hu"].astype(np.float32)
    spacing = float(background["spacing_mm"])
    grid = Grid(hu.shape, (spacing,) * 3)
    lung = Field(background["lung"], grid, grid)
    none = Tubes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 2)))
    plans = plans_from_rng(rng, int(rng.integers(3, 6)))
    _, numbers = draw_tumours(rng, hu, grid, lung, none, plans, value=rng.uniform(20, 55), edge_mm=1.6)
    draw_mimics(rng, hu, grid, lung, 1.6, numbers)
    affine = grid.geometry.affine_mm
    array = np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
    for index, box in enumerate(boxes_clear_of(background["nodule"], hu.shape, spacing)):
        moved = affine.copy()
        moved[:3, 3] += affine[:3, :3] @ [part.start for part in box]
        write_case(folder / f"real-{number:03d}-{index}", array[box], numbers[box], moved)


def boxes_clear_of(nodule: np.ndarray, shape: tuple[int, ...], spacing_mm: float) -> list[tuple[slice, slice, slice]]:
    """The largest boxes before and behind the nodule on each axis; `nodule` is its bounding box, (3, 2) voxels."""
    away = int(np.ceil(CLEAR_MM / spacing_mm)) + 1
    boxes = []
    for axis in range(3):
        for part in (slice(0, max(0, nodule[axis, 0] - away)), slice(nodule[axis, 1] + away, shape[axis])):
            if (part.stop - part.start) * spacing_mm >= SMALLEST_BOX_MM:
                box = [slice(0, n) for n in shape]
                box[axis] = part
                boxes.append((box[0], box[1], box[2]))
    return boxes


def shape_from_text(text: str) -> Size3:
    """Three whole numbers with commas between them, "D,H,W".

    Raises:
        ValueError: It is anything else.
    """
    depth, height, width = (int(part) for part in text.split(","))
    return depth, height, width


def main() -> None:
    """Make the set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phantoms", type=int, default=240)
    parser.add_argument("--insertions", type=int, default=48)
    parser.add_argument("--background", type=Path, help="made by training/make_background.py")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument(
        "--shape", type=shape_from_text, metavar="D,H,W", help="voxels of every phantom (default: a mixture)"
    )
    words = parser.parse_args()
    shapes = (words.shape,) if words.shape else SHAPES
    jobs: list[tuple[Any, tuple[Any, ...]]] = [
        (make_phantom, (words.folder, n, shapes[n % len(shapes)])) for n in range(words.phantoms)
    ]
    if words.background:
        with np.load(words.background) as stored:
            background = dict(stored)
        background["lung"] = lung_distance(background["hu"], float(background["spacing_mm"]))
        jobs = [(make_insertion, (words.folder, n, background)) for n in range(words.insertions)] + jobs
    with multiprocessing.Pool(words.processes) as pool:
        for job in [pool.apply_async(function, arguments) for function, arguments in jobs]:
            job.get()
    print(len(list(words.folder.iterdir())), "cases")


if __name__ == "__main__":
    main()
