"""Conversion between the App SDK's `Image` and ctflow's `Volume`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from monai.deploy.core import Image

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.volume import Geometry, Volume


def volume_from_image(image: Image) -> Volume:
    """A volume from the output of `DICOMSeriesToVolumeOperator`.

    Args:
        image: (D, H, W) HU, with an affine of index (w, h, d) to "RAS" or "LPS" mm in its metadata.

    Returns:
        The volume.

    Raises:
        BrokenSeries: No affine; or pixels that are not square, which the App SDK 4.0 operator places wrongly (it
            swaps the spacings of rows and columns).
        UnsupportedPixels: Values that are not finite Hounsfield units.
    """
    metadata: dict[str, Any] = image.metadata()
    array = np.asarray(image.asnumpy())
    affine = np.array(metadata.get("affine", np.zeros((4, 4))), dtype=np.float64)
    if affine.shape != (4, 4) or abs(np.linalg.det(affine)) < 1e-12 or array.ndim != 3:
        raise BrokenSeries("the image has no usable affine; use ctflow's LoadSeriesOperator", reason="no-geometry")
    row_mm, column_mm = np.linalg.norm(affine[:3, :2], axis=0)
    if abs(row_mm - column_mm) > 1e-4 * column_mm:
        raise BrokenSeries(
            "pixels are not square, and DICOMSeriesToVolumeOperator swaps their spacings; use LoadSeriesOperator",
            reason="no-geometry",
        )
    if metadata.get("space", "RAS") == "RAS":
        affine[:2] *= -1
    affine = affine[:, [2, 1, 0, 3]]
    depth, height, width = array.shape
    return Volume(_hounsfield(array), Geometry((depth, height, width), affine))


def _hounsfield(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The values as int16 where that loses nothing, else float32."""
    if not np.isfinite(array).all():
        raise UnsupportedPixels("the image contains non-finite values", reason="pixel-values")
    # The operator takes its dtype from the first slice; unsigned values above int16 are its wrapped negatives.
    if array.min() < -32768 or array.max() > 32767:
        raise UnsupportedPixels(
            "the image contains values beyond 16-bit Hounsfield units; use LoadSeriesOperator", reason="pixel-values"
        )
    small = array.astype(np.int16)
    return np.ascontiguousarray(small if np.array_equal(small, array) else array.astype(np.float32))


def image_from_labels(labels: npt.NDArray[np.uint8], source: Image) -> Image:
    """The labels (D, H, W) uint8 as an `Image` with the metadata of `source`."""
    return Image(labels, source.metadata())
