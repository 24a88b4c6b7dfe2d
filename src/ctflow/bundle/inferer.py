"""The bundle's sliding window."""

from __future__ import annotations

from dataclasses import dataclass

from ctflow.bundle.config import Component, Config, is_number, short
from ctflow.bundle.signatures import INFERER
from ctflow.core.model import Blend
from ctflow.core.volume import Size3

LARGEST_ROI = 1024


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
        raise inferer.refused(
            "_target_", f"is {short(inferer.target)}; ctflow implements SlidingWindowInferer", "target"
        )
    inferer.demand_signature(INFERER)
    overlap = _overlap(inferer)
    mode = inferer.get("mode", "constant")
    blend: Blend
    if mode == "constant":
        blend = "constant"
    elif mode == "gaussian":
        blend = "gaussian"
    else:
        raise inferer.refused("mode", f'must be "constant" or "gaussian", not {short(mode)}')
    return Sliding(_roi(inferer), overlap, blend, inferer.integer("sw_batch_size", 1, 1024, 1))


def _overlap(inferer: Component) -> float:
    given = inferer.get("overlap", 0.25)
    values = given if isinstance(given, list) else [given]
    if len(values) not in (1, 3) or (len(values) == 1 and isinstance(given, list)):
        raise inferer.refused("overlap", f"must be one or three numbers, not {short(given)}")
    if not all(is_number(value) and 0 <= value < 1 for value in values):
        raise inferer.refused("overlap", f"must be at least 0 and below 1, not {short(given)}")
    if len(set(values)) > 1:
        raise inferer.refused("overlap", f"differs between the axes, {short(given)}; ctflow accepts one for all")
    return float(values[0])


def _roi(inferer: Component) -> Size3:
    given = inferer.get("roi_size")
    sizes = given if isinstance(given, list) else [given] * 3
    if len(sizes) != 3 or not all(
        is_number(size) and isinstance(size, int) and 1 <= size <= LARGEST_ROI for size in sizes
    ):
        raise inferer.refused("roi_size", f"must be one or three whole numbers up to {LARGEST_ROI}, not {short(given)}")
    return sizes[0], sizes[1], sizes[2]
