"""Tumour mimics in a real lung: consolidation, effusion, ground glass, bullae.

A demonstration model trained without them marked 20 ml of a consolidated lobe. A consolidation differs from a tumour in
its visible contents (air-filled bronchi, vessels), in a border that fades or follows a fissure, and in its size; it
is drawn that way. Small ones with a sharp border are not drawn: nothing would distinguish them from a tumour, and a
network trained on both truncated large tumours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.core.volume import Box, Labels
from ctflow.phantom.body.anatomy import smooth_noise
from ctflow.phantom.grid import Field, FloatVolume, Grid
from ctflow.phantom.paint import Points, coverage

_MARGIN_MM = 4.0  # a mimic closer to a tumour is not drawn, so that the truth stays correct


@dataclass(frozen=True, eq=False)
class Chest:
    """The chest to draw into.

    Attributes:
        hu: (D, H, W) HU, changed in place.
        grid: Its grid, z to superior, y to posterior.
        lung: Signed distance to the lungs in mm, negative inside.
        inside: (D, H, W) share of each voxel in the lungs.
        kept: (D, H, W) bool, tumours and their margin.
        drawn: (D, H, W) uint8, 1 where something was drawn.
    """

    hu: FloatVolume
    grid: Grid
    lung: Field
    inside: FloatVolume
    kept: npt.NDArray[np.bool_]
    drawn: Labels

    def free(self, box: Box, share: FloatVolume) -> FloatVolume | None:
        """The part of `share` that lies in the lungs; None if it would reach a tumour."""
        share = share * self.inside[box]
        return None if (self.kept[box] & (share > 0.02)).any() else share


def draw_lung_disease(rng: np.random.Generator, hu: FloatVolume, grid: Grid, lung: Field, tumours: Labels) -> Labels:
    """Draw consolidations, ground glass, effusions and bullae, each in some chests only.

    Args:
        rng: Draws kinds, numbers and positions.
        hu: (D, H, W) HU, changed in place.
        grid: Its grid, z to superior, y to posterior.
        lung: Signed distance to the lungs in mm, negative inside.
        tumours: (D, H, W), which are not changed.

    Returns:
        (D, H, W) uint8, 1 where something was drawn.
    """
    d, h, w = (slice(0, n) for n in hu.shape)
    margin = max(1, round(_MARGIN_MM / grid.spacing_mm[1]))
    kept = ndimage.binary_dilation(tumours > 0, iterations=margin)
    chest = Chest(hu, grid, lung, coverage(lung.in_box((d, h, w)), 2.0), kept, np.zeros(hu.shape, np.uint8))
    for probability, most, draw in (
        (0.4, 2, _consolidation),
        (0.35, 4, _ground_glass),
        (0.2, 1, _effusion),
        (0.25, 6, _bulla),
    ):
        if rng.random() < probability:
            for _ in range(int(rng.integers(1, most + 1))):
                draw(rng, chest)
    return chest.drawn


def _blob(
    rng: np.random.Generator, chest: Chest, size_mm: float, rough: float
) -> tuple[Box, FloatVolume, Points] | None:
    """An irregular ellipsoid anywhere in the lungs: its box, the signed distance in it, and its centre."""
    inside = np.argwhere(chest.lung.coarse_values < -2)
    if not len(inside):
        return None
    index = inside[rng.integers(len(inside))]
    lines = chest.lung.coarse_grid.lines_mm
    centre = np.array([line[n] for line, n in zip(lines, index, strict=True)], dtype=np.float64)
    stretch = rng.uniform(0.6, 1.5, 3)
    reach = size_mm * stretch.max() * (1 + rough) + 4
    box = chest.grid.box_around(centre - reach, centre + reach)
    if box is None:
        return None
    z, y, x = (
        (axis - np.float32(c)) / np.float32(s)
        for axis, c, s in zip(chest.grid.axes_in(box), centre, stretch, strict=True)
    )
    distance = np.sqrt(z**2 + y**2 + x**2) - np.float32(size_mm)
    d, h, w = distance.shape
    small = Grid((d, h, w), chest.grid.spacing_mm)
    coarse = small.coarse(4.0)
    noise = Field(smooth_noise(rng, coarse, float(rng.uniform(4, 12))), coarse, small)
    uneven = noise.in_box((slice(0, d), slice(0, h), slice(0, w)))
    return box, distance + np.float32(rough * size_mm * 0.5) * uneven, centre


def _consolidation(rng: np.random.Generator, chest: Chest) -> None:
    """Draw fluid-filled lung: soft tissue with black airways, and a fading border or a fissure's plane."""
    blob = _blob(rng, chest, float(rng.uniform(14, 45)), float(rng.uniform(0.25, 0.5)))
    if blob is None:
        return
    box, distance, centre = blob
    if rng.random() < 0.5:  # a part of a lobe, bounded by a fissure's plane
        normal = rng.standard_normal(3)
        a, b, c = (np.float32(n) for n in normal / np.linalg.norm(normal))
        z, y, x = (axis - np.float32(at) for axis, at in zip(chest.grid.axes_in(box), centre, strict=True))
        distance = np.maximum(distance, z * a + y * b + x * c - np.float32(rng.uniform(-3, 10)))
    share = chest.free(box, coverage(distance, float(rng.choice([4.0, 8.0, 14.0]))))
    if share is None:
        return
    part = chest.hu[box]
    bronchi = np.clip((np.float32(-905) - ndimage.gaussian_filter(part, 0.5)) / 40, 0, 1)
    bronchi *= np.float32(rng.random() < 0.85)
    value = np.float32(rng.uniform(-60, 70)) + np.float32(rng.uniform(5, 60)) * _grain(rng, part.shape)
    part += share * (1 - bronchi) * (np.maximum(part, value) - part)  # vessels and bone remain
    chest.drawn[box][share > 0.3] = 1


