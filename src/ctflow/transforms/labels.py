"""Steps on a label map: components, holes, values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ctflow.core.steps import FillHoles, FilterLabels, KeepLargest, LabelStep, MapLabels, RemoveSmall
from ctflow.core.volume import Labels

Marked = npt.NDArray[np.bool_]


def apply_label_steps(labels: Labels, steps: Sequence[LabelStep]) -> Labels:
    """Apply steps to a label map, in order.

    Args:
        labels: (X, Y, Z) uint8, axes in MONAI's order: of components of one size the last found is kept.
        steps: See `ModelSpec`.

    Returns:
        The same shape; the given array is not changed.

    Source: MONAI 1.6.1 `KeepLargestConnectedComponent`, `RemoveSmallObjects`, `FillHoles`, `LabelFilter`,
    `MapLabelValue`.
    """
    for step in steps:
        labels = _STEPS[type(step)](labels, step)
    return labels


def in_voxels(steps: Sequence[LabelStep], spacing_mm: Sequence[float]) -> tuple[LabelStep, ...]:
    """Steps whose volumes in mm3 are numbers of voxels of this spacing."""
    voxel = float(np.prod(spacing_mm))
    return tuple(
        replace(step, least=math.ceil(step.least / voxel), in_mm3=False)
        if isinstance(step, RemoveSmall) and step.in_mm3
        else step
        for step in steps
    )


def _present(labels: Labels, wanted: Iterable[int] | None) -> list[int]:
    present = [int(value) for value in np.unique(labels) if value]
    return present if wanted is None else [value for value in wanted if value in present and value]


def _keep_largest(labels: Labels, step: KeepLargest) -> Labels:
    labels, found = labels.copy(), _present(labels, step.labels)
    for group in [[value] for value in found] if step.independent else [found]:
        foreground = np.isin(labels, group)
        labels[foreground & ~_largest(foreground, step.connectivity, step.count)] = 0
    return labels


def _components(mask: Marked, connectivity: int) -> tuple[npt.NDArray[np.int32], int]:
    numbered, count = ndimage.label(mask, ndimage.generate_binary_structure(3, connectivity))
    return numbered, count


def _largest(mask: Marked, connectivity: int, count: int) -> Marked:
    numbered, found = _components(mask, connectivity)
    if found <= count:
        return mask
    sizes = np.bincount(numbered.reshape(-1))
    sizes[0] = 0
    kept = np.zeros(len(sizes), bool)
    kept[np.argsort(sizes)[::-1][:count]] = True
    return kept[numbered]


def _remove_small(labels: Labels, step: RemoveSmall) -> Labels:
    if step.independent and labels.max(initial=0) > 1:  # MONAI takes each label for one object
        sizes = np.bincount(labels.reshape(-1))
        kept = sizes >= step.least
        return np.where(kept[labels], labels, 0).astype(np.uint8)
    numbered, _ = _components(labels > 0, step.connectivity)
    kept = np.bincount(numbered.reshape(-1)) >= step.least
    return np.where(kept[numbered], labels, 0).astype(np.uint8)


def _fill_holes(labels: Labels, step: FillHoles) -> Labels:
    labels = labels.copy()
    structure = ndimage.generate_binary_structure(3, step.connectivity)
    for value in _present(labels, step.labels):
        reached = ndimage.binary_propagation(
            np.zeros(labels.shape, bool), structure=structure, mask=labels != value, border_value=1
        )
        labels[~reached] = value
    return labels


def _filter(labels: Labels, step: FilterLabels) -> Labels:
    return np.where(np.isin(labels, step.labels), labels, 0).astype(np.uint8)


def _map(labels: Labels, step: MapLabels) -> Labels:
    table = np.arange(256, dtype=np.uint8)
    for value, other in step.pairs:
        table[value] = other
    return table[labels]


_STEPS: Mapping[type, Callable[[Labels, Any], Labels]] = {
    KeepLargest: _keep_largest,
    RemoveSmall: _remove_small,
    FillHoles: _fill_holes,
    FilterLabels: _filter,
    MapLabels: _map,
}
