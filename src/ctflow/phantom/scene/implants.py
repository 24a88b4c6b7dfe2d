"""Metal in the patient: pacemakers with their leads, wires, rods and screws, prostheses, ports, valves, clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.phantom.body.anatomy import VERTEBRA_MM, joined
from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.grid import FloatVolume, Grid
from ctflow.phantom.paint import Points, Tubes, coverage, paint_tubes, tubes_along
from ctflow.phantom.scene.variety import Metal

# Titanium, steel: far above the stored range, so that blur and partial volume still saturate.
TITANIUM, STEEL, SILICONE = 8000.0, 14000.0, 300.0


@dataclass(frozen=True, eq=False)
class Can:
    """The case of a pacemaker or the disc of a port, axis-aligned: middle (z, y, x), half lengths in mm."""

    centre: Points
    half: Points
    value: float

    def distance(self, grid: Grid, wider_mm: float = 0.0) -> tuple[tuple[slice, slice, slice] | None, FloatVolume]:
        """Its bounding box, and the signed distance there."""
        box = grid.box_around(self.centre - self.half - 6 - wider_mm, self.centre + self.half + 6 + wider_mm)
        if box is None:
            return None, np.zeros(0, np.float32)
        z, y, x = (axis - np.float32(c) for axis, c in zip(grid.axes_in(box), self.centre, strict=True))
        half = self.half.astype(np.float32)
        # Rounded from the front, flat from the side.
        outline = ((np.abs(z) / half[0]) ** 3 + (np.abs(x) / half[2]) ** 3 + 1e-6) ** np.float32(1 / 3) - 1
        distance: FloatVolume = np.maximum(outline * half[0], np.abs(y) - half[1]) - np.float32(wider_mm)
        return box, distance


@dataclass(frozen=True, eq=False)
class Implants:
    """Implants to draw: tubes with their HU, and cans."""

    tubes: tuple[tuple[Tubes, float], ...]
    cans: tuple[Can, ...]


def implants_from_rng(
    rng: np.random.Generator,
    patient: PhantomPatient,
    metal: tuple[Metal, ...],
    muscle: FloatVolume,
    coarse: Grid,
    shoulders: tuple[Points, ...],
) -> Implants:
    """Place a patient's implants.

    Args:
        rng: Draws sizes, sides and places.
        patient: The patient.
        metal: The kinds.
        muscle: Distance to the muscles on the coarse grid: cans lie on them.
        coarse: That grid.
        shoulders: Heads of the humeri in view.
    """
    tubes: list[tuple[Tubes, float]] = []
    cans: list[Can] = []
    for name in metal:
        if name in ("pacemaker", "port"):
            side = 1 if rng.random() < (0.85 if name == "pacemaker" else 0.3) else -1
            make = _pacemaker if name == "pacemaker" else _port
            can, leads = make(rng, patient, side, muscle, coarse)
            cans.append(can)
            tubes += leads
        elif name == "shoulder":
            tubes += [part for shoulder in shoulders[: int(rng.integers(1, 3))] for part in _shoulder(shoulder)]
        elif name == "spinal rods":
            tubes += _rods(rng, patient, coarse)
        else:
            draw = {"sternal wires": _wires, "valve": _valve, "clips": _clips}[name]
            tubes += draw(rng, patient)
    return Implants(tuple(tubes), tuple(cans))


def draw_implants(hu: FloatVolume, grid: Grid, implants: Implants, edge_mm: float) -> None:
    """Draw implants, in place."""
    for tubes, value in implants.tubes:
        paint_tubes(hu, grid, tubes, value, edge_mm)
    for can in implants.cans:
        box, distance = can.distance(grid)
        if box is not None:
            part = hu[box]
            np.maximum(part, part + coverage(distance, edge_mm) * (np.float32(can.value) - part), out=part)


def _on_muscle(muscle: FloatVolume, coarse: Grid, z_mm: float, x_mm: float) -> float:
    """Front surface (y) of the chest muscles at a height and side; a guess if that is out of view."""
    z, y, x = coarse.lines_mm
    row = int(np.clip(round((z_mm - z[0]) / (z[1] - z[0])), 0, len(z) - 1))
    column = int(np.clip(round((x_mm - x[0]) / (x[1] - x[0])), 0, len(x) - 1))
    inside = np.flatnonzero(muscle[row, :, column] < 0)
    return float(y[inside[0]]) if len(inside) else -90.0


def _pacemaker(
    rng: np.random.Generator, patient: PhantomPatient, side: int, muscle: FloatVolume, coarse: Grid
) -> tuple[Can, list[tuple[Tubes, float]]]:
    z, x = rng.uniform(72, 96), side * rng.uniform(62, 84)
    half = np.array([rng.uniform(19, 30), rng.uniform(3.2, 5.5), rng.uniform(21, 30)])
    centre = np.array([z, _on_muscle(muscle, coarse, z, x) - half[1] - 1, x])
    entry = [
        centre - [-12, 0, 14 * side],
        centre + np.array([24, 4, 8 * side]),
        (114, -22, side * 62),
        (108, -18, side * 36),
    ]
    entry += [(88, -22, 6), (76, -16, -20)] if side > 0 else [(92, -14, -26)]
    leads = []
    ends = [[(20, -14, -28), (-20, -14, -27), (-46, -32, -14), (-62, -42, 10), (-70, -40, 34)]]
    if rng.random() < 0.7:
        ends.append([(22, -15, -26), (-8, -12, -29), (-16, -26, -28), (-8, -36, -22)])
    if rng.random() < 0.3:  # through the coronary sinus to the left ventricle
        ends.append([(21, -13, -27), (-28, -6, -24), (-34, 14, 8), (-38, 8, 44), (-56, -8, 66)])
    for end in ends:
        line = patient.unbend(np.array([*entry[2:], *end], dtype=np.float64))
        line = np.concatenate([np.array(entry[:2], dtype=np.float64), line])
        leads.append((tubes_along(line + rng.normal(0, 0.8, line.shape), rng.uniform(0.8, 1.1)), STEEL))
        leads.append((tubes_along(line[[-2, -1]] * [[0.12], [0.88]] + line[[-1, -2]] * [[0.88], [0.12]], 1.5), STEEL))
    if rng.random() < 0.35:  # a defibrillator's coil
        coil = patient.unbend([(-46, -32, -14), (-62, -42, 10), (-70, -40, 34)])
        leads.append((tubes_along(coil, 2.0), STEEL))
    return Can(centre, half, TITANIUM), leads


def _port(
    rng: np.random.Generator, patient: PhantomPatient, side: int, muscle: FloatVolume, coarse: Grid
) -> tuple[Can, list[tuple[Tubes, float]]]:
    z, x = rng.uniform(60, 92), side * rng.uniform(55, 80)
    half = np.array([12.0, 5.5, 12.0])
    centre = np.array([z, _on_muscle(muscle, coarse, z, x) - half[1] - 1, x])
    inner: list[tuple[float, ...]] = [
        (116, -26, side * 56),
        (108, -18, side * 34),
        *([(88, -22, 6)] if side > 0 else []),
        (78, -14, -22),
    ]
    inner += [(20, -14, -28), (rng.uniform(-16, 6), -13, -27)]
    line = np.concatenate([centre[None], patient.unbend(inner)])
    value = TITANIUM if rng.random() < 0.5 else 900.0
    return Can(centre, half, value), [(tubes_along(line, 1.4), SILICONE + 500)]


def _wires(rng: np.random.Generator, patient: PhantomPatient) -> list[tuple[Tubes, float]]:
    """Steel loops around the sternum, twisted in front."""
    loops = []
    turn = np.linspace(0, 2 * np.pi, 15)
    for z in np.arange(66, -66, -rng.uniform(18, 26)):
        height = z + rng.uniform(-4, 4)
        up = np.array([height], np.float32)
        front = float((patient.cavity_centre(up) - patient.half_depth * patient.taper(up) ** 0.8 - 9)[0])
        wide = 14 + 8 * (height > 55)
        tilt = rng.normal(0, 3)
        ring = np.column_stack([height + tilt * np.cos(turn), front + 8.5 * np.sin(turn), wide * np.cos(turn)])
        loops.append(tubes_along(patient.unbend(ring), 0.6))
        knot = np.array([(height, front - 8.5, rng.normal(0, 3)), (height + 5, front - 10.5, rng.normal(0, 3))])
        loops.append(tubes_along(patient.unbend(knot), 1.2))
    return [(joined(loops), STEEL)]


def _rods(rng: np.random.Generator, patient: PhantomPatient, coarse: Grid) -> list[tuple[Tubes, float]]:
    """Two rods along the spinous processes, with screws through the pedicles."""
    levels = int(rng.integers(3, 8))
    seen = coarse.lines_mm[0][[0, -1]] / VERTEBRA_MM  # some of it is in view
    first = int(rng.integers(max(-12, int(seen[0]) - levels + 2), max(-11, min(4, int(seen[1]) - 1))))
    parts, heights = [], (np.arange(first, first + levels) + 0.5) * VERTEBRA_MM
    middles = patient.spine(heights.astype(np.float32)).astype(np.float64)
    for side in (-1, 1):
        behind = np.column_stack([heights, middles + 38, np.full(levels, side * 19.0)])
        ends = behind[[0, -1]] + [[-9.0, 0, 0], [9.0, 0, 0]]
        parts.append(tubes_along(patient.unbend(np.concatenate([ends[:1], behind, ends[1:]])), 2.8))
        for point, middle in zip(behind, middles, strict=True):
            tip = (point[0] + rng.normal(0, 1), middle - 6, side * 7.0)
            parts.append(
                tubes_along(patient.unbend([point, (point[0], middle + 28, side * 15.0), tip]), [4.6, 2.9, 2.4])
            )
    return [(joined(parts), TITANIUM)]


def _shoulder(shoulder: Points) -> list[tuple[Tubes, float]]:
    """A prosthesis: head and stem."""
    side = float(np.sign(shoulder[2]))
    head = tubes_along([shoulder, shoulder + np.array([1.0, 0, -6 * side])], 20.0)
    stem = tubes_along(shoulder + np.array([(0, 0, 0), (-20, 2, 4 * side), (-110, 4, 8 * side)]), [9, 7, 4.5])
    return [(joined([head, stem]), STEEL)]


def _valve(rng: np.random.Generator, patient: PhantomPatient) -> list[tuple[Tubes, float]]:
    """The ring of an aortic or mitral valve."""
    middle = np.array([-16.0, -20, 2]) if rng.random() < 0.6 else np.array([-26.0, -6, 20])
    axes = np.linalg.qr(rng.standard_normal((3, 2)))[0].T
    turn = np.linspace(0, 2 * np.pi, 22)[:, None]
    ring = middle + rng.uniform(10, 14) * (np.cos(turn) * axes[0] + np.sin(turn) * axes[1])
    return [(tubes_along(patient.unbend(ring), rng.uniform(0.8, 1.8)), STEEL)]


def _clips(rng: np.random.Generator, patient: PhantomPatient) -> list[tuple[Tubes, float]]:
    """Small steel clips along a graft, in an armpit, or near the gall bladder."""
    middle = np.array([(-10.0, -62, 14), (70.0, -20, 118), (-160.0, -30, -40)][int(rng.integers(3))])
    spread = np.array([36.0, 8, 14])
    parts = []
    for _ in range(int(rng.integers(4, 14))):
        point = middle + rng.normal(0, 0.6, 3) * spread
        parts.append(tubes_along(patient.unbend([point, point + rng.normal(0, 2.2, 3)]), 0.7))
    return [(joined(parts), STEEL)]
