"""Draw a chest's tissues from the outside in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.core.volume import Box
from ctflow.phantom.body.anatomy import Anatomy, smooth_noise
from ctflow.phantom.body.patient import AIR, CARTILAGE, CORTICAL, FAT, LIVER, MUSCLE, SKIN, SPLEEN, PhantomPatient
from ctflow.phantom.body.skeleton import Skeleton
from ctflow.phantom.body.trees import Trees
from ctflow.phantom.grid import WHOLE, Field, FloatVolume, Grid
from ctflow.phantom.paint import Tubes, coverage, fill, paint_tubes
from ctflow.phantom.scene.scene import Scene

_SLAB = 16  # slices painted at once: large enough for NumPy, small enough for the CPU cache


@dataclass(frozen=True, eq=False)
class Parts:
    """Everything drawn as tubes."""

    vessels: Tubes
    trees: Trees
    skeleton: Skeleton


def draw_tissues(
    rng: np.random.Generator, grid: Grid, patient: PhantomPatient, anatomy: Anatomy, edge_mm: float, scene: Scene | None
) -> tuple[FloatVolume, FloatVolume]:
    """HU of everything except tubes, and the distance to the skin on a coarser raster.

    Args:
        rng: Draws textures.
        grid: The grid to draw on.
        patient: The patient.
        anatomy: Distances to the tissues.
        edge_mm: Width of edges.
        scene: Additional content of a varied scan; None is a plain chest on its couch.
    """
    hu = np.empty(grid.shape, np.float32)
    texture = _texture(rng, grid)
    skin = []
    for first in range(0, grid.shape[0], _SLAB):
        rows = slice(first, min(first + _SLAB, grid.shape[0]))
        box = rows, slice(0, grid.shape[1]), slice(0, grid.shape[2])
        hu[rows] = _slab(patient, anatomy, texture, box, edge_mm, scene)
        skin.append(anatomy.skin.in_box(box)[:, ::4, ::4])
    return hu, np.concatenate(skin)


def _texture(rng: np.random.Generator, grid: Grid) -> Field:
    """Fine texture of unit standard deviation: vessels and septa too small to draw, marrow."""
    middle = grid.coarse(2.0)
    return Field(smooth_noise(rng, middle, 2.6), middle, grid)


def _slab(
    patient: PhantomPatient, anatomy: Anatomy, texture: Field, box: Box, edge_mm: float, scene: Scene | None
) -> FloatVolume:
    """HU of a few slices, from the outside in."""

    def distance(name: str) -> FloatVolume:
        field: Field = getattr(anatomy, name)
        return field.in_box(box)

    fine = texture.in_box(box)
    skin = distance("skin")
    hu = _couch(distance("table")) if scene is None else scene.surroundings(box)
    fill(hu, skin, SKIN, edge_mm)
    fill(hu, skin + 1.8, FAT + 5 * fine, edge_mm)
    fill(hu, distance("muscle"), MUSCLE + 4 * fine - distance("streaks") * (MUSCLE - FAT), edge_mm + 0.5)
    fill(hu, distance("cavity") + 2.5, FAT + 15.0 + 6 * fine, edge_mm)
    for organ in () if scene is None else scene.organs:
        organ.draw(hu, box, fine, edge_mm)
    for name, value in (("liver", LIVER), ("spleen", SPLEEN), ("stomach", 28.0)):
        fill(hu, distance(name), value + 0.25 * patient.enhancement * (name != "stomach") + 3 * fine, edge_mm)
    fill(hu, distance("gas"), AIR + 20, edge_mm)
    heart = distance("heart")
    fill(hu, distance("pericardium"), FAT + 20, edge_mm)
    fill(hu, heart, 42.0 + 0.35 * patient.enhancement, edge_mm)
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


def _couch(table: FloatVolume) -> FloatVolume:
    """HU of air and the plain phantom's couch."""
    hu = np.full(table.shape, AIR, np.float32)
    fill(hu, table, -930.0, 1.5)
    fill(hu, np.abs(table + 1.2) - 1.2, -300.0, 1.5)
    return hu


def draw_tubes(
    hu: FloatVolume, grid: Grid, patient: PhantomPatient, anatomy: Anatomy, parts: Parts, edge_mm: float
) -> None:
    """Great vessels, skeleton, and the trees of the lungs, in place."""
    paint_tubes(hu, grid, parts.vessels, patient.blood, edge_mm)
    paint_tubes(hu, grid, parts.skeleton.cartilage, CARTILAGE, edge_mm)
    paint_tubes(hu, grid, parts.skeleton.bones, CORTICAL, edge_mm)
    _draw_marrow(hu, grid, parts.skeleton.bones, patient, edge_mm)
    near = coverage(anatomy.lung.in_box(WHOLE) - 6, 4.0)
    trees = parts.trees
    paint_tubes(hu, grid, trees.trachea.wider(1.3), 10.0, edge_mm)
    paint_tubes(hu, grid, trees.airways.wider(0.9), -60.0, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.arteries, patient.blood, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.veins, patient.blood, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.airways, AIR + 15, edge_mm, only_in=near)
    paint_tubes(hu, grid, trees.trachea, AIR + 5, edge_mm)


def _draw_marrow(hu: FloatVolume, grid: Grid, bones: Tubes, patient: PhantomPatient, edge_mm: float) -> None:
    """Spongy bone inside the cortical shell of ribs and processes."""
    inner = bones.wider(-1.7)
    box_free = inner.chosen(inner.radii_mm.min(axis=1) > 0.8)
    share = np.zeros_like(hu)
    paint_tubes(share, grid, box_free, 1.0, edge_mm)
    hu += share * (np.float32(patient.spongy) - hu)
