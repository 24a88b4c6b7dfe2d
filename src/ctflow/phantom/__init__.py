"""A synthetic chest CT with tumours, and its truth; the same seed draws the same phantom."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.phantom.anatomy import Anatomy, anatomy_from_patient, great_vessels, smooth_noise
from ctflow.phantom.grid import Box, Field, FloatVolume, Grid
from ctflow.phantom.paint import Tubes, coverage, fill, paint_tubes
from ctflow.phantom.patient import (
    AIR,
    CARTILAGE,
    CORTICAL,
    FAT,
    LIVER,
    MUSCLE,
    SKIN,
    SPLEEN,
    Patient,
    patient_from_rng,
)
from ctflow.phantom.scanner import scan, scanner_from_rng
from ctflow.phantom.skeleton import Skeleton, skeleton_from_patient
from ctflow.phantom.trees import Trees, trees_from_lungs
from ctflow.phantom.tumours import MOST, Labels, Tumour, draw_mimics, draw_tumours, plans_from_rng
from ctflow.volume import Size3, Volume

SMALLEST: Size3 = (16, 32, 32)
LARGEST_VOXELS = 2**29  # 1 GB as int16
CHEST_MM = 300.0  # from above the apices to the upper abdomen
_WIDTH_MM = 358.0  # a field of view that large patients fill: 3 windows of 96 voxels of 1.5 mm
_SLAB = 16  # slices painted at once: large enough for numpy, small enough for the processor's cache


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT and its truth.

    Attributes:
        volume: int16 HU.
        labels: (D, H, W) uint8: 1 is tumour.
        tumours: One entry each.
        numbers: (D, H, W) uint8: which tumour, counted from 1 as in `tumours`.
    """

    volume: Volume
    labels: Labels
    tumours: tuple[Tumour, ...]
    numbers: Labels


