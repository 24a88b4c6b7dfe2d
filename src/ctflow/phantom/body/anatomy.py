"""Signed distances to the organs of a patient, on a coarse grid."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.grid import WHOLE, Axes, Field, FloatVolume, Grid
from ctflow.phantom.paint import Tubes, distance_to_tubes, smooth_max, smooth_min, tubes_along

VERTEBRA_MM = 23.0  # height of a vertebra with its disc


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Signed distances in mm (negative inside), except `streaks`, `fissure`, `tissue`; see `anatomy_from_patient`."""

    skin: Field
    muscle: Field
    streaks: Field  # share of fat between muscles, 0 to 1
    cavity: Field
    lung: Field
    tissue: Field  # HU of lung tissue
    fissure: Field  # distance to the oblique fissures, without sign convention
    pericardium: Field
    heart: Field
    chambers: Field
    liver: Field
    spleen: Field
    stomach: Field
    gas: Field
    vertebrae: Field
    canal: Field
    sternum: Field
    scapulae: Field
    table: Field


def anatomy_from_patient(rng: np.random.Generator, patient: PhantomPatient, grid: Grid, vessels: Tubes) -> Anatomy:
    """Compute all fields.

    Args:
        rng: Draws textures.
        patient: The patient.
        grid: The fine grid on which the fields are read.
        vessels: Great vessels, which the lungs leave free.

    Returns:
        The fields; each takes a few MB.
    """
    coarse = grid.coarse()
    unbent = coarse.axes
    axes = patient.bend(*unbent)
    cavity = _cavity(patient, coarse, axes)
    skin = _skin(patient, coarse, axes)
    muscle = smooth_min(skin + _fat(patient, axes), cavity - 9, 6.0)
    heart = _heart(patient, coarse, axes)
    pericardium = heart - 5
    dome = _diaphragm(patient, axes)
    lung = _lung(patient, coarse, axes, cavity, pericardium, dome, distance_to_tubes(unbent, vessels))
    fields = {
        "skin": skin,
        "muscle": muscle,
        "streaks": _streaks(rng, coarse),
        "cavity": cavity,
        "lung": lung,
        "tissue": _lung_tissue(rng, patient, coarse, axes, lung),
        "fissure": _fissure(axes),
        "pericardium": pericardium,
        "heart": heart,
        "chambers": _chambers(patient, coarse, axes),
        **_abdomen(patient, coarse, axes, cavity, dome),
        **_bones(patient, coarse, axes, cavity, muscle),
        "table": _table(coarse, unbent, skin),
    }
    whole = {name: np.broadcast_to(values, coarse.shape) for name, values in fields.items()}
    return Anatomy(**{name: Field(np.ascontiguousarray(values), coarse, grid) for name, values in whole.items()})


def _distance(level: FloatVolume, grid: Grid) -> FloatVolume:
    """First-order distance to the zero of a smooth function: its value divided by its slope."""
    level = np.broadcast_to(level, grid.shape)
    slope = np.sqrt(sum(np.square(part) for part in np.gradient(level, *grid.spacing_mm)))
    distance: FloatVolume = (level / np.maximum(slope, 2e-3)).astype(np.float32)
    return np.clip(distance, -400.0, 400.0)


def _ellipsoid(grid: Grid, axes: Axes, centre: tuple[float, ...], radii: tuple[float, ...]) -> FloatVolume:
    parts = [((axis - c) / r) ** 2 for axis, c, r in zip(axes, centre, radii, strict=True)]
    return _distance(np.sqrt(parts[0] + parts[1] + parts[2] + 1e-6) - 1, grid)


def _cavity(patient: PhantomPatient, grid: Grid, axes: Axes) -> FloatVolume:
    """Inside of the ribs, open to the abdomen."""
    z, y, x = axes
    taper = patient.taper(z)
    across = np.abs(x / (patient.half_width * taper)) ** 2.4
    deep = np.abs((y - patient.cavity_centre(z)) / (patient.half_depth * taper**0.8)) ** 2.4
    return _distance((across + deep + 1e-6) ** np.float32(1 / 2.4) - 1, grid)


