"""Separable linear interpolation, slab by slab; and resampling to a spacing or a size, on MONAI's grid."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import Resample, Resize
from ctflow.core.volume import FloatArray, Size3
from ctflow.transforms.state import (
    LARGEST_VOXELS,
    SAME_SPACING_MM,
    AxisReturn,
    GridState,
    IndexArray,
    returned,
)
from ctflow.transforms.upload import uploaded

_SLAB = 8  # slices handled at once; keeps 14 classes of 512 x 512 below 120 MB
_GPU_SLAB_BYTES = 2**28  # a GPU is faster with more slices; each step of a slab takes at most this much


def linear_weights(positions: npt.ArrayLike, size: int) -> FloatArray:
    """Weights of linear interpolation along an axis.

    Args:
        positions: (n,) positions in voxels; those outside get the border value.
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


def interpolated(image: Tensor, weights: Sequence[FloatArray]) -> Tensor:
    """(X, Y, Z) -> float32 of the weights' rows; iterates over the outermost axis in memory."""
    outer = int(np.argmax(image.stride()))
    rest = [axis for axis in range(3) if axis != outer]
    order = [outer, *rest]
    result = torch.empty([len(weights[axis]) for axis in order], device=image.device)
    for rows, slab in slabs_of(image.permute(order)[None], [weights[axis] for axis in order]):
        result[rows] = slab[0]
    inverse = [order.index(axis) for axis in range(3)]
    return result.permute(inverse)


class _Axis:
    """The weights of one axis, on the device; if each row copies one voxel, there is no matrix product.

    Args:
        weights: (rows, columns), on the host: the used columns are known without querying the device.
        device: The device that applies them.
    """

    def __init__(self, weights: FloatArray, device: torch.device) -> None:
        self._host = weights
        self._weights: Tensor | None = None
        self._voxels: Tensor | None = None
        self._picked: IndexArray | None = None  # the same on the host
        voxels = weights.argmax(axis=1)
        taken = weights[np.arange(len(weights)), voxels]
        if not ((taken == 1) & (np.count_nonzero(weights, axis=1) == 1)).all():
            self._weights = uploaded(np.ascontiguousarray(weights, dtype=np.float32), device)
        elif not np.array_equal(voxels, np.arange(weights.shape[1])):
            self._picked, self._voxels = voxels, uploaded(voxels, device)  # flipped or cropped

    def __len__(self) -> int:
        return len(self._host)

    def used(self, rows: slice) -> slice:
        """The voxels from which some rows are made."""
        if self._weights is not None:
            used = np.flatnonzero(self._host[rows].any(axis=0))
            return slice(int(used[0]), int(used[-1]) + 1) if len(used) else slice(0, 1)
        if self._picked is None:
            return rows
        return slice(int(self._picked[rows].min()), int(self._picked[rows].max()) + 1)

    def some(self, part: Tensor, rows: slice) -> Tensor:
        """(C, used voxels, Y, Z) -> (C, rows, Y, Z) float32."""
        used = self.used(rows)
        if self._weights is not None:
            return torch.einsum("rx,cxyz->cryz", self._weights[rows, used], part.to(torch.float32))
        if self._voxels is not None:
            part = part.index_select(1, self._voxels[rows] - used.start)
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


def slabs_of(image: Tensor, weights: Sequence[FloatArray]) -> Iterator[tuple[slice, Tensor]]:
    """Apply each axis' weights to (C, X, Y, Z), some rows of the first axis at a time, without waiting for a GPU.

    A slab may share the image's memory.
    """
    channels, *_ = image.shape
    slabs = Slabs(weights, channels, image.device)
    for rows, used in slabs.rows:
        yield rows, slabs.slab(image[:, used], rows)


class Slabs:
    """Weights of three axes, applied some rows of the first axis at a time, to the voxels that these rows need.

    Args:
        weights: (rows, columns) of each axis.
        channels: Of the image.
        device: The image's.

    Attributes:
        rows: The rows of each slab, and the image's voxels along its first axis that they are made from.
    """

    def __init__(self, weights: Sequence[FloatArray], channels: int, device: torch.device) -> None:
        self._first, self._second, self._third = (_Axis(matrix, device) for matrix in weights)
        (first, x), (second, y), (third, z) = (matrix.shape for matrix in weights)
        on_gpu = device.type == "cuda"
        at_once = _rows_at_once(channels, (x, y, z), (first, second, third)) if on_gpu else _SLAB
        every = range(0, len(self._first), at_once)
        some = [slice(start, min(start + at_once, len(self._first))) for start in every]
        self.rows = [(rows, self._first.used(rows)) for rows in some]

    def slab(self, part: Tensor, rows: slice) -> Tensor:
        """(C, used voxels, Y, Z) -> (C, rows, rows of the second axis, rows of the third) float32."""
        return self._third.along(self._second.across(self._first.some(part, rows)))


