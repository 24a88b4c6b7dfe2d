"""Make the training set of the demonstration model: phantoms, synthetic tumours in real CTs, and drawn ones.

    python training/make_set.py DIR --phantoms 220 --varied 120 --backgrounds FOLDER --insertions 9
    python training/make_set.py DIR --phantoms 24 --shape 300,512,512
    python training/make_set.py DIR --drawn CASES --truth-roi 'GTV*' --insertions 3

Writes DIR/<name>/{image,label}.nii, as configs/train.json reads them. A label determines how often windows are drawn
around a voxel: 1 to 5 is the number of a tumour, so that small tumours are drawn as often as large ones; 6 marks what
looks like a tumour (vessels, scars, consolidation), 7 the rest of the body near the lungs, 8 everything outside the
body, 0 the rest. train.json draws windows around each label and then treats 6 to 8 as background.

No training case contains anything within 30 mm of a lesion that is annotated in a background: each background is cut
into boxes that exclude these margins.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from acquisition import Sample, acquire
from backgrounds import USES
from drawn import read_drawn
from lungs import coarse_lung_distance, vessels_of
from mimics import draw_lung_disease
from real_chests import CLEAR_MM, SPACING_MM, as_acquired, boxes_clear_of, lung_of_background, read_backgrounds

from ctflow.core.volume import Labels, Size3
from ctflow.phantom import phantom_from_seed
from ctflow.phantom.body.tumours import draw_mimics, draw_tumours, plans_from_rng
from ctflow.phantom.grid import Field, FloatVolume, Grid
from ctflow.window.find_body import find_body, mask_of_body

# First seed; 1000-1019 and 2000-2009 are for evaluation, 3000-3999 for validation: never drawn.
FIRST_SEED = 100_000
# From thick to thin slices; a model's input is resampled to its own spacing.
SHAPES: tuple[Size3, ...] = ((160, 256, 256), (160, 256, 256), (200, 320, 320), (130, 300, 300), (240, 384, 384))
MOST_TUMOURS = 5
MIMIC, NEAR, OUTSIDE, EXCLUDED = 6, 7, 8, 9
_NEAR_MM = 35.0
# Prepared once; the processes that make cases fork from this one.
_backgrounds: list[dict[str, Any]] = []
_drawn: list[dict[str, Any]] = []


def write_case(folder: Path, sample: Sample) -> None:
    """Write image.nii (int16 HU) and label.nii (uint8), in RAS as NIfTI requires."""
    folder.mkdir(parents=True)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ sample.affine_lps
    hu = np.clip(np.rint(sample.hu), -3024, 3071).astype(np.int16)
    nib.save(nib.Nifti1Image(hu, affine), folder / "image.nii")
    nib.save(nib.Nifti1Image(sample.labels, affine), folder / "label.nii")


def make_phantom(folder: Path, seed: int, shape: Size3, varied: bool) -> None:
    """Make a phantom of `shape` (D, H, W) voxels; every tenth has no tumour."""
    rng = np.random.default_rng([seed, 99])
    count = 0 if seed % 10 == 9 else int(rng.integers(2, 6))
    phantom = phantom_from_seed(seed, shape, tumours=count, varied=varied)
    hu = phantom.volume.array.astype(np.float32)
    spacing = phantom.volume.geometry.spacing_mm
    labels = with_places(hu, phantom.numbers, spacing, coarse_lung_distance(hu, spacing))
    sample = Sample(hu, labels, spacing)
    if varied:
        sample = acquire(rng, sample, native_mm=spacing[0])
    write_case(folder / f"phantom-{seed}", sample)


def with_places(hu: FloatVolume, numbers: Labels, spacing_mm: tuple[float, float, float], lung: FloatVolume) -> Labels:
    """The numbers of the tumours, and the other places for windows (see the module)."""
    labels = np.zeros(hu.shape, np.uint8)
    labels[lung < _NEAR_MM] = NEAR
    body = find_body(torch.from_numpy(np.ascontiguousarray(hu)), spacing_mm)
    if body is not None:
        labels[~mask_of_body(body, torch.device("cpu")).mask_of_slices(slice(0, len(hu))).numpy()] = OUTSIDE
    labels[(lung < 2) & (hu > -400)] = MIMIC
    labels[numbers > 0] = numbers[numbers > 0]
    return labels


def make_insertion(folder: Path, number: int, which: int) -> None:
    """Insert tumours and mimics into a real CT, cut into boxes clear of its own lesions.

    Args:
        folder: Of the set.
        number: Of this insertion.
        which: Index into `_backgrounds`.
    """
    background = _backgrounds[which]
    rng = np.random.default_rng([FIRST_SEED, number, int(background["index"])])
    before = background["hu"].astype(np.float32)
    hu, grid, lung = before.copy(), Grid(before.shape, (SPACING_MM,) * 3), background["lung"].astype(np.float32)
    numbers = np.zeros(hu.shape, np.uint8)
    field = Field(lung, grid, grid)
    disease = numbers
    if number % 4 and (lung < -8).any():  # every fourth is unchanged: real anatomy is not a tumour
        plans = plans_from_rng(rng, int(rng.integers(2, 6)))
        value, edge = rng.uniform(5, 75), rng.uniform(1.4, 2.6)
        vessels = vessels_of(before, lung, grid, rng)
        _, numbers = draw_tumours(rng, hu, grid, field, vessels, plans, value=value, edge_mm=edge)
        draw_mimics(rng, hu, grid, field, edge, numbers)
        disease = draw_lung_disease(rng, hu, grid, field, numbers)
        hu = as_acquired(rng, before, hu, background["thickness_mm"])
    labels = with_places(hu, numbers, grid.spacing_mm, lung)
    labels[(disease > 0) & (numbers == 0)] = MIMIC
    if background["flip"] and rng.random() < 0.5:
        hu, labels = hu[:, :, ::-1], labels[:, :, ::-1]
    for index, box in enumerate(boxes_clear_of(background["lesions"], hu.shape, SPACING_MM)):
        d, h, w = box
        part = Sample(hu[d, h, w], labels[d, h, w], grid.spacing_mm)
        name = f"{background['name']}-{number:03d}-{index}"
        write_case(folder / name, acquire(rng, part, native_mm=background["thickness_mm"]))


def make_drawn(folder: Path, number: int, which: int) -> None:
    """Another acquisition of a CT whose lesions are drawn: that of `number` 0 is its own.

    Args:
        folder: Of the set.
        number: Of this acquisition.
        which: Index into `_drawn`.
    """
    case = _drawn[which]
    hu, spacing = case["hu"].astype(np.float32), (SPACING_MM,) * 3
    sample = Sample(hu, with_places(hu, case["numbers"], spacing, lung_of_background(case)), spacing)
    if number:
        rng = np.random.default_rng([FIRST_SEED, number, which])
        sample = acquire(rng, sample, native_mm=case["thickness_mm"])
    write_case(folder / f"{case['name']}-{number:03d}", sample)


def write_as_it_is(folder: Path, which: int) -> None:
    """Write a whole background for validation: nothing added, 30 mm around its lesions labelled as excluded."""
    background = _backgrounds[which]
    hu = background["hu"].astype(np.float32)
    labels = np.zeros(hu.shape, np.uint8)
    away = int(np.ceil(CLEAR_MM / SPACING_MM))
    for lesion in background["lesions"]:
        low, high = np.maximum(lesion[:, 0] - away, 0), np.maximum(lesion[:, 1] + away, 0)
        labels[low[0] : high[0], low[1] : high[1], low[2] : high[2]] = EXCLUDED
    write_case(folder / background["name"], Sample(hu, labels, (SPACING_MM,) * 3))


def shape_from_text(text: str) -> Size3:
    """Parse three whole numbers separated by commas, "D,H,W".

    Raises:
        ValueError: It is anything else.
    """
    depth, height, width = (int(part) for part in text.split(","))
    return depth, height, width


Job = tuple[Callable[..., None], tuple[Any, ...]]


def jobs_from_words(words: argparse.Namespace) -> list[Job]:
    """Every case to make, real ones first: they take longest."""
    shapes = (words.shape,) if words.shape else SHAPES
    real = range(len(_backgrounds))
    jobs: list[Job] = [(make_insertion, (words.folder, n, k)) for n in range(words.insertions) for k in real]
    if not words.insertions:
        jobs = [(write_as_it_is, (words.folder, k)) for k in real]
    jobs += [(make_drawn, (words.folder, n, k)) for n in range(max(words.insertions, 1)) for k in range(len(_drawn))]
    for n in range(words.phantoms + words.varied):
        varied = n >= words.phantoms
        jobs.append((make_phantom, (words.folder, words.first_seed + n, shapes[n % len(shapes)], varied)))
    return jobs


def parser_of_words() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--phantoms", type=int, default=0, help="number of plain phantoms")
    parser.add_argument("--varied", type=int, default=0, help="number of phantoms that vary as real scans do")
    parser.add_argument("--backgrounds", type=Path, help="folder of real CTs (see training/backgrounds.py)")
    parser.add_argument("--use", default="train", choices=USES, help="use of the real CTs")
    parser.add_argument(
        "--drawn", type=Path, help="folder of cases with lesions that somebody drew: ct/ and truth.dcm, SEG or RTSTRUCT"
    )
    parser.add_argument(
        "--truth-roi",
        action="append",
        default=[],
        metavar="NAME",
        help="region of an RTSTRUCT, or a pattern; repeatable",
    )
    parser.add_argument("--insertions", type=int, default=20, help="cases per real CT; 0 writes it unchanged")
    parser.add_argument("--prepare", action="store_true", help="only resample the real CTs and store them in DIR")
    parser.add_argument(
        "--first-seed", type=int, default=FIRST_SEED, help="seed of the first phantom; 3000 for validation"
    )
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument(
        "--shape", type=shape_from_text, metavar="D,H,W", help="voxels of every phantom (default: mixed)"
    )
    return parser


def main() -> None:
    """Make the set."""
    parser = parser_of_words()
    words = parser.parse_args()
    if words.folder.exists():
        parser.error(f"{words.folder} exists: name a folder that does not, so that no case is another set's")
    if words.prepare and not words.backgrounds:
        parser.error("--prepare resamples the CTs of a folder: name it with --backgrounds")
    torch.set_num_threads(1)
    try:
        if words.backgrounds:
            _backgrounds[:] = read_backgrounds(words.backgrounds, words.use, words.processes)
        if words.drawn:
            _drawn[:] = read_drawn(words.drawn, words.truth_roi, MOST_TUMOURS)
    except ValueError as error:
        parser.error(str(error))
    if words.prepare:
        words.folder.mkdir(parents=True)
        for background in _backgrounds:
            np.savez_compressed(words.folder / f"{words.use}-{background['name']}.npz", **background)
        return
    with multiprocessing.Pool(words.processes) as pool:
        for background, lung in zip(_backgrounds, pool.map(lung_of_background, _backgrounds, chunksize=1), strict=True):
            background["lung"] = lung
    with multiprocessing.Pool(words.processes) as pool:  # started now: its processes have the backgrounds
        for job in [pool.apply_async(function, arguments) for function, arguments in jobs_from_words(words)]:
            job.get()
    print(len(list(words.folder.iterdir())), "cases")


if __name__ == "__main__":
    main()
