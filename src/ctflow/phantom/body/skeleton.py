"""Tubular bones: ribs with their cartilage, vertebral processes, clavicles."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctflow.phantom.body.anatomy import VERTEBRA_MM, joined
from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.paint import Points, Tubes, tubes_along

_RIBS = 12
_TRUE_RIBS = 10  # ribs that reach the sternum through cartilage
_STEPS = 30


@dataclass(frozen=True, eq=False)
class Skeleton:
    """Bone and cartilage as tubes."""

    bones: Tubes
    cartilage: Tubes


def skeleton_from_patient(patient: PhantomPatient) -> Skeleton:
    """Place ribs, processes and clavicles of a patient."""
    bones, cartilage = [], []
    for side in (-1, 1):
        for rib in range(_RIBS):
            points = _rib(patient, rib, side)
            bony = int(_STEPS * (0.80 if rib < _TRUE_RIBS else 0.62))
            radii = np.interp(np.arange(bony), [0, 4, bony - 1], [3.6, 4.6, 3.9])
            bones.append(tubes_along(patient.unbend(points[:bony]), radii))
            if rib < _TRUE_RIBS:
                cartilage.append(tubes_along(patient.unbend(points[bony - 1 :]), 4.4))
        clavicle = [(102, -62, side * 24), (116, -58, side * 60), (124, -38, side * 105), (126, -22, side * 140)]
        bones.append(tubes_along(patient.unbend(clavicle), [7.5, 5.5, 5, 6]))
    bones.extend(_processes(patient))
    return Skeleton(joined(bones), joined(cartilage))


def _rib(patient: PhantomPatient, rib: int, side: int) -> Points:
    """Centreline of a rib: along the cavity's wall from the spine to the front, descending forward."""
    turn = np.linspace(0.0, 1.0, _STEPS)
    # Angle about the cavity's middle: from next to the spine, around the side, to next to the sternum.
    angle = np.deg2rad(np.interp(turn, [0, 1], [74, -78]))
    head = patient.apex - 2 - 20.5 * rib
    z = head - (26 + 3.2 * min(rib, 7)) * turn**1.2 + 20 * np.clip(turn - 0.8, 0, 1) * (rib > 3)
    height = np.minimum(z, patient.apex - 8).astype(np.float32)
    taper = patient.taper(height)
    across, deep = patient.half_width * taper + 8, patient.half_depth * taper**0.8 + 8
    # Point of a superellipse of exponent 2.4 in the direction of the angle.
    reach = (np.abs(np.cos(angle) / across) ** 2.4 + np.abs(np.sin(angle) / deep) ** 2.4) ** (-1 / 2.4)
    y = patient.cavity_centre(height) + reach * np.sin(angle)
    x = side * np.maximum(reach * np.cos(angle), 14)
    return np.column_stack([z, y, x])


def _processes(patient: PhantomPatient) -> list[Tubes]:
    """Spinous and transverse processes of each vertebra."""
    tubes = []
    for number in range(-7, 7):
        z = (number + 0.5) * VERTEBRA_MM
        y = float(patient.spine(np.array([z], np.float32))[0])
        spinous = [(z - 2, y + 32, 0), (z - 12, y + 45, 0), (z - 20, y + 54, 0)]
        tubes.append(tubes_along(patient.unbend(spinous), [3.6, 2.8, 3.4]))
        for side in (-1, 1):
            transverse = [(z, y + 20, side * 12), (z + 2, y + 27, side * 30)]
            tubes.append(tubes_along(patient.unbend(transverse), [4.5, 4.0]))
    return tubes
