"""Variety of a scan: the part it shows, objects around and in the patient, padding."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np

from ctflow.core.volume import Size3
from ctflow.phantom.grid import Grid

Arms = Literal["out", "up", "down", "folded"]
Part = Literal["chest", "no apices", "bases", "upper chest", "abdomen"]
Table = Literal["curved", "flat", "foam", "shell"]
Metal = Literal["pacemaker", "sternal wires", "spinal rods", "shoulder", "port", "valve", "clips"]
METALS: tuple[Metal, ...] = ("pacemaker", "sternal wires", "spinal rods", "shoulder", "port", "valve", "clips")
_Name = TypeVar("_Name", bound=str)
_MOST_APART_MM = 2.5
_PARTS: dict[Part, float] = {"chest": 0.45, "no apices": 0.15, "bases": 0.12, "upper chest": 0.08, "abdomen": 0.2}
# Ranges of each part's lower and upper end. The apices reach up to 112 to 126 mm, the lungs down to about -150 mm.
_ENDS_MM: dict[Part, tuple[tuple[float, float], tuple[float, float]]] = {
    "chest": ((-190, -150), (128, 172)),
    "no apices": ((-230, -150), (35, 95)),
    "bases": ((-270, -170), (-60, -5)),
    "upper chest": ((-35, 35), (135, 180)),
    "abdomen": ((-275, -240), (-120, -50)),
}
_ARMS: dict[Arms, float] = {"out": 0.35, "up": 0.25, "down": 0.28, "folded": 0.12}
_TABLES: dict[Table, float] = {"curved": 0.35, "flat": 0.2, "foam": 0.25, "shell": 0.2}
_SHOULDERS_MM = 100.0  # arms are out of view only below
_CIRCLE_MM = 250.0  # radius of a usual gantry's scan circle


@dataclass(frozen=True)
class Extent:
    """A part of the trunk.

    Attributes:
        name: Its name.
        low_mm: Its lower end; 0 is the middle of the chest.
        high_mm: Its upper end.
    """

    name: Part
    low_mm: float
    high_mm: float


@dataclass(frozen=True)
class Padding:
    """The padding outside the scan circle.

    Attributes:
        centre_mm: Middle of the circle (y, x), from the middle of the image.
        radius_mm: Its radius.
        hu: Its value in HU.
        declared: Whether PixelPaddingValue declares it.
    """

    centre_mm: tuple[float, float]
    radius_mm: float
    hu: int
    declared: bool


@dataclass(frozen=True)
class Variety:
    """The variety of one scan.

    Attributes:
        extent: The part it shows.
        field_mm: Field of view.
        shift_mm: Middle of the image (y, x), from the middle of the chest.
        padding: None if the whole square was scanned.
        blood: HU of blood with contrast medium; None keeps the patient's own.
        uptake: See `Patient`.
        inflow: Side (-1 is the patient's right) of a vein that holds undiluted contrast medium, 0 for none.
        arms: Their position; "out" is out of view.
        table: Its form.
        clothes: Number of layers.
        blanket: Whether one covers the patient.
        electrodes: Number on the skin, with cables.
        metal: The implants.
    """

    extent: Extent = field(default_factory=lambda: Extent("chest", -150.0, 150.0))
    field_mm: float = 358.0
    shift_mm: tuple[float, float] = (0.0, 0.0)
    padding: Padding | None = None
    blood: float | None = None
    uptake: float = 1.0
    inflow: int = 0
    arms: Arms = "out"
    table: Table = "curved"
    clothes: int = 0
    blanket: bool = False
    electrodes: int = 0
    metal: tuple[Metal, ...] = ()

    def grid(self, shape: Size3) -> Grid:
        """The grid of this scan, with `shape` (D, H, W) voxels.

        Few slices show only the middle of the extent: they are never more than 2.5 mm apart.
        """
        across = self.field_mm / min(shape[1:])
        extent = self.extent
        apart = min(_MOST_APART_MM, (extent.high_mm - extent.low_mm) / shape[0])
        return Grid(shape, (apart, across, across), ((extent.low_mm + extent.high_mm) / 2, *self.shift_mm))


def variety_from_rng(rng: np.random.Generator) -> Variety:
    """Draw a scan's variety; several variations at once are usual."""
    extent = _extent(rng)
    arms: Arms = _one_of(rng, _ARMS)
    if arms == "out" and extent.high_mm > _SHOULDERS_MM:
        arms = "up"
    table: Table = _one_of(rng, _TABLES)
    width = _field(rng, arms)
    shift = (float(rng.uniform(-25, 30)), float(rng.normal(0, 14)))
    blood, uptake, inflow = _contrast(rng)
    return Variety(
        extent=extent,
        field_mm=width,
        shift_mm=shift,
        padding=_padding(rng, width, shift),
        blood=blood,
        uptake=uptake,
        inflow=inflow,
        arms=arms,
        table=table,
        clothes=int(rng.choice(3, p=[0.35, 0.4, 0.25])),
        blanket=bool(rng.random() < 0.3),
        electrodes=int(rng.integers(2, 6)) if rng.random() < 0.25 else 0,
        metal=_metal(rng, arms),
    )


def _one_of(rng: np.random.Generator, shares: dict[_Name, float]) -> _Name:
    names = list(shares)
    return names[int(rng.choice(len(names), p=list(shares.values())))]


def _extent(rng: np.random.Generator) -> Extent:
    name: Part = _one_of(rng, _PARTS)
    low, high = _ENDS_MM[name]
    return Extent(name, float(rng.uniform(*low)), float(rng.uniform(*high)))


def _field(rng: np.random.Generator, arms: Arms) -> float:
    """Field of view: tight ones cut off the skin, wide ones show the whole table and both arms."""
    tight, usual = (0.1, 0.5) if arms in ("down", "folded") else (0.22, 0.55)
    draw = rng.random()
    if draw < tight:
        return float(rng.uniform(265, 320))
    return float(rng.uniform(340, 410) if draw < tight + usual else rng.uniform(420, 500))


def _padding(rng: np.random.Generator, field_mm: float, shift_mm: tuple[float, float]) -> Padding | None:
    draw = rng.random()
    if draw < 0.3:
        return None
    hu = int(rng.choice([-1024, -1000, -2000, -3024], p=[0.45, 0.1, 0.2, 0.25]))
    declared = bool(hu != -1000 and rng.random() < 0.5)
    if draw < 0.75:
        return Padding((0.0, 0.0), field_mm / 2 * float(rng.uniform(0.985, 1.03)), hu, declared)
    if draw < 0.85:  # the gantry's full circle, of which the image shows an off-centre part
        away = rng.uniform(20, 70, 2) * rng.choice([-1, 1], 2)
        return Padding((float(away[0]), float(away[1])), min(_CIRCLE_MM, field_mm * 0.62), hu, declared)
    middle = (float(-0.5 * shift_mm[0]), float(-0.5 * shift_mm[1]))
    return Padding(middle, field_mm / 2 * float(rng.uniform(0.86, 0.98)), hu, declared)


def _contrast(rng: np.random.Generator) -> tuple[float | None, float, int]:
    """HU of blood, uptake and inflow: the patient's own, none, portal venous, or arterial."""
    draw = rng.random()
    if draw < 0.25:
        return None, 1.0, 0
    if draw < 0.5:
        return float(rng.uniform(35, 50)), 1.0, 0
    if draw < 0.7:
        return float(rng.uniform(110, 190)), float(rng.uniform(0.8, 1.2)), 0
    inflow = int(rng.choice([-1, 1])) if rng.random() < 0.6 else 0
    return float(rng.uniform(250, 450)), float(rng.uniform(0.15, 0.45)), inflow


def _metal(rng: np.random.Generator, arms: Arms) -> tuple[Metal, ...]:
    """Metal in about a third of the scans."""
    shares = {
        "pacemaker": 0.10,
        "sternal wires": 0.12,
        "spinal rods": 0.07,
        "shoulder": 0.04 if arms != "out" else 0.0,
        "port": 0.06,
        "valve": 0.05,
        "clips": 0.06,
    }
    return tuple(name for name in METALS if rng.random() < shares[name])
