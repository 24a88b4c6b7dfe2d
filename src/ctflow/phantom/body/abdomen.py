"""The abdomen below the domes: kidneys, psoas, large vessels, and bowel with gas, fluid levels and stool."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ctflow.core.volume import Box
from ctflow.phantom.body.patient import AIR, FAT, PhantomPatient
from ctflow.phantom.grid import Axes, Field, FloatVolume, Grid
from ctflow.phantom.paint import Points, Tubes, distance_near_tubes, fill, smooth_max, tubes_along

_STEP_MM = 12.0
_WALL_MM = 2.2
_COLON = (  # in the unbent patient: ascending, transverse and descending
    [(-290, 4, -92), (-230, 0, -97), (-178, -4, -94), (-165, -40, -78), (-182, -62, -35), (-190, -66, 0)],
    [(-190, -66, 0), (-176, -60, 40), (-140, -40, 80), (-106, 8, 98), (-130, 22, 106), (-200, 20, 106), (-290, 8, 98)],
)


@dataclass(frozen=True, eq=False)
class Organ:
    """An object in the cavity: its distance, its HU, and the amplitude of its fine texture (HU)."""

    distance: Field
    hu: float
    uneven: float = 3.0

    @cached_property
    def box(self) -> Box | None:
        """Its bounding box, with its edge."""
        return self.distance.box_of(4.0)

    def draw(self, hu: FloatVolume, box: Box, fine: FloatVolume, edge_mm: float) -> None:
        """Draw its part in a box of whole slices, in place.

        Args:
            hu: The box's voxels.
            box: The box.
            fine: Fine texture there.
            edge_mm: Width of the edge.
        """
        own = self.box
        if own is None:
            return
        low, high = max(own[0].start, box[0].start), min(own[0].stop, box[0].stop)
        if low >= high:
            return
        inner = slice(low - box[0].start, high - box[0].start), own[1], own[2]
        fill(
            hu[inner],
            self.distance.in_box((slice(low, high), own[1], own[2])),
            np.float32(self.hu) + np.float32(self.uneven) * fine[inner],
            edge_mm,
        )


@dataclass(frozen=True, eq=False)
class Space:
    """Space for organs: the coarse grid, its coordinates in the unbent patient, the cavity and the lungs."""

    coarse: Grid
    fine: Grid
    axes: Axes
    cavity: FloatVolume
    lung: FloatVolume

    def field(self, distance: FloatVolume) -> Field:
        """A shape, clipped to the cavity and clear of the lungs."""
        return Field(smooth_max(distance, self.border, 4.0), self.coarse, self.fine)

    @cached_property
    def border(self) -> FloatVolume:
        """Distance to the border of the space for organs."""
        return smooth_max(self.cavity + 4, 5 - self.lung, 4.0)

    def ellipsoid(self, centre: tuple[float, ...], radii: tuple[float, ...]) -> FloatVolume:
        """Distance to an ellipsoid, correct near its surface."""
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip(self.axes, centre, radii, strict=True)]
        distance: FloatVolume = (np.sqrt(parts[0] + parts[1] + parts[2] + 1e-6) - 1) * np.float32(min(radii))
        return distance


def organs_from_rng(rng: np.random.Generator, patient: PhantomPatient, space: Space) -> tuple[Organ, ...]:
    """Draw the organs behind and below the liver, from back to front, except those out of view."""
    if float(space.coarse.lines_mm[0][0]) > -100:
        return ()
    organs = [*_behind(rng, patient, space), *_small_bowel(rng, patient, space), *_colon(rng, patient, space)]
    organs += _kidneys(rng, patient, space)
    return tuple(organs)


def liver_edge(axes: Axes, low_mm: float) -> FloatVolume:
    """Distance from the lower edge of the liver, which is lowest at the patient's right."""
    _, y, x = axes
    edge = np.float32(low_mm) + 0.42 * (x + 90) - 0.1 * y
    distance: FloatVolume = 0.9 * (edge - axes[0])
    return distance