def _rows_at_once(channels: int, size: Size3, wanted: Size3) -> int:
    """Rows of a slab so that none of its steps takes more than `_GPU_SLAB_BYTES`."""
    x, y, z = size
    read = max(math.ceil(x / wanted[0]), 1) * y * z  # if rows are skipped, more are read than written
    return max(_GPU_SLAB_BYTES // (4 * channels * max(read, wanted[1] * z, wanted[1] * wanted[2])), 1)


def resample(state: GridState, step: Resample) -> GridState:
    """Resample the image to another spacing."""
    if step.diagonal and not _is_diagonal(state.affine):
        raise UnsupportedPixels(
            "Spacingd with diagonal needs axes along the patient's: this CT is oblique, or Orientationd is missing",
            reason="oblique",
        )
    affine, grid = _new_grid(state, step.spacing_mm)
    before, after = list(state.image.shape), [size for _, _, size in grid]
    # MONAI's image carries the product, which may differ from the new affine in the last bit.
    carried = torch.from_numpy(state.affine) @ torch.from_numpy(np.linalg.solve(state.affine, affine))
    picks = nearest_voxels(carried.numpy(), state.affine, after, before)
    if step.nearest:
        taken = nearest_voxels(state.affine, affine, before, after)
        image = state.image
        for axis, voxels in enumerate(taken):
            image = image.index_select(axis, torch.from_numpy(voxels).to(image.device))
        weights = [np.eye(size)[voxels] for size, voxels in zip(after, picks, strict=True)]
    else:
        axes = [(*each, n) for each, n in zip(grid, before, strict=True)]
        forward = [linear_weights(np.arange(size) * (new / old), n) for old, new, size, n in axes]
        weights = [linear_weights(np.arange(n) * (old / new), size) for old, new, size, n in axes]
        image = interpolated(state.image, forward)
    return returned(state, [AxisReturn(*each) for each in zip(weights, picks, strict=True)], image, affine)


def _is_diagonal(affine: FloatArray) -> bool:
    linear = affine[:3, :3]
    return bool((np.diag(linear) > 0).all() and np.abs(linear - np.diag(np.diag(linear))).max() <= SAME_SPACING_MM)


def nearest_voxels(
    old: FloatArray, new: FloatArray, old_size: Sequence[int], new_size: Sequence[int]
) -> list[IndexArray]:
    """The nearest voxel of the old grid for each voxel of the new one, along each axis.

    Voxels often lie exactly between two (from 1.5 to 0.75 mm every second one), where MONAI's choice depends on the
    last bit of its arithmetic: so this repeats it step by step, with torch's own functions.

    Args:
        old: (4, 4) index -> mm, and
        new: of a grid whose axes are parallel.
        old_size: Voxels along each axis, and
        new_size: of the other grid.

    Source: MONAI 1.6.1 `spatial_resample`, `to_norm_affine`; torch `affine_grid`, `grid_sample`.
    """
    moved = torch.from_numpy(np.linalg.solve(old, new))
    inverse = torch.from_numpy(np.linalg.inv(_normalized(new_size).numpy()))
    theta = _normalized(old_size) @ moved @ inverse
    theta = theta.flip(0).flip(1).roll((-1, -1), (0, 1))  # x, y, z as torch counts axes
    found = []
    for axis, (size, wanted) in enumerate(zip(old_size, new_size, strict=True)):
        line = [1, 1, 1, 1, 1]
        line[2 + axis] = wanted
        places = functional.affine_grid(theta[None, :3], line, align_corners=False)[..., 2 - axis].flatten()
        voxels = (((places + 1) * size - 1) / 2).clamp(0, size - 1).round()
        found.append(voxels.to(torch.int64).numpy())
    return found


def _normalized(size: Sequence[int]) -> Tensor:
    """Voxels to torch's range from -1 to 1, whose ends are the outer borders of the first and last voxel."""
    shape = torch.tensor(size, dtype=torch.float64)
    matrix = torch.diag(torch.cat((2.0 / shape, torch.ones(1, dtype=torch.float64))))
    matrix[:-1, -1] = 1.0 / shape - 1.0
    return matrix


def _new_grid(
    state: GridState, spacing_mm: tuple[float, float, float]
) -> tuple[FloatArray, list[tuple[float, float, int]]]:
    """The new grid's affine, and each axis' old spacing, new spacing and new size."""
    spacings = []
    for axis, wanted in enumerate(spacing_mm):
        old = float(np.linalg.norm(state.affine[:3, axis]))
        spacings.append((old, old if wanted <= 0 or abs(old - wanted) <= SAME_SPACING_MM else wanted))
    affine, shape = _zoomed(state, [new for _, new in spacings])
    if math.prod(shape) > LARGEST_VOXELS:
        sizes = " x ".join(map(str, shape))
        raise UnsupportedPixels(
            f"at the model's spacing the volume has {sizes} voxels: its PixelSpacing is implausible",
            reason="implausible-spacing",
        )
    return affine, [(old, new, size) for (old, new), size in zip(spacings, shape, strict=True)]


def _zoomed(state: GridState, spacing_mm: list[float]) -> tuple[FloatArray, list[int]]:
    """The affine and shape of a grid with another spacing and the same first voxel.

    A size is often exactly between two numbers of voxels (every second series of 5 mm slices at 2 mm). MONAI's choice
    depends on the last bit of its arithmetic, so this repeats MONAI's arithmetic step by step.

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


def resize(state: GridState, step: Resize) -> GridState:
    """Resize the image; every mode of torch acts on each axis separately.

    Source: MONAI 1.6.1 `Resize` (`torch.nn.functional.interpolate`) and `scale_affine`.
    """
    before = list(state.image.shape)
    after = _sizes(before, step)
    if not 0 < math.prod(after) <= LARGEST_VOXELS:
        sizes = " x ".join(map(str, after))
        raise UnsupportedPixels(f"Resized gives {sizes} voxels: it does not suit this CT", reason="scaling")
    forward = [_weights(old, new, step) for old, new in zip(before, after, strict=True)]
    backward = [AxisReturn(_weights(new, old, step), _picks(new, old)) for old, new in zip(before, after, strict=True)]
    image = interpolated(state.image, forward)
    return returned(state, backward, image, state.affine @ _scale(before, after, align_corners=step.align_corners))


def _sizes(before: Sequence[int], step: Resize) -> list[int]:
    if len(step.sizes) == 1:
        scale = step.sizes[0] / max(before)
        return [round(size * scale) for size in before]
    return [size if wanted <= 0 else wanted for size, wanted in zip(before, step.sizes, strict=True)]


def _weights(old: int, new: int, step: Resize) -> FloatArray:
    """(new, old) float64: what torch makes of each single voxel."""
    if step.mode in ("nearest", "nearest-exact"):
        return np.eye(old)[_picks(old, new, step.mode)]
    mode = {"area": "area", "linear": "linear"}[step.mode]
    corners = step.align_corners if mode == "linear" else None
    single = torch.eye(old, dtype=torch.float64)[None]
    found: FloatArray = functional.interpolate(single, size=new, mode=mode, align_corners=corners)[0].T.numpy()
    return found


def _picks(old: int, new: int, mode: str = "nearest") -> IndexArray:
    """(new,) the voxel of the old grid that torch takes; `Invertd(nearest_interp=True)` takes "nearest"."""
    numbered = torch.arange(old, dtype=torch.float32)[None, None]
    found: IndexArray = functional.interpolate(numbered, size=new, mode=mode)[0, 0].to(torch.int64).numpy()
    return found


def _scale(before: Sequence[int], after: Sequence[int], *, align_corners: bool) -> FloatArray:
    matrix = np.eye(4)
    for axis, (old, new) in enumerate(zip(before, after, strict=True)):
        if align_corners:
            matrix[axis, axis] = (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            matrix[axis, axis] = old / new
            matrix[axis, 3] = (old / new - 1) / 2
    return matrix if list(before) != list(after) else np.eye(4)
