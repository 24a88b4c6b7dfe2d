"""Logits on the network's grid -> labels, and fractions, on the source's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctflow.core.model import ModelSpec
from ctflow.core.progress import Progress
from ctflow.core.steps import LabelStep
from ctflow.core.volume import Labels
from ctflow.transforms.labels import apply_label_steps
from ctflow.transforms.postprocess import (
    bytes_on_host,
    fractions_from_restored,
    labels_from_probabilities,
    labels_from_restored,
    probabilities_from_logits,
    values_to_restore,
)
from ctflow.transforms.restore import restore_labels, restore_slabs
from ctflow.transforms.state import Prepared
from ctflow.window.cells import CellMask

KnownParts = Sequence[CellMask | None]
_ROWS = 8  # of the network's grid whose labels are taken at once


def finished(
    prepared: Prepared,
    logits: Tensor,
    spec: ModelSpec,
    parts: KnownParts,
    shape: tuple[int, ...],
    *,
    fractional: bool,
    progress: Progress,
) -> tuple[Labels, Labels | None]:
    """Labels on the source grid, and each segment's fraction if asked for.

    Args:
        prepared: The network's input and the way back.
        logits: (1, C, X, Y, Z) float32 on the network's grid.
        spec: The model's post-processing.
        parts: Outside each of the known ones both are 0: there, windows are missing or show nothing.
        shape: The source's.
        fractional: Whether fractions are asked for.
        progress: Receives source slices.

    Returns:
        (D, H, W) uint8, and (S, D, H, W) uint8 or None.
    """
    if spec.restored == "labels":
        found = _restored_labels(prepared, logits, spec, parts)
        progress("restore", len(found), len(found))
        fractions = None
    else:
        found, fractions = _restored_probabilities(prepared, logits, spec, parts, shape, fractional, progress)
    labels = bytes_on_host(found)
    if spec.label_steps:
        labels = _stepped(labels, spec.label_steps)
    if not fractional or (fractions is not None and not spec.label_steps):
        return labels, None if fractions is None else bytes_on_host(fractions)
    marked = torch.from_numpy(labels)
    return labels, bytes_on_host(torch.stack([(marked == segment.number) * 255 for segment in spec.segments]).byte())


def _restored_labels(prepared: Prepared, logits: Tensor, spec: ModelSpec, parts: KnownParts) -> Tensor:
    """Labels on the network's grid, a few rows at a time, and of the nearest voxel on the source's."""
    labels = torch.empty(logits.shape[2:], dtype=torch.uint8, device=logits.device)
    for start in range(0, len(labels), _ROWS):
        rows = slice(start, start + _ROWS)
        labels[rows] = labels_from_probabilities(probabilities_from_logits(logits[:, :, rows], spec), spec)
    if spec.network_label_steps:
        stepped = apply_label_steps(labels.cpu().numpy(), spec.network_label_steps)
        labels = torch.from_numpy(stepped).to(logits.device)
    found = restore_labels(prepared, labels).contiguous()
    for part in parts:
        if part is not None:
            for d in range(len(found)):
                found[d : d + 1] *= part.mask_of_slices(slice(d, d + 1))
    return found


def _restored_probabilities(
    prepared: Prepared,
    logits: Tensor,
    spec: ModelSpec,
    parts: KnownParts,
    shape: tuple[int, ...],
    fractional: bool,
    progress: Progress,
) -> tuple[Tensor, Tensor | None]:
    """Probabilities (or logits) resampled linearly, then thresholded, a few slices at a time."""
    # Logits without an activation have no fractions; labels do, which `finished` makes.
    is_scaled = fractional and spec.activation != "none"
    values = values_to_restore(logits, spec, fractional=is_scaled)
    has_ones = is_scaled and spec.restored == "logits"
    labels = torch.empty(shape, dtype=torch.uint8, device=logits.device)
    count = len(spec.segments) if is_scaled else 0
    fractions = torch.empty((count, *shape), dtype=torch.uint8, device=logits.device)
    progress("restore", 0, len(labels))
    for rows, slab in restore_slabs(prepared, values):
        labels[rows] = labels_from_restored(slab[:-1] if has_ones else slab, spec)
        if count:
            fractions[:, rows] = fractions_from_restored(slab, labels[rows], spec)
        for part in parts:
            if part is not None:
                inside = part.mask_of_slices(rows)
                labels[rows] *= inside
                fractions[:, rows] *= inside
        progress("restore", rows.stop, len(labels))
    return labels, fractions if is_scaled else None


def _stepped(labels: Labels, steps: Sequence[LabelStep]) -> Labels:
    """Steps on the source grid, in the order of axes that MONAI's readers give."""
    found: Labels = apply_label_steps(labels.transpose(2, 1, 0), steps).transpose(2, 1, 0).copy()
    return found
