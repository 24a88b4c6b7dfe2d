"""Logits on the network's grid -> labels, and fractions, on the source's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctflow.core.model import ModelSpec
from ctflow.core.progress import Progress
from ctflow.core.steps import LabelStep
from ctflow.core.volume import Labels, Size3
from ctflow.transforms.labels import apply_label_steps
from ctflow.transforms.postprocess import (
    bytes_on_host,
    count_of_values,
    fractions_from_restored,
    labels_from_probabilities,
    labels_from_restored,
    probabilities_from_logits,
    values_to_restore,
)
from ctflow.transforms.restore import SourceSlabs, restore_labels
from ctflow.transforms.state import Prepared
from ctflow.window.cells import CellMask

KnownParts = Sequence[CellMask | None]
_ROWS = 8  # of the network's grid whose labels are taken at once


def finished(
    prepared: Prepared,
    logits: Tensor,
    spec: ModelSpec,
    parts: KnownParts,
    shape: Size3,
    *,
    fractional: bool,
    progress: Progress,
) -> tuple[Labels, Labels | None]:
    """Labels on the source grid, and fractions if asked for, of the logits of a whole volume; see `Finishing`."""
    finishing = Finishing(prepared, spec, parts, shape, fractional=fractional, progress=progress)
    finishing.take(slice(0, logits.shape[2 + finishing.axis]), logits)
    return finishing.result()


def axis_of_blocks(prepared: Prepared, spec: ModelSpec) -> int:
    """The axis of the network's grid along which a volume's logits may come in blocks."""
    return 0 if spec.restored == "labels" else prepared.source_axes.index(0)


class Finishing:
    """Labels on the source grid, and each segment's fraction if asked for, of logits that come whole or in blocks.

    A slab of source slices is finished as soon as there are all logits that it needs, so that only labels are kept.

    Args:
        prepared: The network's input and the way back.
        spec: The model's post-processing.
        parts: Outside each of the known ones both are 0: there, windows are missing or show nothing.
        shape: The source's.
        fractional: Whether fractions are asked for.
        progress: Receives source slices.

    Attributes:
        axis: The axis along which blocks follow each other.
    """

    def __init__(
        self,
        prepared: Prepared,
        spec: ModelSpec,
        parts: KnownParts,
        shape: Size3,
        *,
        fractional: bool,
        progress: Progress,
    ) -> None:
        self.axis = axis_of_blocks(prepared, spec)
        self._spec, self._fractional = spec, fractional
        to_source = _NearestLabels if spec.restored == "labels" else _RestoredSlabs
        self._to_source: _NearestLabels | _RestoredSlabs = to_source(
            prepared, spec, parts, shape, fractional and _has_probabilities(spec), progress
        )

    def take(self, rows: slice, logits: Tensor) -> None:
        """Take a block.

        Args:
            rows: Its rows along `axis`; the first block begins at 0, every other where the one before it ended.
            logits: (1, C, X, Y, Z) float32 on the network's grid, with these rows only; not kept.

        Raises:
            BundleInvalid: See `probabilities_from_logits`.
        """
        self._to_source.take(rows, logits)

    def result(self) -> tuple[Labels, Labels | None]:
        """(D, H, W) uint8, and (S, D, H, W) uint8 or None, once all blocks have been taken."""
        spec = self._spec
        found, fractions = self._to_source.result()
        labels = bytes_on_host(found)
        if spec.label_steps:
            labels = _stepped(labels, spec.label_steps)
        if not self._fractional or (fractions is not None and not spec.label_steps):
            return labels, None if fractions is None else bytes_on_host(fractions)
        return labels_and_masks(labels, spec, self._fractional)


def _has_probabilities(spec: ModelSpec) -> bool:
    """Whether a voxel of the result has probabilities: logits and votes do not."""
    return spec.activation != "none" and spec.network.combined != "votes"


def labels_and_masks(labels: Labels, spec: ModelSpec, fractional: bool) -> tuple[Labels, Labels | None]:
    """Labels without probabilities and, if fractions are asked for, 255 where a segment is marked."""
    if not fractional:
        return labels, None
    marked = torch.from_numpy(labels)
    of_labels = torch.stack([(marked == segment.number) * 255 for segment in spec.segments]).byte()
    return labels, bytes_on_host(of_labels)


class _NearestLabels:
    """Labels on the network's grid, a few rows at a time, and of the nearest voxel on the source's."""

    def __init__(
        self, prepared: Prepared, spec: ModelSpec, parts: KnownParts, shape: Size3, _: bool, progress: Progress
    ) -> None:
        self._prepared, self._spec, self._parts, self._progress = prepared, spec, parts, progress
        grid = prepared.tensor
        self._labels = torch.empty(grid.shape[2:], dtype=torch.uint8, device=grid.device)

    def take(self, rows: slice, logits: Tensor) -> None:
        for start in range(rows.start, rows.stop, _ROWS):
            some = logits[:, :, start - rows.start : min(start + _ROWS, rows.stop) - rows.start]
            marked = labels_from_probabilities(probabilities_from_logits(some, self._spec), self._spec)
            self._labels[start : start + len(marked)] = marked

    def result(self) -> tuple[Tensor, None]:
        labels = self._labels
        if self._spec.network_label_steps:
            stepped = apply_label_steps(labels.cpu().numpy(), self._spec.network_label_steps)
            labels = torch.from_numpy(stepped).to(labels.device)
        found = restore_labels(self._prepared, labels).contiguous()
        for part in self._parts:
            if part is not None:
                for d in range(len(found)):
                    found[d : d + 1] *= part.mask_of_slices(slice(d, d + 1))
        self._progress("restore", len(found), len(found))
        return found, None


class _RestoredSlabs:
    """Probabilities (or logits) resampled linearly, then thresholded, a few slices at a time.

    Logits without an activation and votes have no fractions; labels do, which `Finishing` makes.
    """

    def __init__(
        self,
        prepared: Prepared,
        spec: ModelSpec,
        parts: KnownParts,
        shape: Size3,
        fractional: bool,
        progress: Progress,
    ) -> None:
        device = prepared.tensor.device
        self._prepared, self._spec, self._parts, self._progress = prepared, spec, parts, progress
        self._is_scaled = fractional
        self._labels = torch.empty(shape, dtype=torch.uint8, device=device)
        count = len(spec.segments) if fractional else 0
        self._fractions = torch.empty((count, *shape), dtype=torch.uint8, device=device)
        self._slabs: SourceSlabs | None = None
        self._waiting: list[tuple[slice, slice]] = []
        self._kept: tuple[int, Tensor] | None = None  # the last rows of earlier blocks, and the first one's number
        self._done = 0

    def take(self, rows: slice, logits: Tensor) -> None:
        if self._slabs is None:
            channels = count_of_values(logits.shape[1], self._spec, fractional=self._is_scaled)
            self._slabs = SourceSlabs(self._prepared, channels, logits.device)
            self._waiting = sorted(self._slabs.rows, key=lambda slab: slab[1].stop)  # an axis may be flipped
            self._progress("restore", 0, len(self._labels))
        block = (rows.start, logits)
        while self._waiting and self._waiting[0][1].stop <= rows.stop:
            source, used = self._waiting.pop(0)
            self._finish(self._slabs, source, self._rows(used, block))
        still = min([used.start for _, used in self._waiting], default=rows.stop)
        kept = slice(still, rows.stop)
        self._kept = (still, self._rows(kept, block).clone()) if still < rows.stop else None

    def _rows(self, wanted: slice, block: tuple[int, Tensor]) -> Tensor:
        """Rows of the kept ones and the block."""
        axis, pieces = 2 + axis_of_blocks(self._prepared, self._spec), []
        for first, logits in (self._kept, block) if self._kept else (block,):
            low, high = max(wanted.start, first), min(wanted.stop, first + logits.shape[axis])
            if low < high:
                pieces.append(logits.narrow(axis, low - first, high - low))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=axis)

    def _finish(self, slabs: SourceSlabs, rows: slice, logits: Tensor) -> None:
        spec, labels, fractions = self._spec, self._labels, self._fractions
        slab = slabs.slab(values_to_restore(logits, spec, fractional=self._is_scaled), rows)
        has_ones = self._is_scaled and spec.restored == "logits"
        labels[rows] = labels_from_restored(slab[:-1] if has_ones else slab, spec)
        if self._is_scaled:
            fractions[:, rows] = fractions_from_restored(slab, labels[rows], spec)
        for part in self._parts:
            if part is not None:
                inside = part.mask_of_slices(rows)
                labels[rows] *= inside
                fractions[:, rows] *= inside
        self._done += rows.stop - rows.start
        self._progress("restore", self._done, len(labels))

    def result(self) -> tuple[Tensor, Tensor | None]:
        return self._labels, self._fractions if self._is_scaled else None


def _stepped(labels: Labels, steps: Sequence[LabelStep]) -> Labels:
    """Steps on the source grid, in the order of axes that MONAI's readers give."""
    found: Labels = apply_label_steps(labels.transpose(2, 1, 0), steps).transpose(2, 1, 0).copy()
    return found