def _skin(patient: PhantomPatient, grid: Grid, axes: Axes) -> FloatVolume:
    """Body outline: flat back, wide shoulders, with or without breasts."""
    z, y, x = axes
    shoulders = 26 / (1 + np.exp(-(z - 70) / 14))
    half_width = patient.half_width + patient.wall + patient.fat + shoulders
    half_depth = patient.half_depth + 0.75 * patient.wall + 0.6 * patient.fat + 4
    squareness = 2.2 + 1.1 / (1 + np.exp(-y / 30))  # patients lie supine: flat backs
    outline = np.abs(x / half_width) ** squareness + np.abs((y - 2) / half_depth) ** squareness + 1e-6
    skin = _distance(outline ** (1 / squareness) - 1, grid)
    if patient.breasts:
        front = -patient.half_depth - 0.3 * patient.wall
        for side in (-1, 1):
            size = patient.breasts
            breast = _ellipsoid(grid, axes, (-28.0, front, side * 68.0), (1.5 * size, size, 1.35 * size))
            skin = smooth_min(skin, breast, 14.0)
    return _with_nipples(skin, axes)


def _with_nipples(skin: FloatVolume, axes: Axes) -> FloatVolume:
    """A 5 mm ball on either side of the front: in projection, and to a model, it is a nodule."""
    z, y, x = (np.broadcast_to(axis, skin.shape) for axis in axes)
    for side in (-1, 1):
        column = (skin[:, :, :] < 0) & (np.abs(x - side * 82) < 3) & (np.abs(z + 24) < 3)
        if column.any():
            front = float(y[column].min())
            away = np.sqrt((z + 24) ** 2 + (y - front) ** 2 + (x - side * 82) ** 2)
            skin = smooth_min(skin, away - 5, 2.0)
    return skin


def _fat(patient: PhantomPatient, axes: Axes) -> FloatVolume:
    """Thickness of the fat under the skin: thin over the spine, thick at the sides and towards the abdomen."""
    z, _, x = axes
    thickness: FloatVolume = patient.fat * (0.65 + 0.35 * np.clip(np.abs(x) / 120, 0, 1)) * (1 - 0.0015 * z) + 3
    return thickness


def _streaks(rng: np.random.Generator, grid: Grid) -> FloatVolume:
    """Fat between the muscles: thin curved layers of a smooth random field."""
    wave = smooth_noise(rng, grid, 14.0)
    share: FloatVolume = np.clip(1.0 - np.abs(wave) * 9, 0.0, 0.6)
    return share


def smooth_noise(rng: np.random.Generator, grid: Grid, length_mm: float) -> FloatVolume:
    """Random field of unit variance that varies over about `length_mm`."""
    sparse = grid.coarse(length_mm)
    values = rng.standard_normal(sparse.shape, dtype=np.float32)
    field = Field(values, sparse, grid).in_box(WHOLE)
    return field * np.float32(1.0 / max(float(field.std()), 1e-6))


def _heart(patient: PhantomPatient, grid: Grid, axes: Axes) -> FloatVolume:
    s = patient.heart
    main = _ellipsoid(grid, axes, (-42.0, -26.0, 22.0), (46 * s, 40 * s, 52 * s))
    right = _ellipsoid(grid, axes, (-32.0, -18.0, -20.0), (40 * s, 34 * s, 26 * s))
    base = _ellipsoid(grid, axes, (-6.0, -14.0, 4.0), (30 * s, 32 * s, 30 * s))
    return smooth_min(smooth_min(main, right, 12.0), base, 14.0)


def _chambers(patient: PhantomPatient, grid: Grid, axes: Axes) -> FloatVolume:
    s = patient.heart
    ventricles = _ellipsoid(grid, axes, (-46.0, -16.0, 38.0), (32 * s, 18 * s, 24 * s))
    right = _ellipsoid(grid, axes, (-44.0, -44.0, 6.0), (30 * s, 14 * s, 26 * s))
    atria = _ellipsoid(grid, axes, (-14.0, 2.0, 8.0), (20 * s, 15 * s, 26 * s))
    return np.minimum(np.minimum(ventricles, right), atria)