def abdominal_wall(axes: Axes, cavity: FloatVolume) -> FloatVolume:
    """Distance to the outside of the muscles below the ribs: thin in front and at the sides, thick near the spine."""
    z, y, x = axes
    ribs = 90 / (1 + np.exp(-(z + 128 - 0.12 * np.abs(x)) / 9))
    wall: FloatVolume = cavity - (13 + ribs + 75 * np.clip((y - 10) / 50, 0, 1))
    return wall


def _behind(rng: np.random.Generator, patient: PhantomPatient, space: Space) -> Iterator[Organ]:
    """Psoas, vena cava and aorta, pancreas."""
    spine = {z: float(patient.spine(np.array([z], np.float32))[0]) for z in (-60, -150, -200, -290)}
    for side in (-1, 1):
        line = [(-150, spine[-150] + 6, side * 27), (-200, spine[-200] + 6, side * 36), (-290, spine[-290], side * 52)]
        psoas = tubes_along(patient.unbend(line), [7, 16, 24])
        yield Organ(space.field(distance_near_tubes(space.coarse, psoas, 20)), 54.0, 4.0)
    blood = patient.blood
    vein = 45 + 0.8 * patient.enhancement
    cava = [(-30, -4, -28), (-60, 8, -28), (-150, spine[-150] - 22, -22), (-290, spine[-290] - 24, -20)]
    aorta = [(-140, spine[-150] - 19, 9), (-200, spine[-200] - 26, 6), (-290, spine[-290] - 27, 3)]
    for line, radius, value in ((cava, 11.5, vein), (aorta, 9.5, blood)):
        tube = tubes_along(patient.unbend(line), radius)
        yield Organ(space.field(distance_near_tubes(space.coarse, tube, 20)), value)
    pancreas = [(-178, -2, -34), (-158, -12, -8), (-150, -4, 22), (-136, 16, 62)]
    tube = tubes_along(patient.unbend(pancreas), [13, 9, 10, 8])
    yield Organ(space.field(distance_near_tubes(space.coarse, tube, 20)), 38 + 0.3 * patient.enhancement, 9.0)
    if rng.random() < 0.8:
        gall = space.ellipsoid((-168.0, -42.0, -52.0), (26.0, 16.0, 15.0))
        yield Organ(space.field(gall), float(rng.uniform(4, 18)))


def _kidneys(rng: np.random.Generator, patient: PhantomPatient, space: Space) -> Iterator[Organ]:
    for side in (-1, 1):
        z = (-196 if side < 0 else -182) + rng.uniform(-14, 14)
        y = float(patient.spine(np.array([z], np.float32))[0]) + rng.uniform(4, 14)
        size = rng.uniform(0.88, 1.12)
        x = side * (58.0 + rng.uniform(-3, 6))
        kidney = space.ellipsoid((z, y, x), (54 * size, 27 * size, 25 * size))
        sinus = space.ellipsoid((z, y - 4, x - side * 13), (25 * size, 10 * size, 15 * size))
        yield Organ(space.field(kidney - 9), FAT + 8, 5.0)  # its fat capsule keeps liver and bowel away
        cortex = 32 + 0.75 * (patient.blood - 45) * max(0.6, patient.uptake)
        yield Organ(space.field(kidney), cortex)
        yield Organ(space.field(np.maximum(kidney + 8, -sinus)), 32 + 0.6 * patient.enhancement, 8.0)
        yield Organ(space.field(sinus), FAT + 30, 12.0)


