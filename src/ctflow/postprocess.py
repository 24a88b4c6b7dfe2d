"""From logits to a label map, and from a label map to measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from scipy.spatial import ConvexHull, QhullError
from torch import Tensor
from torch.nn import functional

from ctflow.errors import BundleInvalid
from ctflow.model import ModelSpec, Segment
from ctflow.networks.head import is_two_class
from ctflow.volume import FloatArray, Geometry

MOST_FINDINGS = 100  # more are counted, not listed
_TOUCHING = np.ones((3, 3, 3), bool)  # 26 neighbours, so that a thin oblique vessel of voxels is one component

Labels = npt.NDArray[np.uint8]


def probabilities_from_logits(logits: Tensor, spec: ModelSpec) -> Tensor:
    """Turn blended logits into probabilities on the network's grid.

    Args:
        logits: (1, C, X, Y, Z) float32; of two-class softmax also (1, 1, X, Y, Z), logit 1 minus logit 0.
        spec: The model's activation and channels.

    Returns:
        (C, X, Y, Z) float32; for two-class softmax (1, X, Y, Z), the probability of class 1, which says the same.

    Raises:
        BundleInvalid: The network returned NaN or infinity, or another number of channels than the bundle says.
    """
    folded = is_two_class(spec) and logits.shape[1] == 1
    if logits.shape[1] != spec.out_channels and not folded:
        raise BundleInvalid(f"the network returned {logits.shape[1]} channels; the bundle says {spec.out_channels}")
    if not bool(torch.isfinite(logits).all()):
        raise BundleInvalid("the network returned values that are not finite: its weights or precision do not suit it")
    if spec.activation == "softmax":
        if is_two_class(spec):
            return torch.sigmoid(logits[0] if folded else logits[0, 1:2] - logits[0, 0:1])
        return torch.softmax(logits[0], dim=0)
    return torch.sigmoid(logits[0]) if spec.activation == "sigmoid" else logits[0]


def labels_from_probabilities(probabilities: Tensor, spec: ModelSpec) -> Tensor:
    """Mark voxels.

    Args:
        probabilities: (C, D, H, W), as `probabilities_from_logits` gives them, on any grid.
        spec: The model's threshold.

    Returns:
        (D, H, W) uint8 on the same device; 0 is background.
    """
    if is_two_class(spec):
        labels = probabilities[0] > 0.5
    elif spec.threshold is None:
        labels = probabilities.argmax(dim=0)
    else:
        # MONAI's AsDiscrete: at the threshold a voxel is marked.
        labels = probabilities[0] >= spec.threshold
    return labels.to(torch.uint8)


def labels_on_host(labels: Tensor, spec: ModelSpec) -> Labels:
    """Bring labels to the CPU; of a mask, an eighth of the bytes leaves a GPU.

    Args:
        labels: (D, H, W) uint8 on any device, as `labels_from_probabilities` gives them.
        spec: Whether it is a mask.

    Returns:
        (D, H, W) uint8; of labels on the CPU it shares the memory.
    """
    if labels.device.type == "cpu":
        on_host: Labels = labels.numpy()
        return on_host
    if is_two_class(spec) or spec.threshold is not None:
        return mask_from_bits(_copied(bits_from_mask(labels)), tuple(labels.shape))
    return _copied(labels)


def _copied(values: Tensor) -> Labels:
    host = values.to("cpu", non_blocking=True)  # torch takes pinned memory for it
    if values.is_cuda:
        torch.cuda.current_stream(values.device).synchronize()
    copied: Labels = host.numpy()
    return copied


def bits_from_mask(mask: Tensor) -> Tensor:
    """Pack a mask, eight voxels a byte.

    Args:
        mask: uint8 of any shape and on any device, 0 or 1.

    Returns:
        (ceil(voxels / 8),) uint8 on the same device; the first voxel is the highest bit, as in `numpy.packbits`.
    """
    flat = functional.pad(mask.flatten(), (0, -mask.numel() % 8)).view(-1, 8)
    places = torch.arange(7, -1, -1, dtype=torch.uint8, device=mask.device)
    return torch.bitwise_left_shift(flat, places).sum(dim=1, dtype=torch.uint8)


def mask_from_bits(bits: npt.NDArray[np.uint8], shape: tuple[int, ...]) -> Labels:
    """The mask of `shape` that `bits_from_mask` packed."""
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True)
class Finding:
    """One connected component.

    Attributes:
        volume_ml: Voxels times the voxel's volume.
        longest_diameter_mm: Largest distance between two of its voxel centres; 0 for a single voxel.
        centroid_mm: Mean of its voxel centres, LPS.
    """

    volume_ml: float
    longest_diameter_mm: float
    centroid_mm: tuple[float, float, float]


@dataclass(frozen=True)
class SegmentMeasurements:
    """What was marked of one segment.

    Attributes:
        number: The segment's value in the label map.
        label: Its name.
        voxels: Marked voxels.
        volume_ml: Their volume.
        longest_diameter_mm: The largest of its components' diameters; None if nothing is marked.
        centroid_mm: Mean of all marked voxel centres, LPS; None if nothing is marked.
        components: Connected components (26 neighbours).
        findings: The largest `MOST_FINDINGS` components, by volume, then by place.
        findings_left_out: How many more there are.
    """

    number: int
    label: str
    voxels: int
    volume_ml: float
    longest_diameter_mm: float | None
    centroid_mm: tuple[float, float, float] | None
    components: int
    findings: tuple[Finding, ...]
    findings_left_out: int


def measure_segments(
    labels: Labels, geometry: Geometry, segments: Sequence[Segment]
) -> tuple[SegmentMeasurements, ...]:
    """Measure every segment of a label map.

    Args:
        labels: (D, H, W) uint8.
        geometry: Where its voxels lie.
        segments: What the label values mean.

    Returns:
        One entry a segment, also for those of which nothing is marked.
    """
    return tuple(_measure(labels, geometry, segment) for segment in segments)


def _measure(labels: Labels, geometry: Geometry, segment: Segment) -> SegmentMeasurements:
    box = _bounding_box(labels == segment.number)
    if box is None:
        return SegmentMeasurements(segment.number, segment.label, 0, 0.0, None, None, 0, (), 0)
    mask = labels[box] == segment.number
    corner = np.array([axis.start for axis in box])
    components, count = ndimage.label(mask, structure=_TOUCHING)
    voxels = np.bincount(components.ravel(), minlength=count + 1)[1:]
    largest = np.argsort(-voxels, kind="stable")[:MOST_FINDINGS]
    places = ndimage.find_objects(components)
    findings = tuple(
        _finding(components[places[index]] == index + 1, corner + [s.start for s in places[index]], geometry)
        for index in largest
    )
    # The longest diameter of all may belong to a thin component that is not among the largest by volume.
    longest = max(finding.longest_diameter_mm for finding in findings)
    for index in _worth_measuring(places, geometry, longest, set(largest.tolist())):
        offset = corner + [s.start for s in places[index]]
        longest = max(longest, _finding(components[places[index]] == index + 1, offset, geometry).longest_diameter_mm)
    centre = geometry.world_from_index(np.argwhere(mask).mean(axis=0) + corner)
    return SegmentMeasurements(
        segment.number,
        segment.label,
        int(voxels.sum()),
        float(voxels.sum()) * geometry.voxel_ml,
        longest,
        (float(centre[0]), float(centre[1]), float(centre[2])),
        int(count),
        findings,
        int(count) - len(findings),
    )


def _worth_measuring(
    places: Sequence[tuple[slice, ...]], geometry: Geometry, longest_mm: float, done: set[int]
) -> list[int]:
    """Components whose bounding box is longer than the longest diameter so far."""
    sizes = np.array([[s.stop - s.start - 1 for s in place] for place in places])
    corners = np.array([[1, b, c] for b in (-1, 1) for c in (-1, 1)])  # a sheared box has four diagonals
    diagonals = (sizes[:, None, :] * corners[None]) @ geometry.affine_mm[:3, :3].T
    reach = np.linalg.norm(diagonals, axis=2).max(axis=1)
    return [int(index) for index in np.flatnonzero(reach > longest_mm) if int(index) not in done]


def _bounding_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice, slice] | None:
    spans = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        marked = np.flatnonzero(mask.any(axis=others))
        if not len(marked):
            return None
        spans.append(slice(int(marked[0]), int(marked[-1]) + 1))
    return spans[0], spans[1], spans[2]


def _finding(mask: npt.NDArray[np.bool_], offset: npt.NDArray[np.int64], geometry: Geometry) -> Finding:
    index = np.argwhere(mask) + offset
    x, y, z = geometry.world_from_index(index.mean(axis=0))
    diameter = longest_distance_mm(geometry.world_from_index(_ends_of_rows(mask) + offset))
    return Finding(len(index) * geometry.voxel_ml, diameter, (float(x), float(y), float(z)))


def _ends_of_rows(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """First and last marked voxel of each row: no other voxel can be a corner of the convex hull."""
    rows = np.argwhere(mask.any(axis=2))
    lines = mask[rows[:, 0], rows[:, 1]]
    first = lines.argmax(axis=1)
    last = lines.shape[1] - 1 - lines[:, ::-1].argmax(axis=1)
    ends: npt.NDArray[np.int64] = np.concatenate([np.column_stack([rows, first]), np.column_stack([rows, last])])
    return ends


def longest_distance_mm(points_mm: FloatArray) -> float:
    """Largest distance between two of (n, 3) points, in mm (exact: through the convex hull's corners)."""
    if len(points_mm) > 32:
        try:
            points_mm = points_mm[ConvexHull(points_mm).vertices]
        except QhullError:  # flat or straight: no hull in three dimensions
            points_mm = _flat_hull(points_mm)
    longest = 0.0
    for start in range(0, len(points_mm), 1024):
        steps = points_mm[start : start + 1024, None] - points_mm[None]
        longest = max(longest, float(np.einsum("ijk,ijk->ij", steps, steps).max()))
    return float(np.sqrt(longest))


def _flat_hull(points_mm: FloatArray) -> FloatArray:
    """Corners of a point set that lies in a plane or on a line."""
    centred = points_mm - points_mm.mean(axis=0)
    _, size, axes = np.linalg.svd(centred, full_matrices=False)
    if size[1] <= 1e-9 * size[0]:
        along = centred @ axes[0]
        ends: FloatArray = points_mm[[int(along.argmin()), int(along.argmax())]]
        return ends
    corners: FloatArray = points_mm[ConvexHull(centred @ axes[:2].T).vertices]
    return corners