def _diaphragm(patient: PhantomPatient, axes: Axes) -> FloatVolume:
    """Height above the diaphragm's two domes, in mm."""
    z, y, x = axes
    tops = []
    for side, top in zip((-1, 1), patient.dome, strict=True):
        away2 = ((x - side * 62) / 78) ** 2 + ((y + 8) / 88) ** 2
        tops.append(top - 46 * away2**0.9)
    return 0.85 * (z - smooth_max(tops[0], tops[1], 30.0))


def _lung(
    patient: PhantomPatient,
    grid: Grid,
    axes: Axes,
    cavity: FloatVolume,
    pericardium: FloatVolume,
    dome: FloatVolume,
    vessels: FloatVolume,
) -> FloatVolume:
    z, y, x = axes
    behind = 1 / (1 + np.exp(-(y - patient.spine(z) + 26) / 6))
    in_front = 1 / (1 + np.exp((y + 52) / 7))
    above = np.clip((z - 50) / 70, 0.0, 1.0)
    half = 17 + 9 * behind - 12 * in_front * (1 - above) + 7 * above
    gap = half + 4 * np.sin((z + y) / 23) - np.abs(x)
    # Behind the vertebral bodies the lungs extend around the spine but never meet.
    lung = smooth_max(cavity, np.broadcast_to(gap, grid.shape), 10.0)
    lung = smooth_max(lung, -dome, 8.0)
    lung = smooth_max(lung, -pericardium, 6.0)
    return smooth_max(lung, 2.5 - vessels, 4.0)


def _lung_tissue(
    rng: np.random.Generator, patient: PhantomPatient, grid: Grid, axes: Axes, lung: FloatVolume
) -> FloatVolume:
    """Lung tissue: denser towards the dependent back, most near the pleura; nowhere homogeneous."""
    texture = 13 * smooth_noise(rng, grid, 26.0) + 12 * smooth_noise(rng, grid, 9.0)
    pressed = patient.pressed * np.clip(1 + lung / 9, 0, 1) / (1 + np.exp(-(axes[1] - 48) / 8))
    tissue: FloatVolume = patient.lung + patient.gravity * axes[1] + texture + pressed
    return tissue


def _fissure(axes: Axes) -> FloatVolume:
    """Oblique fissures: from high at the back to low in front."""
    z, y, x = axes
    distance: FloatVolume = 0.68 * (z - 12) - 0.73 * (y - 6) + 6 * np.sin(x / 31) + 0.05 * x
    return distance


def _abdomen(
    patient: PhantomPatient, grid: Grid, axes: Axes, cavity: FloatVolume, dome: FloatVolume
) -> dict[str, FloatVolume]:
    """Organs under the diaphragm: liver on the right, spleen and stomach on the left."""
    _, y, x = axes
    inside = smooth_max(cavity + 5, dome + 4, 8.0)
    liver = smooth_max(smooth_max(inside, np.broadcast_to(x - 18 + 0.25 * y, grid.shape), 10.0), y - 62 + 0 * x, 8.0)
    left = patient.dome[1]
    spleen = smooth_max(inside, _ellipsoid(grid, axes, (left - 42, 42.0, 92.0), (48.0, 38.0, 28.0)), 6.0)
    stomach = smooth_max(inside, _ellipsoid(grid, axes, (left - 48, -18.0, 62.0), (46.0, 44.0, 36.0)), 6.0)
    gas = smooth_max(stomach + 4, np.broadcast_to(y + 34, grid.shape), 2.0)
    return {"liver": liver, "spleen": spleen, "stomach": stomach, "gas": gas}