def _bowel(
    rng: np.random.Generator, space: Space, tubes: Tubes, gas: float, content: float, uneven: float
) -> Iterator[Organ]:
    """Wall, content and gas of a loop; `gas` is the share of its segments with gas, each above its own level."""
    yield Organ(space.field(distance_near_tubes(space.coarse, tubes, 20)), 38.0, 5.0)
    inner = distance_near_tubes(space.coarse, tubes.wider(-_WALL_MM), 20)
    yield Organ(space.field(inner), content, uneven)
    # Gas collects in stretches; its level is horizontal, and constant over each stretch.
    stretch = np.cumsum(rng.random(len(tubes.starts_mm)) < 0.25)
    height = rng.uniform(-0.9, 1.3, stretch[-1] + 1)
    filled = rng.random(stretch[-1] + 1) < gas
    above = np.full(space.coarse.shape, 400.0, np.float32)
    y = space.coarse.axes[1]
    for number in np.flatnonzero(filled):
        part = tubes.chosen(stretch == number)
        if len(part.starts_mm):
            level = float(part.starts_mm[:, 1].mean() + height[number] * part.radii_mm.mean())
            loop = distance_near_tubes(space.coarse, part.wider(-_WALL_MM - 0.3), 20)
            np.minimum(above, smooth_max(loop, np.broadcast_to(y - np.float32(level), loop.shape), 1.5), out=above)
    yield Organ(space.field(above), AIR + 12, 4.0)


def _colon(rng: np.random.Generator, patient: PhantomPatient, space: Space) -> Iterator[Organ]:
    for line in _COLON:
        points = _stepped(rng, np.array(line, dtype=np.float64), 4.0)
        swell = rng.uniform(11, 24)
        haustra = swell * (1 + 0.16 * np.sin(np.arange(len(points)) * 2.1) + rng.normal(0, 0.06, len(points)))
        tubes = tubes_along(patient.unbend(points), haustra)
        stool = rng.random() < 0.5
        content, uneven = (rng.uniform(-160, 10), 110.0) if stool else (rng.uniform(5, 30), 6.0)
        yield from _bowel(rng, space, tubes, rng.uniform(0.3, 1.0), float(content), uneven)


def _small_bowel(rng: np.random.Generator, patient: PhantomPatient, space: Space) -> Iterator[Organ]:
    """Loops that wind through the middle of the abdomen."""
    for middle in ((-215, -40, -45), (-190, -45, 45), (-245, -25, 10), (-220, -52, 20)):
        points = [np.array(middle, dtype=np.float64) + rng.normal(0, 10, 3)]
        heading = rng.normal(0, 1, 3)
        for _ in range(24):
            heading = 0.55 * heading / np.linalg.norm(heading) + rng.normal(0, 0.45, 3)
            heading += 0.006 * (np.array(middle) - points[-1]) * [1.0, 2.0, 1.0]
            points.append(points[-1] + 15 * heading / np.linalg.norm(heading))
        radii = rng.uniform(9, 15) * rng.uniform(0.85, 1.15, len(points))
        gas = rng.uniform(0, 0.5) if rng.random() < 0.7 else rng.uniform(0.6, 1)
        yield from _bowel(rng, space, tubes_along(patient.unbend(points), radii), gas, rng.uniform(8, 40), 6.0)


def _stepped(rng: np.random.Generator, line: Points, jitter_mm: float) -> Points:
    """Points along a polyline, `_STEP_MM` apart, each with a little jitter."""
    lengths = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(line, axis=0), axis=1))])
    places = np.arange(0, lengths[-1], _STEP_MM)
    points = np.column_stack([np.interp(places, lengths, line[:, axis]) for axis in range(3)])
    wave = np.cumsum(rng.normal(0, jitter_mm, points.shape), axis=0)
    wave -= np.linspace(0, 1, len(wave))[:, None] * wave[-1]
    return points + 0.7 * wave


def gas_in_stomach(stomach: FloatVolume, axes: Axes, level_mm: float) -> FloatVolume:
    """Distance to the gas of a stomach above its fluid level."""
    gas: FloatVolume = smooth_max(stomach + 4, np.broadcast_to(axes[1] - np.float32(level_mm), stomach.shape), 2.0)
    return gas
