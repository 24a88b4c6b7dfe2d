"""Reorder and flip the axes as the network needs them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ctflow.transforms.state import OUTSIDE, GridState


def orientation_from_affine(affine: npt.ArrayLike) -> list[tuple[int, int]]:
    """The nearest patient axis (0 = R, 1 = A, 2 = S) of each array axis, and its sign.

    Args:
        affine: (4, 4) index -> RAS mm, invertible.

    Source: `nibabel.orientations.io_orientation` (nearest orthogonal matrix, then the strongest column first).
    """
    matrix = np.asarray(affine, dtype=np.float64)[:3, :3]
    u, _, vt = np.linalg.svd(matrix / np.linalg.norm(matrix, axis=0))
    rotation = u @ vt
    found = [(0, 0)] * 3
    for axis in np.argsort(np.min(-(rotation**2), axis=0)):
        column = rotation[:, axis]
        patient = int(np.argmax(np.abs(column)))
        found[int(axis)] = (patient, -1 if column[patient] < 0 else 1)
        rotation[patient] = 0
    return found


def orient(state: GridState, axcodes: str) -> GridState:
    """Reorient the image to the axis codes."""
    wanted = [("RAS".find(code), 1) if code in "RAS" else ("LPI".find(code), -1) for code in axcodes]
    have = orientation_from_affine(state.affine)
    order = [next(axis for axis, (patient, _) in enumerate(have) if patient == target) for target, _ in wanted]
    flip = [have[axis][1] != sign for axis, (_, sign) in zip(order, wanted, strict=True)]
    return turned(state, order, flip)


def turned(state: GridState, order: Sequence[int], flip: Sequence[bool], *, moves_affine: bool = True) -> GridState:
    """Reorder and flip the axes.

    Args:
        state: The image.
        order: Which axis becomes each new one.
        flip: Whether each new axis is flipped.
        moves_affine: Whether the affine follows; else each new axis has that of the old one.
    """
    image, back, picks = state.image.permute(list(order)), [], []
    affine = state.affine[:, [*order, 3]].copy() if moves_affine else state.affine
    for axis, source in enumerate(order):
        matrix, taken = state.back[source], state.picks[source]
        if flip[axis]:
            if moves_affine:
                affine[:, 3] += affine[:, axis] * (image.shape[axis] - 1)
                affine[:, axis] *= -1
            matrix = matrix[:, ::-1]
            taken = np.where(taken >= 0, image.shape[axis] - 1 - taken, OUTSIDE)
        back.append(matrix)
        picks.append(taken)
    image = image.flip([axis for axis in range(3) if flip[axis]])
    a, b, c = (state.axes[axis] for axis in order)
    return GridState(image, affine, (a, b, c), (back[0], back[1], back[2]), (picks[0], picks[1], picks[2]))
