"""The bundle's inferer -> where windows are and how they are blended."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from ctflow.bundle.config import Component, Config, is_number, short
from ctflow.bundle.config.signatures import INFERER, SIMPLE_INFERER, SLICE_INFERER
from ctflow.bundle.vista3d import vista_inferer
from ctflow.core.model import Blend, Overlap, WindowPadding
from ctflow.core.volume import Size3

LARGEST_ROI = 1024
_ZEROS = WindowPadding()
_PADDING_MODES = ("constant", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Sliding:
    """The placement of windows: see `ModelSpec`.

    Attributes:
        slice_axis: The axis along which a network for slices moves; None for one for volumes.
    """

    roi: Size3
    overlap: Overlap
    blend: Blend
    batch_size: int
    sigma_scale: tuple[float, float, float] = (0.125, 0.125, 0.125)
    padding: WindowPadding = _ZEROS
    slice_axis: int | None = None


def sliding_from_config(config: Config) -> Sliding:
    """Read `inferer`.

    Args:
        config: The bundle's configuration.

    Raises:
        BundleInvalid: Not an inferer that ctflow implements, or not as ctflow supports it.
    """
    place = config.top("inferer")
    vista = vista_inferer(config, place)
    if vista is not None:
        return Sliding(_roi(vista, None), 0.25, "constant", vista.integer("sw_batch_size", 1, 1024, 1))
    inferer = Component(config, place, "monai.inferers")
    if inferer.target == "SimpleInferer":
        inferer.demand_signature(SIMPLE_INFERER)
        return Sliding((0, 0, 0), 0.0, "constant", 1)
    if inferer.target == "SliceInferer":
        inferer.demand_signature(SLICE_INFERER)
        axis = inferer.integer("spatial_dim", 0, 2, 0)
        return replace(_sliding(inferer, axis), slice_axis=axis)
    if inferer.target not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
        known = "SlidingWindowInferer, SimpleInferer and SliceInferer"
        raise inferer.refused("_target_", f"is {short(inferer.target)}; ctflow implements {known}", "target")
    inferer.demand_signature(INFERER)
    return _sliding(inferer, None)


def _sliding(inferer: Component, slice_axis: int | None) -> Sliding:
    mode = inferer.get("mode", "constant")
    if mode not in get_args(Blend):
        raise inferer.refused("mode", f'must be "constant" or "gaussian", not {short(mode)}')
    sigma = _three(inferer, "sigma_scale", 0.125)
    if not all(0 < share <= 10 for share in sigma):
        raise inferer.refused("sigma_scale", f"must be above 0 and at most 10, not {short(list(sigma))}")
    return Sliding(
        _roi(inferer, slice_axis),
        _overlap(inferer),
        mode,
        inferer.integer("sw_batch_size", 1, 1024, 1),
        sigma,
        _padding(inferer),
    )


def _padding(inferer: Component) -> WindowPadding:
    mode = inferer.get("padding_mode", "constant")
    if mode not in _PADDING_MODES:
        raise inferer.refused("padding_mode", f"must be {', '.join(_PADDING_MODES)}, not {short(mode)}")
    value = inferer.number("cval", 0.0)
    if mode != "constant" and value:
        raise inferer.refused("cval", f"is for padding_mode constant, not {mode}")
    return WindowPadding(mode, value)


def _three(inferer: Component, name: str, default: float) -> tuple[float, float, float]:
    """A number for each axis."""
    given: Any = inferer.get(name, default)
    values = given if isinstance(given, list) else [given] * 3
    if len(values) != 3 or not all(is_number(value) for value in values):
        raise inferer.refused(name, f"must be one or three numbers, not {short(given)}")
    return float(values[0]), float(values[1]), float(values[2])


def _overlap(inferer: Component) -> Overlap:
    values = _three(inferer, "overlap", 0.25)
    if not all(0 <= value < 1 for value in values):
        raise inferer.refused("overlap", f"must be at least 0 and below 1, not {short(list(values))}")
    return values[0] if len(set(values)) == 1 else values


def _roi(inferer: Component, slice_axis: int | None) -> Size3:
    given = inferer.get("roi_size")
    count = 3 if slice_axis is None else 2
    sizes = given if isinstance(given, list) else [given] * 3 if slice_axis is None else []
    if len(sizes) != count or not all(
        is_number(size) and isinstance(size, int) and -1 <= size <= LARGEST_ROI for size in sizes
    ):
        wanted = "one or three" if slice_axis is None else "two"
        raise inferer.refused(
            "roi_size",
            f"must be {wanted} whole numbers up to {LARGEST_ROI} (or -1 for the volume's size), not {short(given)}",
        )
    sizes = [max(size, 0) for size in sizes]  # MONAI takes 0 and less for the volume's size
    if slice_axis is not None:
        sizes.insert(slice_axis, 1)
    return sizes[0], sizes[1], sizes[2]
