"""Objects on the patient: clothes with folds and fasteners, blankets, electrodes with cables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.core.volume import Box
from ctflow.phantom.body.anatomy import joined, smooth_noise
from ctflow.phantom.grid import Field, FloatVolume, Grid
from ctflow.phantom.paint import Tubes, fill, paint_tubes, tubes_along
from ctflow.phantom.scene.variety import Variety

_EDGE_MM = 1.5
_STEEL = 7000.0


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of cloth: distance to its middle, half its thickness in mm, HU at and between its faces."""

    middle: Field
    half_mm: float
    face: float
    inner: float

    def draw(self, hu: FloatVolume, box: Box) -> None:
        """Draw it into the slices of a box, in place."""
        away = np.abs(self.middle.in_box(box)) - np.float32(self.half_mm)
        fill(hu, away, self.face, _EDGE_MM)
        if self.half_mm > 1.5:
            fill(hu, away + 1.5, self.inner, _EDGE_MM)


def layers_from_rng(
    rng: np.random.Generator, variety: Variety, skin: FloatVolume, coarse: Grid, fine: Grid
) -> list[Layer]:
    """Draw clothes and a blanket, each layer with air under it.

    Args:
        rng: Draws folds and cloths.
        variety: Gives their number.
        skin: Signed distance to the skin on the coarse grid.
        coarse: That grid.
        fine: The grid to draw on.
    """
    layers = []
    gap: FloatVolume = np.zeros(coarse.shape, np.float32)
    z, y, x = coarse.axes
    for _ in range(variety.clothes):
        # Cloth lies flat over long stretches, with folds between them.
        folds = smooth_noise(rng, coarse, rng.uniform(18, 34)) + 0.4 * smooth_noise(rng, coarse, 9.0)
        gap = gap + np.float32(1.5) + np.float32(rng.uniform(4, 11)) * np.clip(folds - rng.uniform(-0.4, 0.6), 0, None)
        under = np.clip((y - 40) / 40, 0, 1)  # the patient's weight presses them flat
        gap = gap * (1 - under) + 1.5 * under
        middle = skin - gap
        end = np.float32(rng.uniform(90, 150))
        if rng.random() < 0.5:  # a neckline
            middle = np.where(np.broadcast_to(z > end, coarse.shape), np.float32(30.0), middle)
        layers.append(Layer(Field(middle, coarse, fine), rng.uniform(0.25, 0.7), rng.uniform(-880, -450), -900.0))
    if variety.blanket:
        rise = np.float32(8) + np.float32(rng.uniform(5, 14)) * np.clip(smooth_noise(rng, coarse, 40.0) + 0.6, 0, None)
        middle = skin - gap - rise
        top = np.float32(rng.uniform(-150, 120))
        off = (z > top) | (y > np.float32(rng.uniform(30, 90))) & (np.abs(x) > 0)
        middle = np.where(np.broadcast_to(off, coarse.shape), np.float32(60.0), middle)
        thick = rng.uniform(1.5, 5.0)
        layers.append(Layer(Field(middle, coarse, fine), thick, rng.uniform(-860, -650), rng.uniform(-985, -900)))
    return layers


def fasteners_from_rng(
    rng: np.random.Generator, variety: Variety, skin: FloatVolume, coarse: Grid
) -> list[tuple[Tubes, float]]:
    """Buttons, zips, hooks and wires in clothes, and electrodes with their cables.

    Returns:
        Tubes, each with its HU.
    """
    found: list[tuple[Tubes, float]] = []
    if variety.clothes and rng.random() < 0.3:  # a zip, or buttons, in the middle of the front
        side = rng.uniform(-12, 12)
        heights = np.arange(-160, 110, 4.0) if rng.random() < 0.4 else np.arange(-150, 110, rng.uniform(60, 95))
        points = _on_front(skin, coarse, np.column_stack([heights, np.full(len(heights), side)]), 3.0)
        balls = [tubes_along([point, point + np.array([1.0, 0, 0])], rng.uniform(1.2, 2.5)) for point in points]
        found += [(joined(balls), float(rng.choice([300.0, 3000.0, _STEEL])))] if balls else []
    if variety.clothes and rng.random() < 0.25:  # the wires of a bra
        turn = np.linspace(-1.1, 1.1, 14)
        for middle in (-75, 75):
            places = np.column_stack([-50 - 45 * np.cos(turn), middle + 60 * np.sin(turn)])
            points = _on_front(skin, coarse, places, 2.0)
            if len(points) > 1:
                found.append((tubes_along(points, 0.9), _STEEL))
    for _ in range(variety.electrodes):
        place = np.array([[rng.uniform(-120, 90), rng.uniform(-100, 100)]])
        point = _on_front(skin, coarse, place, 2.0)
        if len(point):
            found += _electrode(rng, skin, coarse, point[0])
    return found


def _electrode(
    rng: np.random.Generator, skin: FloatVolume, coarse: Grid, point: FloatVolume
) -> list[tuple[Tubes, float]]:
    disc = tubes_along([point - [0, 0, 9], point + np.array([0, 0, 9])], 1.8)
    button = tubes_along([point - [0, 2, 0], point - [0, 4, 0]], 2.6)
    heights = point[0] + np.linspace(0, rng.uniform(-160, 200), 14)
    drift = point[2] + np.cumsum(rng.normal(0, 5, 14))
    cable = _on_front(skin, coarse, np.column_stack([heights, drift]), 4.0)
    parts = [(disc, 40.0), (button, _STEEL)]
    if len(cable) > 1:
        parts += [(tubes_along(cable, 1.3), 100.0), (tubes_along(cable, 0.6), 4000.0)]
    return parts


def _on_front(skin: FloatVolume, coarse: Grid, places_mm: FloatVolume, above_mm: float) -> FloatVolume:
    """Points (z, y, x) `above_mm` in front of the skin at places (z, x), without places out of view."""
    z, y, x = coarse.lines_mm
    points = []
    for height, side in places_mm:
        row, column = round((height - z[0]) / (z[1] - z[0])), round((side - x[0]) / (x[1] - x[0]))
        if 0 <= row < len(z) and 0 <= column < len(x):
            inside = np.flatnonzero(skin[row, :, column] < 0)
            if len(inside) and inside[0] > 0:
                points.append((height, y[inside[0]] + skin[row, inside[0], column] - above_mm, side))
    return np.array(points, dtype=np.float64).reshape(-1, 3)


def draw_fasteners(hu: FloatVolume, grid: Grid, fasteners: list[tuple[Tubes, float]], edge_mm: float) -> None:
    """Draw fasteners, in place."""
    for tubes, value in fasteners:
        paint_tubes(hu, grid, tubes, value, edge_mm)
