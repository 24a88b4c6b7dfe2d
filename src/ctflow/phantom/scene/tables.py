"""Tables of several makers, with mattress, rails, cables and head rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.core.volume import Box
from ctflow.phantom.body.patient import AIR
from ctflow.phantom.grid import FloatVolume, Grid
from ctflow.phantom.paint import fill
from ctflow.phantom.scene.variety import Table

_HEAD_MM = 128.0  # a head rest begins here
_EDGE_MM = 1.5


@dataclass(frozen=True, eq=False)
class Beneath:
    """HU under the patient, (H, W): along the trunk, and at the head."""

    trunk: FloatVolume
    head: FloatVolume
    grid: Grid

    def in_box(self, box: Box) -> FloatVolume:
        """A new array of the HU in a box of whole slices."""
        at_head = self.grid.lines_mm[0][box[0]] > _HEAD_MM
        return np.where(at_head[:, None, None], self.head[box[1:]], self.trunk[box[1:]])


def table_from_rng(rng: np.random.Generator, grid: Grid, table: Table, back_mm: float) -> Beneath:
    """Draw a table.

    Args:
        rng: Draws its dimensions.
        grid: The grid to draw on.
        table: Its form.
        back_mm: Position of the patient's back (y).

    Returns:
        Air with the table in it.
    """
    _, y, x = (axis[0] if axis.ndim == 3 else axis for axis in grid.axes)
    y, x = y - np.float32(back_mm), x - np.float32(rng.normal(0, 6))
    hu = np.full(grid.shape[1:], AIR, np.float32)
    curve = {"curved": rng.uniform(5e-4, 9e-4), "flat": 0.0, "foam": rng.uniform(0, 4e-4), "shell": 8e-4}[table]
    bowl = -np.float32(curve) * x**2  # the sides rise
    half = float(rng.uniform(195, 255))
    mattress = rng.uniform(8, 35) if rng.random() < 0.7 else 0.0
    sunk = rng.uniform(2, 8) + 0.4 * mattress
    if mattress:
        _sheet(hu, y - bowl + sunk, x, mattress, half - 25, rng.uniform(-970, -900), rng.uniform(-800, -500))
    below = y - bowl + sunk - mattress
    _board(rng, hu, table, below, x, half)
    _fittings(rng, hu, below, x, half)
    if rng.random() < 0.25:
        _cushion(rng, hu, y - bowl, x)
    head = hu.copy()
    if rng.random() < 0.5:
        _head_rest(rng, head, y, x)
    return Beneath(hu, head, grid)


def _sheet(
    hu: FloatVolume, depth: FloatVolume, x: FloatVolume, thick: float, half: float, inner: float, cover: float
) -> None:
    """A foam mattress with a cover."""
    distance = np.maximum(np.abs(depth - thick / 2) - thick / 2, np.abs(x) - half)
    fill(hu, distance, cover, _EDGE_MM)
    fill(hu, distance + 1.2, inner, _EDGE_MM)


def _board(
    rng: np.random.Generator, hu: FloatVolume, table: Table, depth: FloatVolume, x: FloatVolume, half: float
) -> None:
    """The table top: a carbon fibre shell around foam, a solid slab, or only a shell."""
    thick = {"curved": rng.uniform(22, 35), "flat": rng.uniform(14, 30), "foam": rng.uniform(45, 75), "shell": 0.0}[
        table
    ]
    shell = rng.uniform(1.0, 2.8)
    carbon = rng.uniform(-350, 120)
    if table == "shell":  # a thin curved sheet, hollow underneath, with a wide beam under its middle
        fill(hu, np.maximum(np.abs(depth - 3) - 1.2 * shell, np.abs(x) - half), carbon, _EDGE_MM)
        beam = np.maximum(np.abs(depth - 62) - rng.uniform(18, 28), np.abs(x) - rng.uniform(70, 130))
        fill(hu, np.abs(beam) - shell, carbon, _EDGE_MM)
        return
    # Foam tables are thinner towards their sides.
    slope = np.float32(2e-4 if table == "curved" else 5e-4 if table == "foam" else 0.0)
    bottom = depth - np.float32(thick) + slope * x**2
    distance = np.maximum(np.maximum(-depth, bottom), np.abs(x) - half)
    if table == "flat" and rng.random() < 0.4:
        fill(hu, distance, rng.uniform(-700, -120), _EDGE_MM)
        return
    fill(hu, distance, carbon, _EDGE_MM)
    fill(hu, distance + 2 * shell, rng.uniform(-970, -880), _EDGE_MM)


def _fittings(rng: np.random.Generator, hu: FloatVolume, depth: FloatVolume, x: FloatVolume, half: float) -> None:
    """Rails at the sides, and cables in or under the table."""
    if rng.random() < 0.35:
        rail = np.maximum(np.abs(depth - rng.uniform(8, 20)) - 5.5, np.abs(np.abs(x) - half + 4) - 3.5)
        fill(hu, rail, rng.uniform(300, 2200), _EDGE_MM)
    for _ in range(int(rng.integers(1, 5)) if rng.random() < 0.4 else 0):
        side, low = rng.uniform(-0.9, 0.9) * half, rng.uniform(5, 45)
        away = np.sqrt((depth - np.float32(low)) ** 2 + (x - np.float32(side)) ** 2)
        radius = rng.uniform(1.5, 4.0)
        fill(hu, away - radius, rng.uniform(-100, 150), _EDGE_MM)
        if rng.random() < 0.6:
            fill(hu, away - 0.5 * radius, rng.uniform(900, 3000), _EDGE_MM)


def _cushion(rng: np.random.Generator, hu: FloatVolume, depth: FloatVolume, x: FloatVolume) -> None:
    """A covered foam cushion at one side, or under one side of the patient."""
    side, high, wide = rng.choice([-1, 1]) * rng.uniform(90, 200), rng.uniform(18, 50), rng.uniform(45, 90)
    outline = (np.abs((depth + 0.6 * high) / high) ** 3 + np.abs((x - side) / wide) ** 3 + 1e-6) ** (1 / 3) - 1
    distance = (outline * high).astype(np.float32)
    fill(hu, distance, rng.uniform(-850, -600), _EDGE_MM)
    fill(hu, distance + 1.2, rng.uniform(-985, -920), _EDGE_MM)


def _head_rest(rng: np.random.Generator, hu: FloatVolume, y: FloatVolume, x: FloatVolume) -> None:
    """A foam bowl in a shell instead of the table, which ends at the shoulders."""
    if rng.random() < 0.5:
        hu[:] = AIR
    reach = np.sqrt((x / np.float32(rng.uniform(0.95, 1.15))) ** 2 + (y + 70) ** 2)
    inner = np.float32(rng.uniform(80, 95))
    thick = np.float32(rng.uniform(10, 26))
    bowl = np.maximum(np.abs(reach - inner - thick / 2) - thick / 2, -30 - y)
    fill(hu, bowl, rng.uniform(-300, 100), _EDGE_MM)
    fill(hu, bowl + 3, rng.uniform(-970, -900), _EDGE_MM)
