"""Arms next to the trunk or the head, and the neck: additions to the patient's skin, muscle and bones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.phantom.body.anatomy import joined
from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.grid import Axes, FloatVolume, Grid
from ctflow.phantom.paint import Points, Tubes, distance_near_tubes, smooth_max, smooth_min, tubes_along
from ctflow.phantom.scene.variety import Arms

_REACH_MM = 75.0  # distances are known this far from an arm: noise and clothes need no more


@dataclass(frozen=True, eq=False)
class Limbs:
    """Both arms: their outline, their bones, and the heads of the humeri (z, y, x)."""

    outline: Tubes
    bones: Tubes
    shoulders: tuple[Points, ...]
    fat_mm: float


def arms_from_rng(rng: np.random.Generator, patient: PhantomPatient, arms: Arms) -> Limbs | None:
    """Place both arms, each a little differently; None if they are out of view."""
    if arms == "out":
        return None
    thick = rng.uniform(0.85, 1.15)
    outlines, bones, shoulders = [], [], []
    for side in (-1, 1):
        upper, lower = _middle_lines(rng, patient, arms, side)
        outlines.append(tubes_along(upper, np.interp(np.linspace(0, 1, len(upper)), [0, 0.4, 1], [50, 48, 38]) * thick))
        # The shoulder joins the trunk.
        outlines.append(
            tubes_along([(100, 12, side * 70), upper[0] + np.array([-4.0, 0, -6 * side])], [40, 46 * thick])
        )
        humerus = upper + np.array([0, 2, -4 * side])
        shaft = np.full(len(upper), 11.0)
        shaft[0], shaft[-1] = 12.5, 14.0
        bones += [tubes_along(humerus, shaft), tubes_along([humerus[0], humerus[0] + [6.0, 0, -10.0 * side]], 23.0)]
        shoulders.append(humerus[0] + [3.0, 0, -5.0 * side])
        if lower is not None:
            outlines.append(tubes_along(lower, np.linspace(39, 26, len(lower)) * thick))
            for aside in (-9.0, 9.0):
                bones.append(
                    tubes_along(lower + np.array([0, 0.6 * aside, 0.7 * aside]), np.linspace(8, 6.5, len(lower)))
                )
    fat = float(0.25 * patient.fat + rng.uniform(2, 5))
    return Limbs(joined(outlines), joined(bones), tuple(shoulders), fat)


def _middle_lines(
    rng: np.random.Generator, patient: PhantomPatient, arms: Arms, side: int
) -> tuple[Points, Points | None]:
    """Upper arm from the shoulder, and lower arm from the elbow."""
    wide = patient.half_width + patient.wall + patient.fat
    shoulder = np.array([118 + rng.uniform(-8, 6), rng.uniform(-4, 14), side * (wide + 8)])
    if arms == "up":
        out, forward = rng.uniform(-55, 25), rng.uniform(-50, 20)
        elbow = shoulder + np.array([rng.uniform(150, 220), forward, side * out])
        return np.linspace(shoulder, elbow, 5), None
    beside = side * (wide + rng.uniform(42, 62))
    elbow = np.array([rng.uniform(-160, -120), rng.uniform(8, 45), beside + side * 6])
    upper = np.array([shoulder, [60, shoulder[1] + 4, beside], [-30, 0.5 * (elbow[1] + 14), beside], elbow])
    if arms == "down":
        wrist = np.array([elbow[0] - 240, rng.uniform(-20, 25), beside - side * rng.uniform(-10, 25)])
    else:
        front = -patient.half_depth - 0.75 * patient.wall - 0.6 * patient.fat - rng.uniform(22, 36)
        wrist = np.array([elbow[0] - rng.uniform(20, 70), front, side * rng.uniform(-30, 40)])
    middle = 0.5 * (elbow + wrist) + ([0, -25, 25 * side] if arms == "folded" else [0, 0, 0])
    return upper, np.array([elbow, middle, wrist])


def with_limbs(
    limbs: Limbs | None, coarse: Grid, axes: Axes, skin: FloatVolume, muscle: FloatVolume
) -> tuple[FloatVolume, FloatVolume]:
    """Distances to skin and muscle of a patient with neck and arms.

    Args:
        limbs: The arms, if they are in view.
        coarse: The grid of the distances.
        axes: Its coordinates in the unbent patient.
        skin: Distance to the trunk's skin.
        muscle: Distance to the trunk's muscle.
    """
    neck = _neck(axes)
    skin, muscle = smooth_max(skin, neck, 14.0), smooth_max(muscle, neck + 7, 10.0)
    if limbs is not None:
        arms = distance_near_tubes(coarse, limbs.outline, _REACH_MM)
        skin, muscle = smooth_min(skin, arms, 16.0), smooth_min(muscle, arms + np.float32(limbs.fat_mm), 10.0)
    return skin, muscle


def _neck(axes: Axes) -> FloatVolume:
    """Distance to a neck with sloping shoulders."""
    z, y, x = axes
    wide, deep = 60 + 2.0 * np.clip(162 - z, 0, None), 62 + 1.6 * np.clip(150 - z, 0, None)
    outline = ((np.abs(x) / wide) ** 2.4 + (np.abs(y - 20) / deep) ** 2.4 + 1e-6) ** np.float32(1 / 2.4)
    neck: FloatVolume = (outline - 1) * np.minimum(wide, deep) * np.float32(0.8)
    return neck