def phantom_from_seed(seed: int, shape: Size3 = (160, 256, 256), *, tumours: int | None = None) -> Phantom:
    """Draw a chest of about 340 x 240 x 300 mm.

    Args:
        seed: Any non-negative integer; draws the anatomy, the tumours, the scanner and the noise.
        shape: Voxels along (D, H, W), each at least `SMALLEST`, at most `LARGEST_VOXELS` together. Slices are at most
            2.5 mm apart, so fewer than 120 show a part of the chest.
        tumours: How many, 0 to 5; None draws that too. With three or more, one is 6 to 10 mm, and at least one sits on
            the pleura and one on a vessel.

    Returns:
        The phantom: int16 HU, head first, supine, axial slices.

    Raises:
        ValueError: The shape is too small or too large, the seed negative, or the number of tumours out of range.
    """
    if any(n < least for n, least in zip(shape, SMALLEST, strict=True)) or int(np.prod(shape)) > LARGEST_VOXELS:
        raise ValueError(f"a phantom's shape is at least {SMALLEST} and at most {LARGEST_VOXELS} voxels, not {shape}")
    if tumours is not None and not 0 <= tumours <= MOST:
        raise ValueError(f"a phantom has 0 to {MOST} tumours, not {tumours}")
    # One stream for each part: another number of tumours leaves anatomy and noise as they are.
    streams = [np.random.default_rng([seed, part]) for part in range(5)]
    grid = _grid_from_shape(shape)
    edge_mm = max(1.0, 0.75 * grid.spacing_mm[1])
    patient, scanner = patient_from_rng(streams[0]), scanner_from_rng(streams[1])
    vessels = great_vessels(patient)
    anatomy = anatomy_from_patient(streams[0], patient, grid, vessels)
    trees = trees_from_lungs(streams[2], patient, anatomy.lung)
    hu, skin = _draw_tissues(streams[0], grid, patient, anatomy, edge_mm)
    _draw_tubes(hu, grid, patient, anatomy, Parts(vessels, trees, skeleton_from_patient(patient)), edge_mm)
    count = int(streams[3].integers(0, MOST + 1)) if tumours is None else tumours
    found, numbers = draw_tumours(
        streams[3],
        hu,
        grid,
        anatomy.lung,
        trees.arteries,
        plans_from_rng(streams[3], count),
        value=_tumour_value(patient),
        edge_mm=edge_mm,
    )
    draw_mimics(streams[2], hu, grid, anatomy.lung, edge_mm, numbers)
    scan(streams[4], hu, grid, scanner, skin)
    np.rint(hu, out=hu)
    array = np.clip(hu, -1024, 3071, out=hu).astype(np.int16)
    return Phantom(Volume(array, grid.geometry), (numbers > 0).astype(np.uint8), found, numbers)


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything that is drawn as tubes."""

    vessels: Tubes
    trees: Trees
    skeleton: Skeleton


def _tumour_value(patient: Patient) -> float:
    """Tumours take up some contrast medium."""
    return 34.0 + 0.25 * max(0.0, patient.blood - 45.0)


def _grid_from_shape(shape: Size3) -> Grid:
    across = _WIDTH_MM / min(shape[1:])
    return Grid(shape, (min(2.5, CHEST_MM / shape[0]), across, across))


def _draw_tissues(
    rng: np.random.Generator, grid: Grid, patient: Patient, anatomy: Anatomy, edge_mm: float
) -> tuple[FloatVolume, FloatVolume]:
    """HU of everything that is not a tube, and the distance to the skin on a coarser raster."""
    hu = np.empty(grid.shape, np.float32)
    texture = _texture(rng, grid)
    skin = []
    for first in range(0, grid.shape[0], _SLAB):
        rows = slice(first, min(first + _SLAB, grid.shape[0]))
        box = rows, slice(0, grid.shape[1]), slice(0, grid.shape[2])
        hu[rows] = _slab(patient, anatomy, texture, box, edge_mm)
        skin.append(anatomy.skin.in_box(box)[:, ::4, ::4])
    return hu, np.concatenate(skin)


def _texture(rng: np.random.Generator, grid: Grid) -> Field:
    """Fine texture of unit deviation: vessels and septa too small to be drawn, marrow."""
    middle = grid.coarse(2.0)
    return Field(smooth_noise(rng, middle, 2.6), middle, grid)


def _slab(patient: Patient, anatomy: Anatomy, texture: Field, box: Box, edge_mm: float) -> FloatVolume:
    """HU of a few slices, from the outside in."""

    def distance(name: str) -> FloatVolume:
        field: Field = getattr(anatomy, name)
        return field.in_box(box)

    fine = texture.in_box(box)
    table, skin = distance("table"), distance("skin")
    hu = np.full(skin.shape, AIR, np.float32)
    fill(hu, table, -930.0, 1.5)
    fill(hu, np.abs(table + 1.2) - 1.2, -300.0, 1.5)
    fill(hu, skin, SKIN, edge_mm)
    fill(hu, skin + 1.8, FAT + 5 * fine, edge_mm)
    fill(hu, distance("muscle"), MUSCLE + 4 * fine - distance("streaks") * (MUSCLE - FAT), edge_mm + 0.5)
    fill(hu, distance("cavity") + 2.5, FAT + 15.0 + 6 * fine, edge_mm)
    for name, value in (("liver", LIVER), ("spleen", SPLEEN), ("stomach", 28.0)):
        fill(hu, distance(name), value + 0.25 * (patient.blood - 45) * (name != "stomach") + 3 * fine, edge_mm)
    fill(hu, distance("gas"), AIR + 20, edge_mm)
    heart = distance("heart")
    fill(hu, distance("pericardium"), FAT + 20, edge_mm)
    fill(hu, heart, 42.0 + 0.35 * (patient.blood - 45), edge_mm)
    fill(hu, distance("chambers"), patient.blood, edge_mm + 2)
    lung = distance("lung")
    fill(hu, lung, distance("tissue") + 16 * fine, edge_mm)
    fissure = np.maximum(np.abs(distance("fissure")) - 0.3, lung + 1)
    hu += np.float32(0.22) * coverage(fissure, edge_mm) * (0 - hu)
    for name in ("vertebrae", "sternum", "scapulae"):
        bone = distance(name)
        fill(hu, bone, CORTICAL - 150 * (name == "vertebrae"), edge_mm)
        fill(hu, bone + 1.6, patient.spongy + 35 * fine, edge_mm)
    fill(hu, distance("canal"), 22.0, edge_mm)
    return hu


def _draw_tubes(hu: FloatVolume, grid: Grid, patient: Patient, anatomy: Anatomy, parts: Parts, edge_mm: float) -> None:
    """Great vessels, skeleton, and the trees of the lungs, in place."""
    whole = slice(0, grid.shape[0]), slice(0, grid.shape[1]), slice(0, grid.shape[2])
    paint_tubes(hu, grid, parts.vessels, patient.blood, edge_mm)
    paint_tubes(hu, grid, parts.skeleton.cartilage, CARTILAGE, edge_mm)
    paint_tubes(hu, grid, parts.skeleton.bones, CORTICAL, edge_mm)
    _draw_marrow(hu, grid, parts.skeleton.bones, patient, edge_mm)
    near = coverage(anatomy.lung.in_box(whole) - 6, 4.0)
    trees = parts.trees
    paint_tubes(hu, grid, trees.trachea.wider(1.3), 10.0, edge_mm)
    paint_tubes(hu, grid, trees.airways.wider(0.9), -60.0, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.arteries, patient.blood, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.veins, patient.blood, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.airways, AIR + 15, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.trachea, AIR + 5, edge_mm)


def _draw_marrow(hu: FloatVolume, grid: Grid, bones: Tubes, patient: Patient, edge_mm: float) -> None:
    """Spongy bone inside the cortical shell of ribs and processes."""
    inner = bones.wider(-1.7)
    box_free = inner.chosen(inner.radii_mm.min(axis=1) > 0.8)
    share = np.zeros_like(hu)
    paint_tubes(share, grid, box_free, 1.0, edge_mm)
    hu += share * (np.float32(patient.spongy) - hu)
