"""The bundle's transforms before the network -> ctflow's steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ctflow.bundle.config import Config, is_number, short
from ctflow.bundle.signatures import HELD, STEPS
from ctflow.bundle.transforms import IMAGE, Transform, check_held, transforms_from_config
from ctflow.core.model import CropForeground, Normalize, Orient, Resample, ScalePercentiles, ScaleRange, Step

# MONAI cannot invert them back to the source grid.
_NEVER = frozenset({"FromMetaTensord", "ToMetaTensord", "SaveImaged"})


def steps_from_config(config: Config) -> tuple[Step, ...]:
    """The steps of `preprocessing` on the image, in order.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: ctflow does not support a transform, or an argument that changes its result.
    """
    return _Reader().steps(config)


class _Reader:
    """Walks through the list and tracks the data present at each transform."""

    def __init__(self) -> None:
        self._present = {IMAGE}
        self._is_loaded = self._is_channel_first = self._is_begun = False
        self._is_flat = self._is_near = False  # see `_check_zeros`
        self._steps: list[Step] = []

    def steps(self, config: Config) -> tuple[Step, ...]:
        for transform in transforms_from_config(config, "preprocessing"):
            if transform.target in HELD and transform.target not in _NEVER:
                self._hold(transform)
            elif transform.target in STEPS:
                self._do(transform)
            else:
                known = ", ".join(STEPS)
                raise transform.refused("_target_", f"is {transform.target}; ctflow implements {known}", "target")
            self._is_begun = True
        if self._is_loaded and not self._is_channel_first:
            raise config.invalid("preprocessing", "loads the image without EnsureChannelFirstd", "order")
        return tuple(self._steps)

    def _hold(self, transform: Transform) -> None:
        check_held(transform, self._present)
        if IMAGE not in self._present:
            raise transform.refused("keys", f"removes {IMAGE!r}", "keys")
        if transform.target == "LoadImaged":
            self._load(transform)
        elif transform.target == "EnsureChannelFirstd" and transform.acts_on:
            if self._is_channel_first:
                raise transform.refused("_target_", "adds a second channel axis", "order")
            if self._steps:
                raise transform.refused("_target_", f"comes after {type(self._steps[-1]).__name__}", "order")
            self._is_channel_first = True
        elif (
            transform.target == "ToTensord"
            and transform.acts_on
            and any(isinstance(s, Orient | Resample | CropForeground) for s in self._steps)
        ):
            raise transform.refused(
                "_target_", "comes after a spatial transform, which MONAI then cannot invert: use EnsureTyped", "order"
            )

    def _load(self, transform: Transform) -> None:
        if not transform.acts_on:
            return
        if self._is_begun:
            raise transform.refused("_target_", "comes after another transform", "order")
        self._is_loaded = True
        self._is_channel_first = transform.flag("ensure_channel_first", False)
        meta_key = transform.get("meta_keys", None) or f"{IMAGE}_{transform.get('meta_key_postfix', 'meta_dict')}"
        if not transform.flag("image_only", True):
            self._add(transform, "meta_keys", meta_key)

    def _do(self, transform: Transform) -> None:
        present = set(self._present)
        transform.read_keys(STEPS[transform.target], present)
        if transform.target == "CropForegroundd":
            self._check_crop(transform)
        others = [key for key in transform.acts_on if key != IMAGE]
        if others:
            raise transform.refused("keys", f"names {short(others[0])}, which is not an image", "keys")
        if transform.acts_on and self._is_loaded and not self._is_channel_first:
            raise transform.refused("_target_", f"is {transform.target}, but comes before EnsureChannelFirstd", "order")
        if transform.acts_on:
            step = _MAKERS[transform.target](transform)
            self._check_zeros(transform, step)
            self._steps.append(step)

    def _check_zeros(self, transform: Transform, step: Step) -> None:
        """Reject steps that depend on voxels being exactly 0, if that depends on the last bit of MONAI's resampling.

        Clipping and padding set many voxels to one value; MONAI's resampling leaves some of them off by 1e-16.
        """
        if isinstance(step, ScaleRange | ScalePercentiles):
            self._is_flat = self._is_flat or step.clip
        elif isinstance(step, Resample):
            self._is_near = self._is_near or self._is_flat
        elif isinstance(step, CropForeground) or (isinstance(step, Normalize) and step.nonzero):
            if self._is_near:
                problem = f"is {transform.target}, which depends on rounding where Spacingd comes after clipping"
                raise transform.refused("_target_", f"{problem}: put Spacingd before the scaling", "order")
            self._is_flat = self._is_flat or (isinstance(step, CropForeground) and step.margin > 0)

    def _check_crop(self, transform: Transform) -> None:
        source = transform.get("source_key")
        if source != IMAGE:
            raise transform.refused("source_key", f"is {short(source)}; ctflow has only {IMAGE!r}", "keys")
        for name in ("start_coord_key", "end_coord_key"):
            key = transform.get(name, STEPS["CropForegroundd"].read[name])
            if key is not None:
                self._add(transform, name, key)

    def _add(self, transform: Transform, name: str, key: Any) -> None:
        """Record an item that a transform adds to the image."""
        if not isinstance(key, str) or key == IMAGE:
            raise transform.refused(name, f"is {short(key)}; it must be a key other than {IMAGE!r}", "keys")
        self._present.add(key)


def _orient(transform: Transform) -> Orient:
    if transform.flag("as_closest_canonical", False):
        return Orient("RAS")
    axcodes = transform.get("axcodes")
    if isinstance(axcodes, list) and all(isinstance(code, str) for code in axcodes):
        axcodes = "".join(axcodes)
    pairs = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    if not isinstance(axcodes, str) or sorted(pairs.get(code, 9) for code in axcodes) != [0, 1, 2]:
        raise transform.refused("axcodes", f'must be three letters like "RAS", not {short(axcodes)}')
    return Orient(axcodes)


def _resample(transform: Transform) -> Resample:
    pixdim = transform.get("pixdim")
    sizes = pixdim if isinstance(pixdim, list) else [pixdim]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    # Below 0.1 mm a chest would not fit into any memory; 0 or less keeps the axis.
    if len(sizes) != 3 or not all(is_number(mm) and (mm <= 0 or 0.1 <= mm <= 100) for mm in sizes):
        raise transform.refused("pixdim", f"must be one or three spacings from 0.1 to 100 mm, not {short(pixdim)}")
    return Resample((float(sizes[0]), float(sizes[1]), float(sizes[2])))


def _target_range(transform: Transform, **default: Any) -> tuple[float | None, float | None, bool]:
    b_min, b_max = transform.number_or_none("b_min", **default), transform.number_or_none("b_max", **default)
    clip = transform.flag("clip", False)
    if clip and b_min is None and b_max is None:
        raise transform.refused("clip", "is true, but neither b_min nor b_max is given")
    return b_min, b_max, clip


def _scale_range(transform: Transform) -> ScaleRange:
    a_min, a_max = transform.number("a_min"), transform.number("a_max")
    if a_min == a_max:
        raise transform.refused("a_max", "equals a_min")
    return ScaleRange(a_min, a_max, *_target_range(transform, default=None))


def _scale_percentiles(transform: Transform) -> ScalePercentiles:
    lower, upper = transform.number("lower"), transform.number("upper")
    if not 0 <= lower < upper <= 100:
        raise transform.refused("upper", f"and lower must be 0 <= lower < upper <= 100, not {lower:g} and {upper:g}")
    b_min, b_max, clip = _target_range(transform)
    relative = transform.flag("relative", False)
    if relative and (b_min is None or b_max is None):
        raise transform.refused("relative", "is true, but b_min or b_max is null")
    return ScalePercentiles(lower, upper, b_min, b_max, clip, relative)


def _normalize(transform: Transform) -> Normalize:
    subtrahend, divisor = _of_channel(transform, "subtrahend"), _of_channel(transform, "divisor")
    if divisor == 0:
        raise transform.refused("divisor", "must not be 0")
    return Normalize(subtrahend, divisor, transform.flag("nonzero", False))


def _of_channel(transform: Transform, name: str) -> float | None:
    """A number, or null; with `channel_wise` a list of one, as there is one channel."""
    value = transform.get(name, None)
    if value is None:
        return None
    is_list = transform.flag("channel_wise", False)
    if is_list != isinstance(value, list) or (is_list and len(value) != 1):
        wanted = "a list of one number, with channel_wise" if is_list else "a number, without channel_wise"
        raise transform.refused(name, f"must be {wanted}, not {short(value)}")
    number = value[0] if is_list else value
    if not is_number(number):
        raise transform.refused(name, f"must be a number, not {short(value)}")
    return float(number)


def _crop(transform: Transform) -> CropForeground:
    return CropForeground(transform.integer("margin", 0, 1000, 0))


_MAKERS: dict[str, Callable[[Transform], Step]] = {
    "Orientationd": _orient,
    "Spacingd": _resample,
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityRangePercentilesd": _scale_percentiles,
    "NormalizeIntensityd": _normalize,
    "CropForegroundd": _crop,
}
