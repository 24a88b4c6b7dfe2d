"""Branching trees that fill the lungs: arteries with accompanying airways, and veins."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ctflow.phantom.body.anatomy import joined
from ctflow.phantom.body.patient import PhantomPatient
from ctflow.phantom.grid import Field
from ctflow.phantom.paint import Points, Tubes, tubes_along

_TWIG_MM = 0.46  # radius of the last branches; Murray's law gives all others
_STEP = 0.42  # how far a branch goes towards the centre of the region it feeds (Kitaoka et al. 1999)
_LEAVES = 1400  # per tree and lung


@dataclass(frozen=True, eq=False)
class Trees:
    """Tubes: arteries, veins and airways (their lumen) in the lungs, and the trachea with the main bronchi."""

    arteries: Tubes
    veins: Tubes
    airways: Tubes
    trachea: Tubes


def trees_from_lungs(rng: np.random.Generator, patient: PhantomPatient, lung: Field, share: float = 1.0) -> Trees:
    """Grow all trees.

    Args:
        rng: Draws the ends of the twigs.
        patient: Gives the hila.
        lung: Signed distance to the lungs.
        share: Share of the lungs that the grid shows, and of the twigs to grow.

    Returns:
        The trees of both lungs, and the trachea.
    """
    arteries, veins, airways = [], [], []
    for side in (-1, 1):
        leaves = _points_in_lung(rng, lung, side, int(2 * _LEAVES * share))
        if len(leaves) < 8:
            continue
        hilum = patient.unbend([(12.0, 8.0, side * 40.0)])[0]
        artery = _grow(rng, leaves[::2], hilum)
        arteries.append(artery)
        veins.append(_grow(rng, leaves[1::2], patient.unbend([(-10.0, 2.0, side * 36.0)])[0]))
        airways.append(_beside(artery, hilum))
    if not arteries:
        none = Tubes(np.zeros((0, 3)), np.zeros((0, 3)), np.zeros((0, 2)))
        return Trees(none, none, none, _trachea(patient))
    return Trees(joined(arteries), joined(veins), joined(airways), _trachea(patient))


def _trachea(patient: PhantomPatient) -> Tubes:
    """Trachea and main bronchi down to the hila."""
    down = tubes_along(patient.unbend([(170, 4, 0), (120, 10, 0), (80, 14, 2), (42, 16, 2)]), 8.5)
    right = tubes_along(patient.unbend([(44, 16, 0), (28, 14, -22), (14, 11, -40)]), [7.5, 7, 6])
    left = tubes_along(patient.unbend([(44, 16, 4), (24, 14, 26), (12, 10, 41)]), [7, 6.5, 5.5])
    return joined([down, right, left])


def _points_in_lung(rng: np.random.Generator, lung: Field, side: int, count: int) -> Points:
    """Random points at least 4 mm inside one lung; jitter makes them denser than the coarse grid."""
    z, y, x = lung.coarse_grid.lines_mm
    inside = np.argwhere(lung.coarse_values < -4)
    inside = inside[np.sign(x[inside[:, 2]]) == side]
    if not len(inside):
        return np.zeros((0, 3))
    chosen = inside[rng.integers(len(inside), size=count)]
    points = np.column_stack([z[chosen[:, 0]], y[chosen[:, 1]], x[chosen[:, 2]]]).astype(np.float64)
    jittered: Points = points + rng.uniform(-1.5, 1.5, points.shape)
    return jittered


def _grow(rng: np.random.Generator, leaves: Points, root: Points) -> Tubes:
    """A tree from the root to every leaf: halve the leaves, grow towards the centre of each half, repeat."""
    starts, ends, radii = [], [], []
    stack = [(root, leaves)]
    while stack:
        here, group = stack.pop()
        for half in _halves(rng, group):
            middle = half.mean(axis=0)
            there = half[0] if len(half) == 1 else here + (middle - here) * _STEP + rng.normal(0, 0.6, 3)
            # Murray (1926): the cube of a radius is the sum of its branches' cubes.
            first = _TWIG_MM * len(half) ** (1 / 3)
            starts.append(here)
            ends.append(there)
            radii.append((first, first if len(half) > 1 else 0.6 * first))
            if len(half) > 1:
                stack.append((there, half))
    return Tubes(np.array(starts), np.array(ends), np.array(radii))


def _halves(rng: np.random.Generator, group: Points) -> tuple[Points, ...]:
    """Two unequal halves across the longest extent."""
    if len(group) == 1:
        return (group,)
    centred = group - group.mean(axis=0)
    axis = np.linalg.svd(centred, full_matrices=False)[2][0] if len(group) > 2 else centred[1] - centred[0]
    order = np.argsort(centred @ axis)
    cut = int(np.clip(round(len(group) * rng.uniform(0.3, 0.7)), 1, len(group) - 1))
    return group[order[:cut]], group[order[cut:]]


def _beside(artery: Tubes, hilum: npt.NDArray[np.float64]) -> Tubes:
    """Airways: they accompany the arteries, equally wide, and are visible down to about 1 mm."""
    large = artery.chosen(artery.radii_mm[:, 0] > 1.15)
    aside = np.array([0.55, -0.75, 0.35 * -np.sign(hilum[2])])
    shift_first, shift_last = (2.05 * large.radii_mm[:, [end]] * aside for end in (0, 1))
    return Tubes(large.starts_mm + shift_first, large.ends_mm + shift_last, 0.8 * large.radii_mm)
