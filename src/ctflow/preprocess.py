"""From a CT volume to the network's input, and the exact way back to the source grid.

Every spatial step (orient, resample, crop) acts on each axis by itself, so the way back is one small matrix an axis:
it maps the network's grid to the source's. `restore_slabs` applies the three of them slab by slab.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.model import CropForeground, Normalize, Orient, Resample, ScalePercentiles, ScaleRange, Step
from ctflow.core.volume import LEAST_SHARE, PADDING_HU, FloatArray, Geometry, Size3, Volume

SAME_SPACING_MM = 1e-3  # MONAI's AFFINE_TOL: an axis this close to the wanted spacing keeps its own
LARGEST_VOXELS = 2**31  # of the network's grid: 8 GB as float32
_SLAB = 8  # slices handled at once; keeps 14 classes of 512 x 512 below 120 MB
_GPU_SLAB_BYTES = 2**28  # a GPU is quicker with more slices; each step of a slab takes at most this much
_CHUNK_BYTES = 2**25  # pinned at once for an upload


@dataclass(frozen=True, eq=False)
class Prepared:
    """The network's input and the way back.

    Attributes:
        tensor: (1, 1, X, Y, Z) float32 on the device, in the network's axes.
        source_axes: For each axis of the tensor, the axis of the source array (D, H, W) = (0, 1, 2).
        back: For each axis of the tensor, (source voxels, network voxels) float64 weights.
        spacing_mm: Distance of the tensor's voxel centres along each of its axes.
        upright: How a tilted source was set upright before all this; its voxels are then the upright ones. None where
            the source's axes are at right angles.
    """

    tensor: Tensor
    source_axes: tuple[int, int, int]
    back: tuple[FloatArray, FloatArray, FloatArray]
    spacing_mm: tuple[float, float, float]
    upright: Upright | None = None


@dataclass(frozen=True, eq=False)
class _State:
    image: Tensor  # (X, Y, Z), int16 until the first step that needs floats
    affine: FloatArray  # index (x, y, z) -> RAS mm
    axes: tuple[int, int, int]  # source axis of each of the image's
    back: tuple[FloatArray, FloatArray, FloatArray]  # (source voxels, image voxels) of each axis


def unseen(source: Tensor) -> None:
    """An `on_uploaded` that looks at nothing."""


def prepare_volume(
    volume: Volume, steps: Sequence[Step], device: str, on_uploaded: Callable[[Tensor], None] = unseen
) -> Prepared:
    """Prepare a volume as the bundle asks.

    Args:
        volume: CT in HU.
        steps: The bundle's preprocessing, in order.
        device: torch device; the volume is uploaded once, as it is.
        on_uploaded: Shown the volume's array in HU on the device, before any step; it neither changes nor keeps it.

    Returns:
        The network's input and the way back.

    Raises:
        UnsupportedPixels: A step leaves nothing of the volume, or values that are not finite.

    Source: MONAI 1.6.1 `Orientation`, `Spacing`, `ScaleIntensityRange(Percentiles)`, `NormalizeIntensity`,
    `CropForeground`, applied to the image as MONAI's readers load it: axes (W, H, D), RAS affine.
    """
    upright = upright_of_geometry(volume.geometry)
    source = _uploaded(volume.array, torch.device(device))
    on_uploaded(source)
    if upright is None:
        state = _state(source, volume.geometry.affine_mm)
    else:
        state = _state(_set_upright(source, upright), upright.geometry.affine_mm)
    del source  # of two volumes on the device one is enough
    for step in steps:
        state = _apply(state, step)
    image = state.image.to(torch.float32)
    if not bool(torch.isfinite(image).all()):
        raise UnsupportedPixels("preprocessing gave values that are not finite: the bundle's scaling does not suit CT")
    x_mm, y_mm, z_mm = np.linalg.norm(state.affine[:3, :3], axis=0).tolist()
    return Prepared(image.contiguous()[None, None], state.axes, state.back, (x_mm, y_mm, z_mm), upright)


def _state(array: Tensor, affine_mm: FloatArray) -> _State:
    """(D, H, W) with its LPS affine, as MONAI's readers give it, before any step."""
    image = array.permute(2, 1, 0)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine_mm[:, [2, 1, 0, 3]]
    x, y, z = (np.eye(size) for size in image.shape)
    return _State(image, affine, (2, 1, 0), (x, y, z))