def _ground_glass(rng: np.random.Generator, chest: Chest) -> None:
    """Draw a haze with visible vessels."""
    blob = _blob(rng, chest, float(rng.uniform(6, 30)), float(rng.uniform(0.1, 0.5)))
    share = None if blob is None else chest.free(blob[0], coverage(blob[1], float(rng.uniform(3, 12))))
    if blob is None or share is None:
        return
    part = chest.hu[blob[0]]
    part += share * np.float32(rng.uniform(0.25, 0.6)) * np.clip(-part - 100, 0, None)
    chest.drawn[blob[0]][share > 0.3] = 1


def _effusion(rng: np.random.Generator, chest: Chest) -> None:
    """Draw fluid with a meniscus in the lowest part of one side, and compressed lung above it."""
    rows = np.flatnonzero((chest.inside > 0.5).any(axis=(0, 2)))
    if not len(rows):
        return
    d, h, w = (slice(0, n) for n in chest.hu.shape)
    _, y, x = chest.grid.lines_mm
    one_side = (x * rng.choice([-1.0, 1.0]) > 0).astype(np.float32)[None, None, :]
    climbs = np.float32(0.15) * np.abs(chest.lung.in_box((d, h, w)))
    above = y[rows[-1]] - np.float32(rng.uniform(8, 60)) + climbs - y[None, :, None]
    fluid = chest.free((d, h, w), coverage(above, 2.0) * one_side)
    thickness = np.float32(rng.uniform(0, 6))
    collapsed = chest.free((d, h, w), coverage(np.abs(above - 4) - thickness, 4.0) * one_side)
    if fluid is None or collapsed is None:
        return
    hu = chest.hu
    hu += fluid * (np.float32(rng.uniform(0, 25)) - hu)
    hu += np.float32(0.8) * collapsed * (np.float32(rng.uniform(10, 80)) - hu)
    chest.drawn[(fluid + collapsed) > 0.3] = 1


def _bulla(rng: np.random.Generator, chest: Chest) -> None:
    """Draw an air bubble with a thin wall."""
    blob = _blob(rng, chest, float(rng.uniform(3, 18)), 0.1)
    if blob is None:
        return
    box, distance, _ = blob
    air = chest.free(box, coverage(distance, 1.5))
    wall = chest.free(box, coverage(np.abs(distance - 0.5) - np.float32(rng.uniform(0.1, 0.7)), 1.5))
    if air is None or wall is None:
        return
    part = chest.hu[box]
    part += air * (np.float32(-985) - part)
    part += wall * np.clip(np.float32(-150) - part, 0, None)
    chest.drawn[box][wall > 0.3] = 1


def _grain(rng: np.random.Generator, shape: tuple[int, ...]) -> FloatVolume:
    """Texture of unit standard deviation."""
    grain = ndimage.gaussian_filter(rng.standard_normal(shape, dtype=np.float32), float(rng.uniform(0.7, 2.5)))
    unit: FloatVolume = grain / max(float(grain.std()), 1e-6)
    return unit
