"""What a scanner writes outside the circle that it saw."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ctflow.phantom.grid import FloatVolume, Grid
from ctflow.phantom.scene.variety import Padding

_BEYOND_MM = 2.0  # no tumour is drawn nearer to the circle


def distance_to_circle(grid: Grid, padding: Padding) -> FloatVolume:
    """(1, H, W) signed distance to the scan circle in mm, negative in it."""
    _, y, x = grid.axes
    middle_y, middle_x = (
        np.float32(middle + away) for middle, away in zip(grid.centre_mm[1:], padding.centre_mm, strict=True)
    )
    distance: FloatVolume = np.sqrt((y - middle_y) ** 2 + (x - middle_x) ** 2) - np.float32(padding.radius_mm)
    return distance


def in_circle(lung: FloatVolume, coarse: Grid, padding: Padding) -> FloatVolume:
    """Distance to what is seen of the lungs, on the coarse grid."""
    seen: FloatVolume = np.maximum(lung, distance_to_circle(coarse, padding) + np.float32(_BEYOND_MM))
    return seen


def outside_circle(grid: Grid, padding: Padding) -> npt.NDArray[np.bool_]:
    """(H, W), true where nothing was seen."""
    outside: npt.NDArray[np.bool_] = distance_to_circle(grid, padding)[0] > 0
    return outside