def _uploaded(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """An array on the device; it reaches a GPU through pinned memory in chunks, and nothing waits for it."""
    source = torch.from_numpy(array)
    if device.type != "cuda":
        return source.to(device)
    uploaded = torch.empty(source.shape, dtype=source.dtype, device=device)
    rows = max(_CHUNK_BYTES * len(source) // source.nbytes, 1)
    for start in range(0, len(source), rows):
        # torch keeps the pinned chunk until its copy is done, and then takes the same memory for another.
        chunk = source[start : start + rows].pin_memory()
        uploaded[start : start + rows].copy_(chunk, non_blocking=True)
    return uploaded


def _apply(state: _State, step: Step) -> _State:
    if isinstance(step, Orient):
        return _orient(state, step.axcodes)
    if isinstance(step, Resample):
        return _resample(state, step.spacing_mm)
    if isinstance(step, CropForeground):
        return _crop(state, step.margin)
    image = state.image.to(torch.float32)
    if isinstance(step, ScaleRange):
        return replace(state, image=_scale(image, step))
    if isinstance(step, ScalePercentiles):
        return replace(state, image=_scale(image, _range_from_percentiles(image, step)))
    return replace(state, image=_normalize(image, step))


# --------------------------------------------------------------------------------------------------------- upright


@dataclass(frozen=True, eq=False)
class Upright:
    """A right-angled grid around a tilted one, with the same slices: each is displaced within its own plane.

    Attributes:
        geometry: The right-angled grid.
        rows: (D,) by how many of its rows each tilted slice begins below the grid's first row.
        columns: The same for columns.
    """

    geometry: Geometry
    rows: FloatArray
    columns: FloatArray


def upright_of_geometry(geometry: Geometry) -> Upright | None:
    """The smallest right-angled grid that holds every slice of a tilted one; None where nothing is tilted.

    Args:
        geometry: Slices that follow each other at an angle to their normal (gantry tilt: a sheared affine).

    Raises:
        UnsupportedPixels: That grid would be absurdly large.
    """
    if not geometry.is_tilted:
        return None
    affine, (depth, height, width) = geometry.affine_mm.copy(), geometry.shape
    (down, across), *_ = np.linalg.lstsq(affine[:3, 1:3], affine[:3, 0], rcond=None)
    rows, columns = np.arange(depth) * down, np.arange(depth) * across
    first_row, first_column = math.floor(rows.min()), math.floor(columns.min())
    affine[:3, 0] -= affine[:3, 1:3] @ [down, across]
    affine[:3, 3] += affine[:3, 1:3] @ [first_row, first_column]
    rows, columns = rows - first_row, columns - first_column
    shape = (depth, height + math.ceil(rows.max()), width + math.ceil(columns.max()))
    if math.prod(shape) > LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(f"upright, the tilted volume has {sizes} voxels: its PixelSpacing is implausible")
    return Upright(Geometry(shape, affine), rows, columns)


def upright_volume(volume: Volume) -> tuple[Volume, npt.NDArray[np.bool_]] | None:
    """A tilted volume on the smallest right-angled grid that holds all its slices; None where nothing is tilted.

    Args:
        volume: CT in HU on a sheared grid.

    Returns:
        The volume as `prepare_volume` sets it upright, float32, and (D, H, W) bool: which voxels no slice reaches. They
        repeat the slice's border. What padding had a share in is padding.
    """
    upright = upright_of_geometry(volume.geometry)
    if upright is None:
        return None
    array = _set_upright(torch.from_numpy(volume.array), upright).numpy()
    depth, height, width = volume.array.shape
    outside = np.ones(array.shape, bool)
    for d in range(depth):
        outside[d, _reached(upright.rows[d], height), _reached(upright.columns[d], width)] = False
    padding = None
    if volume.padding is not None:
        padding = _set_upright(torch.from_numpy(volume.padding.astype(np.float32)), upright).numpy() > LEAST_SHARE
        array[padding] = PADDING_HU
    return Volume(array, upright.geometry, padding), outside


def _reached(start: float, size: int) -> slice:
    """The voxels whose centres lie on one of `size` pixels, of which the first one's centre is at `start` >= 0."""
    return slice(math.ceil(start - 0.5), math.floor(start + size - 0.5) + 1)


def _set_upright(source: Tensor, upright: Upright) -> Tensor:
    """The slices on the right-angled grid, float32; beside a slice its border goes on, as MONAI's resampling does."""
    _, height, width = upright.geometry.shape
    result = torch.empty(upright.geometry.shape, device=source.device)
    for d, image in enumerate(source):
        rows = linear_weights(np.arange(height) - upright.rows[d], image.shape[0])
        columns = linear_weights(np.arange(width) - upright.columns[d], image.shape[1])
        result[d] = next(_slabs(image.to(torch.float32)[None, None], [np.eye(1), rows, columns]))[1][0, 0]
    return result


def _tilted_again(slab: Tensor, rows: slice, upright: Upright, size: tuple[int, int]) -> Tensor:
    """(C, slices, H', W') of the right-angled grid -> (C, slices, H, W) of the tilted source."""
    result = torch.empty((*slab.shape[:2], *size), device=slab.device)
    for index, d in enumerate(range(rows.start, rows.stop)):
        weights = [
            linear_weights(np.arange(count) + start, wide)
            for count, start, wide in zip(size, (upright.rows[d], upright.columns[d]), slab.shape[2:], strict=True)
        ]
        result[:, index : index + 1] = next(_slabs(slab[:, index : index + 1], [np.eye(1), *weights]))[1]
    return result


# ---------------------------------------------------------------------------------------------------------- orient


def orientation_from_affine(affine: npt.ArrayLike) -> list[tuple[int, int]]:
    """For each array axis the nearest axis of the patient (0 = R, 1 = A, 2 = S) and its sign.

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


def _orient(state: _State, axcodes: str) -> _State:
    wanted = [("RAS".find(code), 1) if code in "RAS" else ("LPI".find(code), -1) for code in axcodes]
    have = orientation_from_affine(state.affine)
    order = [next(axis for axis, (patient, _) in enumerate(have) if patient == target) for target, _ in wanted]
    flip = [have[axis][1] != sign for axis, (_, sign) in zip(order, wanted, strict=True)]
    image, affine, back = state.image.permute(order), state.affine[:, [*order, 3]].copy(), []
    for axis, source in enumerate(order):
        matrix = state.back[source]
        if flip[axis]:
            affine[:, 3] += affine[:, axis] * (image.shape[axis] - 1)
            affine[:, axis] *= -1
            matrix = matrix[:, ::-1]
        back.append(matrix)
    image = image.flip([axis for axis in range(3) if flip[axis]])
    a, b, c = (state.axes[axis] for axis in order)
    return _State(image, affine, (a, b, c), (back[0], back[1], back[2]))


# -------------------------------------------------------------------------------------------------------- resample


def _resample(state: _State, spacing_mm: tuple[float, float, float]) -> _State:
    affine, grid = _new_grid(state, spacing_mm)
    forward, back = [], []
    for axis, (old, new, new_size) in enumerate(grid):
        size = state.image.shape[axis]
        forward.append(linear_weights(np.arange(new_size) * (new / old), size))
        back.append(state.back[axis] @ linear_weights(np.arange(size) * (old / new), new_size))
    image = _interpolated(state.image, forward)
    return _State(image, affine, state.axes, (back[0], back[1], back[2]))


def _new_grid(
    state: _State, spacing_mm: tuple[float, float, float]
) -> tuple[FloatArray, list[tuple[float, float, int]]]:
    """The new grid's affine, and of each axis its old spacing, its new spacing and its new size."""
    spacings = []
    for axis, wanted in enumerate(spacing_mm):
        old = float(np.linalg.norm(state.affine[:3, axis]))
        spacings.append((old, old if wanted <= 0 or abs(old - wanted) <= SAME_SPACING_MM else wanted))
    affine, shape = _zoomed(state, [new for _, new in spacings])
    if math.prod(shape) > LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(
            f"at the model's spacing the volume has {sizes} voxels: its PixelSpacing is implausible"
        )
    return affine, [(old, new, size) for (old, new), size in zip(spacings, shape, strict=True)]


def _zoomed(state: _State, spacing_mm: list[float]) -> tuple[FloatArray, list[int]]:
    """The affine and shape of a grid with another spacing and the same first voxel.

    A size is often exactly between two numbers of voxels (each second series of 5 mm slices at 2 mm). Which of them
    MONAI takes hangs on its arithmetic's last bit, so that this is MONAI's arithmetic step for step.

    Source: MONAI 1.6.1 `zoom_affine` and `compute_shape_offset`.
    """
    old = state.affine[:3, :3]
    upper = np.linalg.cholesky(old.T @ old).T
    affine = state.affine.copy()
    affine[:3, :3] = (old @ np.linalg.inv(upper)) @ np.diag(np.sign(np.diag(upper)) * spacing_mm)
    unmoved = np.eye(4)
    unmoved[:3, :3] = affine[:3, :3]
    ends = np.meshgrid(*[(0.0, size - 1.0) for size in state.image.shape], indexing="ij")
    corners = np.concatenate((np.asarray(ends).reshape(3, -1), np.ones((1, 8))))
    corners = np.linalg.solve(unmoved, state.affine) @ corners
    return affine, [int(size) for size in np.round(np.ptp(corners[:3] / corners[3], axis=1) + 1.0)]


def linear_weights(positions: npt.ArrayLike, size: int) -> FloatArray:
    """Weights of linear interpolation along an axis.

    Args:
        positions: (n,) positions in voxels; those outside take the border's value.
        size: Voxels of the axis.

    Returns:
        (n, size) float64; each row sums to 1.
    """
    inside = np.clip(np.asarray(positions, dtype=np.float64), 0, size - 1)
    lower = np.minimum(np.floor(inside).astype(np.int64), max(size - 2, 0))
    fraction = inside - lower
    weights = np.zeros((len(inside), size))
    rows = np.arange(len(inside))
    weights[rows, lower] = 1 - fraction
    weights[rows, np.minimum(lower + 1, size - 1)] += fraction
    return weights


def _interpolated(image: Tensor, weights: Sequence[FloatArray]) -> Tensor:
    """(X, Y, Z) -> float32 of the weights' rows; walks along the axis that lies outermost in memory."""
    outer = int(np.argmax(image.stride()))
    rest = [axis for axis in range(3) if axis != outer]
    order = [outer, *rest]
    result = torch.empty([len(weights[axis]) for axis in order], device=image.device)
    for rows, slab in _slabs(image.permute(order)[None], [weights[axis] for axis in order]):
        result[rows] = slab[0]
    inverse = [order.index(axis) for axis in range(3)]
    return result.permute(inverse)


class _Axis:
    """The weights of one axis, on the device; where each row is one voxel as it is, no product is made.

    Args:
        weights: (rows, columns), on the host: which columns are used is known without asking the device.
        device: Where they are applied.
    """

    def __init__(self, weights: FloatArray, device: torch.device) -> None:
        self._host = weights
        self._weights: Tensor | None = None
        self._voxels: Tensor | None = None
        voxels = weights.argmax(axis=1)
        taken = weights[np.arange(len(weights)), voxels]
        if not ((taken == 1) & (np.count_nonzero(weights, axis=1) == 1)).all():
            self._weights = _uploaded(np.ascontiguousarray(weights, dtype=np.float32), device)
        elif not np.array_equal(voxels, np.arange(weights.shape[1])):
            self._voxels = _uploaded(voxels, device)  # turned round, or cut out

    def __len__(self) -> int:
        return len(self._host)

    def some(self, image: Tensor, rows: slice) -> Tensor:
        """(C, X, Y, Z) -> (C, rows, Y, Z) float32."""
        if self._weights is not None:
            used = np.flatnonzero(self._host[rows].any(axis=0))
            low, high = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
            part = image[:, low:high].to(torch.float32)
            return torch.einsum("rx,cxyz->cryz", self._weights[rows, low:high], part)
        part = image[:, rows] if self._voxels is None else image.index_select(1, self._voxels[rows])
        return part.to(torch.float32)

    def across(self, part: Tensor) -> Tensor:
        """(C, X, Y, Z) -> (C, X, rows, Z) float32."""
        if self._weights is not None:
            return torch.matmul(self._weights, part)
        return part if self._voxels is None else part.index_select(2, self._voxels)

    def along(self, part: Tensor) -> Tensor:
        """(C, X, Y, Z) -> (C, X, Y, rows) float32."""
        if self._weights is not None:
            return torch.matmul(part, self._weights.T)
        return part if self._voxels is None else part.index_select(3, self._voxels)


def _slabs(image: Tensor, weights: Sequence[FloatArray]) -> Iterator[tuple[slice, Tensor]]:
    """Apply the weights of each axis to (C, X, Y, Z), some rows of the first axis at a time; nothing waits for a GPU.

    A slab may share the image's memory.
    """
    first, second, third = (_Axis(matrix, image.device) for matrix in weights)
    at_once = _rows_at_once(image, (len(first), len(second), len(third)))
    for start in range(0, len(first), at_once):
        rows = slice(start, min(start + at_once, len(first)))
        yield rows, third.along(second.across(first.some(image, rows)))


def _rows_at_once(image: Tensor, wanted: Size3) -> int:
    """Rows of a slab, such that no step of it takes more than `_GPU_SLAB_BYTES`."""
    if not image.is_cuda:
        return _SLAB
    channels, x, y, z = image.shape
    read = max(math.ceil(x / wanted[0]), 1) * y * z  # where rows are left out, more are read than made
    return max(_GPU_SLAB_BYTES // (4 * channels * max(read, wanted[1] * z, wanted[1] * wanted[2])), 1)


# ------------------------------------------------------------------------------------------------------------ crop


def _crop(state: _State, margin: int) -> _State:
    image = state.image
    starts, ends = [], []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        marked = torch.nonzero((image > 0).any(dim=others[1]).any(dim=others[0])).flatten()
        if not len(marked):
            raise UnsupportedPixels("CropForegroundd found nothing above 0: the bundle's scaling does not suit this CT")
        starts.append(int(marked[0]) - margin)
        ends.append(int(marked[-1]) + 1 + margin)
    affine, back, pad = state.affine.copy(), [], []
    for axis, (start, end) in enumerate(zip(starts, ends, strict=True)):
        size = image.shape[axis]
        image = image.narrow(axis, max(start, 0), min(end, size) - max(start, 0))
        pad.append((max(-start, 0), max(end - size, 0)))  # MONAI pads a box that leaves the image with zeros
        affine[:, 3] += affine[:, axis] * start
        back.append(state.back[axis] @ np.eye(size, end - start, -start))
    image = functional.pad(image, [n for pair in reversed(pad) for n in pair])
    return _State(image, affine, state.axes, (back[0], back[1], back[2]))


# ------------------------------------------------------------------------------------------------------- intensity


def _scale(image: Tensor, step: ScaleRange) -> Tensor:
    width = step.a_max - step.a_min
    if width == 0:  # as MONAI does; a bundle's a_min and a_max differ, but percentiles of a flat image do not
        return image - step.a_min + (step.b_min or 0.0)
    image = (image - step.a_min) / width
    if step.b_min is not None and step.b_max is not None:
        image = image * (step.b_max - step.b_min) + step.b_min
    return image.clamp(step.b_min, step.b_max) if step.clip else image


def _range_from_percentiles(image: Tensor, step: ScalePercentiles) -> ScaleRange:
    lower, upper = np.percentile(image.cpu().numpy(), [step.lower, step.upper])
    b_min, b_max = step.b_min, step.b_max
    if step.relative and b_min is not None and b_max is not None:
        width = b_max - b_min
        b_min, b_max = width * step.lower / 100 + b_min, width * step.upper / 100 + b_min
    return ScaleRange(float(lower), float(upper), b_min, b_max, step.clip)


def _normalize(image: Tensor, step: Normalize) -> Tensor:
    chosen = image[image != 0] if step.nonzero else image
    if not chosen.numel():
        return image
    subtrahend = float(chosen.mean()) if step.subtrahend is None else step.subtrahend
    divisor = float(chosen.std(unbiased=False)) if step.divisor is None else step.divisor
    normalized = (image - subtrahend) / (divisor or 1.0)
    return torch.where(image != 0, normalized, image) if step.nonzero else normalized


# -------------------------------------------------------------------------------------------------------- way back


def restore_slabs(prepared: Prepared, probabilities: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Bring probabilities back to the source grid, a few source slices at a time.

    Args:
        prepared: What `prepare_volume` returned.
        probabilities: (C, X, Y, Z) float32 on the network's grid.

    Yields:
        The source slices d and their (C, slices, H, W) float32 probabilities: linear between the network's voxels,
        the border's beyond them, 0 where a crop removed the volume. They may share the memory of `probabilities`.

    Source: MONAI 1.6.1 `Invertd(nearest_interp=False)`.
    """
    order = [prepared.source_axes.index(axis) for axis in range(3)]
    image = probabilities.permute(0, *(1 + axis for axis in order))
    slabs = _slabs(image, [prepared.back[axis] for axis in order])
    upright = prepared.upright
    if upright is None:
        yield from slabs
        return
    _, height, width = upright.geometry.shape
    size = height - math.ceil(upright.rows.max()), width - math.ceil(upright.columns.max())
    for rows, slab in slabs:
        yield rows, _tilted_again(slab, rows, upright, size)


def source_boxes(prepared: Prepared, size: Size3) -> Callable[[Size3], tuple[slice, slice, slice]]:
    """Which source voxels take something from a box of the network's grid on their way back.

    Args:
        prepared: What `prepare_volume` returned.
        size: Voxels of the boxes.

    Returns:
        From a box's first voxel, which may lie outside the grid as all of the box may, to slices of the source array
        (D, H, W) that hold all of them, and of a tilted source some more.
    """

    @cache
    def along(axis: int, start: int) -> slice:
        weights = prepared.back[axis][:, max(start, 0) : max(start + size[axis], 0)]
        used = np.flatnonzero(weights.any(axis=1))
        return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 0)

    def box(start: Size3) -> tuple[slice, slice, slice]:
        d, h, w = (along(axis, start[axis]) for axis in (prepared.source_axes.index(source) for source in range(3)))
        upright = prepared.upright
        if upright is None or d.start == d.stop:
            return d, h, w
        return d, _before_upright(h, upright.rows[d]), _before_upright(w, upright.columns[d])

    return box


def _before_upright(voxels: slice, starts: FloatArray) -> slice:
    """The rows (columns) of slices of which a share went to upright ones; `starts` tells where each slice began."""
    first, last = voxels.start - math.ceil(starts.max()), voxels.stop - math.floor(starts.min())
    return slice(max(first, 0), max(last, 0))
