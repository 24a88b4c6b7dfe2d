"""Lung tumours and their mimics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ctflow.core.volume import Box, Labels
from ctflow.phantom.body.patient import directions_from_rng
from ctflow.phantom.grid import WHOLE, Axes, Field, FloatVolume, Grid
from ctflow.phantom.paint import Points, Tubes, coverage, paint_tubes, smooth_max, smooth_min

Form = Literal["round", "lobulated", "spiculated"]
TumourSite = Literal["solitary", "pleura", "vessel"]
FORMS: tuple[Form, ...] = ("round", "lobulated", "spiculated")
PLACES: tuple[TumourSite, ...] = ("solitary", "pleura", "vessel")
MOST = 5
_SIZES_MM = ((6.0, 10.0), (10.0, 20.0), (20.0, 40.0), (8.0, 30.0), (30.0, 60.0))
_ATTEMPTS = 60
_APART_MM = 6.0
_MOST_MIMICS = 4  # fewer than these of each kind


@dataclass(frozen=True)
class Tumour:
    """One tumour.

    Attributes:
        centre_mm: Centre of its voxels, LPS.
        diameter_mm: Diameter of the ball of the same volume, as drawn on the grid.
        form: Its outline.
        place: What it touches.
    """

    centre_mm: tuple[float, float, float]
    diameter_mm: float
    form: Form
    place: TumourSite


@dataclass(frozen=True)
class TumourPlan:
    """A tumour to be placed."""

    diameter_mm: float
    form: Form
    place: TumourSite


def plans_from_rng(rng: np.random.Generator, count: int) -> tuple[TumourPlan, ...]:
    """Draw sizes, forms and places.

    One or two tumours have any size; of three or more, one is small, one medium and one large. Forms and places
    alternate, so that even a few tumours are mixed.

    Args:
        rng: Draws.
        count: 0 to `MOST`.
    """
    form, place = int(rng.integers(3)), int(rng.integers(3))
    classes = range(count) if count >= 3 else rng.choice(len(_SIZES_MM), count, replace=False).tolist()
    return tuple(
        TumourPlan(float(rng.uniform(*_SIZES_MM[size])), FORMS[(form + index) % 3], PLACES[(place + index * 2) % 3])
        for index, size in enumerate(classes)
    )


def draw_tumours(
    rng: np.random.Generator,
    hu: FloatVolume,
    grid: Grid,
    lung: Field,
    vessels: Tubes,
    plans: Sequence[TumourPlan],
    *,
    value: float,
    edge_mm: float,
) -> tuple[tuple[Tumour, ...], Labels]:
    """Draw tumours into a chest.

    Args:
        rng: Draws.
        hu: (D, H, W), changed in place.
        grid: Its grid.
        lung: Signed distance to the lungs; tumours end at their border.
        vessels: Vessels that tumours sit on.
        plans: Tumours to draw; the largest is placed first.
        value: Mean HU of a tumour.
        edge_mm: Width of edges.

    Returns:
        The tumours that could be placed, and their numbers (1, 2, ...) as a label map; spicules are not labelled.
    """
    labels = np.zeros(hu.shape, np.uint8)
    tumours: list[Tumour] = []
    taken: list[tuple[Points, float]] = []
    for plan in sorted(plans, key=lambda plan: -plan.diameter_mm):
        shape = _Shape(rng, plan)
        for _ in range(_ATTEMPTS):
            centre = _draw_centre(rng, grid, lung, vessels, plan)
            if centre is None or any(
                np.linalg.norm(centre - other) < plan.diameter_mm / 2 + radius + _APART_MM for other, radius in taken
            ):
                continue
            box = grid.box_around(centre - shape.reach_mm, centre + shape.reach_mm)
            if box is None:
                continue
            inside = lung.in_box(box)
            distance = smooth_max(shape.distance(grid, box, centre), inside, 1.0)
            marked = distance < 0
            diameter = float((6 / np.pi * int(marked.sum()) * np.prod(grid.spacing_mm)) ** (1 / 3))
            if abs(diameter / plan.diameter_mm - 1) > 0.15 or labels[box][marked].any():
                continue
            _paint(rng, hu[box], distance, value, edge_mm, plan.diameter_mm)
            spicules = shape.spicules(rng, centre)
            if spicules is not None:
                paint_tubes(hu, grid, spicules, value - 20, edge_mm, only_in=coverage(lung.in_box(WHOLE), edge_mm))
            labels[box][marked] = len(tumours) + 1
            taken.append((centre, plan.diameter_mm / 2))
            index = np.argwhere(marked).mean(axis=0) + [part.start for part in box]
            x, y, z = grid.geometry.world_from_index(index)
            tumours.append(Tumour((float(x), float(y), float(z)), diameter, plan.form, plan.place))
            break
    return tuple(tumours), labels


def _draw_centre(rng: np.random.Generator, grid: Grid, lung: Field, vessels: Tubes, plan: TumourPlan) -> Points | None:
    """A centre for the place, at least a radius from the first and last slice; None if the draw does not fit."""
    radius = plan.diameter_mm / 2
    z, y, x = lung.coarse_grid.lines_mm
    first, last = (float(grid.lines_mm[0][end]) for end in (0, -1))
    wide = vessels.starts_mm[vessels.radii_mm[:, 0] > 0.9]
    if plan.place == "vessel" and len(wide):
        centre = wide[rng.integers(len(wide))] + rng.normal(0, 0.35 * radius, 3)
        depth = float(lung.at(centre[None])[0])
        fit = depth < -(0.5 * radius + 2)
    else:
        inside = np.argwhere(lung.coarse_values < -1)
        if not len(inside):
            return None
        index = inside[rng.integers(len(inside))]
        centre = np.array([z[index[0]], y[index[1]], x[index[2]]]) + rng.uniform(-1.5, 1.5, 3)
        depth = float(lung.at(centre[None])[0])
        # No place is as deep as a large solitary tumour is wide.
        deep = depth < -min(radius + 2, 22)
        fit = -0.75 * radius < depth < -0.2 * radius if plan.place == "pleura" else deep
    return centre if fit and first + radius < centre[0] < last - radius else None


class _Shape:
    """The outline of one tumour about its centre.

    Args:
        rng: Draws.
        plan: Size and form.
    """

    def __init__(self, rng: np.random.Generator, plan: TumourPlan) -> None:
        self._plan = plan
        self._radius = plan.diameter_mm / 2
        # A tumour on the pleura loses a cap to the chest wall: draw it larger.
        self._radius *= 1.13 if plan.place == "pleura" else 1.02
        self._waves = rng.normal(0, 1, (5, 3)) * (2.2 / self._radius)
        self._phases = rng.uniform(0, 2 * np.pi, 5)
        self._stretch = rng.uniform(0.85, 1.18, 3)
        self._stretch /= np.prod(self._stretch) ** (1 / 3)
        self._lobes: list[tuple[Points, float]] = []
        if plan.form == "lobulated":
            for direction in directions_from_rng(rng, int(rng.integers(4, 8))):
                size = self._radius * rng.uniform(0.42, 0.62)
                self._lobes.append((direction * self._radius * rng.uniform(0.5, 0.68), size))
        self.reach_mm = 1.55 * self._radius + 3

    def distance(self, grid: Grid, box: Box, centre: Points) -> FloatVolume:
        """Signed distance in a box."""
        z, y, x = (axis - np.float32(c) for axis, c in zip(grid.axes_in(box), centre, strict=True))
        core = 0.80 * self._radius if self._lobes else self._radius
        sz, sy, sx = (np.float32(s) for s in self._stretch)
        distance: FloatVolume = np.sqrt((z / sz) ** 2 + (y / sy) ** 2 + (x / sx) ** 2) - np.float32(core)
        for lobe, size in self._lobes:
            lz, ly, lx = (np.float32(part) for part in lobe)
            away = np.sqrt((z - lz) ** 2 + (y - ly) ** 2 + (x - lx) ** 2) - np.float32(size)
            distance = smooth_min(distance, away, 0.25 * size + 0.5)
        rough = 0.075 if self._plan.form == "spiculated" else 0.045
        for wave, phase in zip(self._waves, self._phases, strict=True):
            a, b, c = (np.float32(k) for k in wave)
            distance = distance + np.float32(rough * self._radius * 0.6) * np.sin(z * a + y * b + x * c + phase)
        return distance

    def spicules(self, rng: np.random.Generator, centre: Points) -> Tubes | None:
        """Thin rays of a spiculated tumour, outwards from its edge."""
        if self._plan.form != "spiculated":
            return None
        directions = directions_from_rng(rng, int(rng.integers(9, 22)))
        length = rng.uniform(0.35, 0.9, (len(directions), 1)) * self._radius + 3
        starts = centre + directions * (0.8 * self._radius)
        ends = centre + directions * (self._radius + length)
        thick = rng.uniform(0.7, 1.3, len(directions))
        return Tubes(starts, ends, np.column_stack([thick, 0.25 * thick]))


def _paint(
    rng: np.random.Generator, part: FloatVolume, distance: FloatVolume, value: float, edge_mm: float, diameter_mm: float
) -> None:
    """Paint soft tissue with a heterogeneous interior; large tumours are less dense in the middle."""
    own = value + rng.uniform(-12, 12)
    density = np.full(part.shape, own, np.float32)
    if diameter_mm > 28 and rng.random() < 0.5:
        density -= np.float32(rng.uniform(15, 35)) * coverage(distance + np.float32(0.28 * diameter_mm), 8.0)
    part += coverage(distance, edge_mm) * (density - part)


def draw_mimics(
    rng: np.random.Generator, hu: FloatVolume, grid: Grid, lung: Field, edge_mm: float, blocked: Labels
) -> None:
    """Draw tumour mimics: calcified granulomas and scars.

    Args:
        rng: Draws numbers and positions.
        hu: (D, H, W), changed in place.
        grid: Its grid.
        lung: Signed distance to the lungs.
        edge_mm: Width of edges.
        blocked: (D, H, W) tumours, which are not changed.
    """
    inside = np.argwhere(lung.coarse_values < -3)
    if not len(inside):
        return
    lines = lung.coarse_grid.lines_mm
    for make in (_granuloma, _scar):
        for _ in range(int(rng.integers(0, _MOST_MIMICS))):
            index = inside[rng.integers(len(inside))]
            centre = np.array([line[n] for line, n in zip(lines, index, strict=True)], dtype=np.float64)
            mimic = make(rng)
            box = grid.box_around(centre - mimic.reach_mm, centre + mimic.reach_mm)
            if box is None or blocked[box].any():
                continue
            z, y, x = (axis - np.float32(c) for axis, c in zip(grid.axes_in(box), centre, strict=True))
            distance, part = mimic.distance((z, y, x), lung.in_box(box)), hu[box]
            painted = part + coverage(distance, edge_mm) * (np.float32(rng.uniform(*mimic.hu)) - part)
            part[:] = np.maximum(part, painted) if mimic.only_brightens else painted


@dataclass(frozen=True)
class _Mimic:
    """A mimic about its centre.

    Attributes:
        reach_mm: Nothing of it lies further away.
        distance: Coordinates, and the distance to the lungs there -> signed distance to it.
        hu: Range of its HU.
        only_brightens: Whether it leaves denser tissue as it is.
    """

    reach_mm: float
    distance: Callable[[Axes, FloatVolume], FloatVolume]
    hu: tuple[float, float]
    only_brightens: bool = False


def _granuloma(rng: np.random.Generator) -> _Mimic:
    """A small calcified ball."""
    radius = rng.uniform(1.5, 4.0)

    def distance(axes: Axes, lung: FloatVolume) -> FloatVolume:
        z, y, x = axes
        return smooth_max(np.sqrt(z**2 + y**2 + x**2) - np.float32(radius), lung, 0.5)

    return _Mimic(radius + 3, distance, (280, 950))


def _scar(rng: np.random.Generator) -> _Mimic:
    """A thin curved plate."""
    size, thick = rng.uniform(8, 24), rng.uniform(0.5, 1.3)

    def distance(axes: Axes, lung: FloatVolume) -> FloatVolume:
        normal, along = np.linalg.qr(rng.standard_normal((3, 2)))[0].T.astype(np.float32)
        z, y, x = axes
        height = z * normal[0] + y * normal[1] + x * normal[2]
        sideways = z * along[0] + y * along[1] + x * along[2]
        away = np.sqrt(z**2 + y**2 + x**2)
        plate = np.abs(height + np.float32(0.15 * size) * np.sin(sideways * np.float32(3 / size))) - np.float32(thick)
        return smooth_max(smooth_max(plate, away - np.float32(size), 2.0), lung - 1, 0.5)

    return _Mimic(size + 2, distance, (-250, 20), only_brightens=True)
