"""The bundle's sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from ctflow.bundle.config import Component, Config, is_number, short
from ctflow.model import Blend
from ctflow.volume import Size3

LARGEST_ROI = 1024
_IGNORED = frozenset(
    {"sw_device", "device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim"}
)  # where and how MONAI holds the data; the result is the same


@dataclass(frozen=True)
class Sliding:
    """How windows lie: see `ModelSpec`."""

    roi: Size3
    overlap: float
    blend: Blend
    batch_size: int


def sliding_from_config(config: Config) -> Sliding:
    """What `inferer` asks for.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: Not a SlidingWindowInferer, or not as ctflow does it.
    """
    inferer = Component(config, config.top("inferer"), "monai.inferers")
    if inferer.target != "SlidingWindowInferer":
        raise inferer.refused("_target_", f"is {short(inferer.target)}; ctflow does SlidingWindowInferer")
    inferer.demand_known(
        {"roi_size", "sw_batch_size", "overlap", "mode", "sigma_scale", "padding_mode", "cval", "with_coord"} | _IGNORED
    )
    inferer.demand(sigma_scale=(0.125,), padding_mode=("constant",), cval=(0,), with_coord=(False,))
    overlap = inferer.number("overlap", 0.25)
    if not 0 <= overlap < 1:
        raise inferer.refused("overlap", f"must be at least 0 and below 1, not {overlap:g}")
    mode = inferer.get("mode", "constant")
    blend: Blend
    if mode == "constant":
        blend = "constant"
    elif mode == "gaussian":
        blend = "gaussian"
    else:
        raise inferer.refused("mode", f'must be "constant" or "gaussian", not {short(mode)}')
    return Sliding(_roi(inferer), overlap, blend, inferer.integer("sw_batch_size", 1, 1024, 1))


def _roi(inferer: Component) -> Size3:
    given = inferer.get("roi_size")
    sizes = given if isinstance(given, list) else [given]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    if len(sizes) != 3 or not all(
        is_number(size) and isinstance(size, int) and 1 <= size <= LARGEST_ROI for size in sizes
    ):
        raise inferer.refused("roi_size", f"must be one or three whole numbers up to {LARGEST_ROI}, not {short(given)}")
    return sizes[0], sizes[1], sizes[2]