def _bones(
    patient: PhantomPatient, grid: Grid, axes: Axes, cavity: FloatVolume, muscle: FloatVolume
) -> dict[str, FloatVolume]:
    z, y, x = axes
    middle = patient.spine(z)
    within = np.abs(np.mod(z, VERTEBRA_MM) - VERTEBRA_MM / 2)  # 0 in the middle of a vertebral body
    waist = 1 - 0.10 * np.clip(1 - within / 8, 0, 1)
    round_body = np.sqrt((x / (17 * waist)) ** 2 + ((y - middle) / (14 * waist)) ** 2 + 1e-6)
    bodies = smooth_max((round_body - 1) * 14, np.broadcast_to(within - 9.5, grid.shape), 2.0)
    back = y - middle - 22
    ring = np.sqrt((x / 1.15) ** 2 + back**2)
    arch = np.maximum(np.abs(ring - 11.5) - 3.0, within - 8.0)
    canal = ring - 8.5
    front = patient.cavity_centre(z) - patient.half_depth * patient.taper(z) ** 0.8 - 9
    half = 15 + 9 / (1 + np.exp(-(z - 55) / 5))  # the manubrium is wide
    plate = (((np.abs(y - front) / 6.5) ** 2.5 + (np.abs(x) / half) ** 2.5 + 1e-6) ** np.float32(0.4) - 1) * 6.5
    sternum = smooth_max(np.broadcast_to(plate, grid.shape), np.abs(z - 8) - 82 + 0 * x, 4.0)
    shell = np.abs(cavity - 24) - 3.2
    blade = np.maximum(np.abs(z - 62) - 58, np.abs(np.abs(x) - 86 - 0.10 * (z - 60)) - (18 + 0.28 * (z - 10)))
    scapulae = smooth_max(smooth_max(shell, np.maximum(blade, 22 - y), 4.0), muscle + 5, 3.0)
    return {
        "vertebrae": np.minimum(bodies, arch),
        "canal": canal + 0 * z,
        "sternum": sternum,
        "scapulae": scapulae,
    }


def _table(grid: Grid, axes: Axes, skin: FloatVolume) -> FloatVolume:
    """Distance to the couch's curved shell: 12 mm of mattress under the back."""
    _, y, x = axes
    inside = np.argwhere((skin < 0).any(axis=(0, 2)))
    back = float(grid.lines_mm[1][inside.max()]) if len(inside) else float(grid.lines_mm[1][-1])
    surface: FloatVolume = back + 7 - 0.00075 * x**2 + 0 * y
    table: FloatVolume = np.maximum(np.abs(y - surface - 14) - 14, np.abs(x) - 205) + np.zeros(grid.shape, np.float32)
    return table


def great_vessels(patient: PhantomPatient) -> Tubes:
    """Aorta with its arch and branches, superior vena cava, pulmonary trunk and its two arteries."""
    spine = patient.spine(np.array([-150, -100, -50, 0, 30], np.float32))
    aorta = [(-18, -20, 2), (5, -24, -10), (30, -22, -12), (48, -14, -6), (58, 2, 6), (56, 18, 16), (46, 28, 22)]
    aorta += [(30, spine[4] - 22, 25), (0, spine[3] - 18, 24), (-50, spine[2] - 17, 21)]
    aorta += [(-100, spine[1] - 19, 15), (-150, spine[0] - 19, 8)]
    branches = [
        tubes_along(patient.unbend(aorta), [15, 15.5, 15.5, 14.5, 13.5, 13, 12.5, 12, 12, 11.5, 11, 10.5]),
        tubes_along(patient.unbend([(54, -8, -6), (85, 0, -16), (150, 4, -26)]), [6, 5, 4]),
        tubes_along(patient.unbend([(58, 4, 6), (90, 8, 10), (150, 10, 20)]), [4.5, 4, 3.5]),
        tubes_along(patient.unbend([(56, 14, 13), (90, 18, 20), (150, 20, 36)]), [5, 4.5, 4]),
        tubes_along(patient.unbend([(-25, -12, -26), (20, -14, -28), (80, -10, -22), (120, -12, -40)]), [9, 10, 8, 7]),
        tubes_along(patient.unbend([(72, -16, -22), (84, -26, 10), (110, -18, 42)]), [7, 6, 6]),
        tubes_along(patient.unbend([(-10, -42, 16), (12, -34, 18), (24, -16, 22), (28, 2, 34)]), [14, 14, 12, 10]),
        tubes_along(patient.unbend([(20, -20, 18), (16, -4, -2), (14, 2, -24), (10, 6, -36)]), [11, 10, 10, 9]),
    ]
    return joined(branches)


def joined(parts: list[Tubes]) -> Tubes:
    """Several sets of tubes as one."""
    return Tubes(
        np.concatenate([part.starts_mm for part in parts]),
        np.concatenate([part.ends_mm for part in parts]),
        np.concatenate([part.radii_mm for part in parts]),
    )
