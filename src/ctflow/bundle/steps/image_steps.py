"""A transform of preprocessing -> its step, each argument checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from ctflow.bundle.config import is_number, short
from ctflow.bundle.expressions.lambdas import line_of_lambda, threshold_of_lambda
from ctflow.bundle.expressions.values import NotUnderstood
from ctflow.bundle.transforms import Transform
from ctflow.core.steps import (
    ClipPercentiles,
    CropCenter,
    CropForeground,
    Linear,
    Normalize,
    Orient,
    Pad,
    PadMode,
    Resample,
    Resize,
    ScaleMinMax,
    ScalePercentiles,
    ScaleRange,
    Step,
    Threshold,
    Turn,
)

MOST_VOXELS = 4096  # along an axis


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
    mode = transform.get("mode", "bilinear")
    if mode not in ("bilinear", "nearest") and mode != 0:
        raise transform.refused("mode", f'is {short(mode)}; ctflow implements only "bilinear" or "nearest"')
    spacing = (float(sizes[0]), float(sizes[1]), float(sizes[2]))
    return Resample(spacing, nearest=mode in ("nearest", 0), diagonal=transform.flag("diagonal", False))


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
    k = transform.get("k_divisible", 1)
    divisible = k if isinstance(k, list) else [k] * 3
    if len(divisible) != 3 or not all(_is_whole(n) and 1 <= n <= MOST_VOXELS for n in divisible):
        raise transform.refused("k_divisible", f"must be one or three whole numbers from 1, not {short(k)}")
    margin = transform.integer("margin", 0, 1000, 0)
    within = transform.flag("allow_smaller", False)
    pads = (margin > 0 and not within) or max(divisible) > 1
    mode, value = _padding(transform) if pads else ("constant", 0.0)
    if not pads:
        _padding(transform)  # checked, though never used
    return CropForeground(
        margin, within, _foreground(transform), (divisible[0], divisible[1], divisible[2]), mode, value
    )


def _foreground(transform: Transform) -> float:
    """The value that the foreground is above."""
    if "select_fn" not in transform.names:
        return 0.0
    (place,) = transform.given("select_fn")
    text = place.value
    if isinstance(text, str) and text.startswith("$lambda"):
        return float(_understood(transform, "select_fn", threshold_of_lambda, text[1:]))
    transform.demand("select_fn", ("$monai.transforms.utils.is_positive",))
    return 0.0


def _understood(transform: Transform, name: str, function: Callable[[str], Any], text: str) -> Any:
    try:
        return function(text)
    except NotUnderstood as error:
        problem = f"is an expression, {short(text)}: {short(error.part)} {error.why}"
        raise transform.refused(name, problem, "expression") from None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _padding(transform: Transform) -> tuple[PadMode, float]:
    given = transform.get("mode", "constant")
    name = {"replicate": "edge", "circular": "wrap"}.get(given, given) if isinstance(given, str) else given
    mode: PadMode | None = next((each for each in get_args(PadMode) if each == name), None)
    if mode is None:
        known = ", ".join(get_args(PadMode))
        raise transform.refused("mode", f"is {short(given)}; ctflow implements {known}, replicate and circular")
    value = 0.0
    for name in ("value", "constant_values"):
        if name in transform.names:
            if mode != "constant":
                raise transform.refused(name, f"is for mode constant, not {mode}", "argument")
            value = transform.number(name)
    return mode, value


def _sizes(transform: Transform, name: str, counts: tuple[int, ...] = (3,)) -> tuple[int, ...]:
    """Whole numbers, 0 and less for "as it is"; a single one is for all axes."""
    given = transform.get(name)
    sizes = given if isinstance(given, list) else [given] * 3
    if len(sizes) not in counts or not all(_is_whole(size) and -1 <= size <= MOST_VOXELS for size in sizes):
        wanted = " or ".join(map(str, (1, *counts)))
        raise transform.refused(name, f"must be {wanted} whole numbers up to {MOST_VOXELS}, not {short(given)}")
    return tuple(sizes)


def _spatial_pad(transform: Transform) -> Pad:
    return Pad("size", _sizes(transform, "spatial_size"), _is_at_end(transform), *_padding(transform))


def _divisible_pad(transform: Transform) -> Pad:
    return Pad("divisible", _sizes(transform, "k"), _is_at_end(transform), *_padding(transform))


def _is_at_end(transform: Transform) -> bool:
    method = transform.get("method", "symmetric")
    if method not in ("symmetric", "end"):
        raise transform.refused("method", f'must be "symmetric" or "end", not {short(method)}')
    return bool(method == "end")


def _border_pad(transform: Transform) -> Pad:
    sizes = _sizes(transform, "spatial_border", (3, 6))
    if min(sizes) < 0:
        raise transform.refused("spatial_border", "must not be negative")
    sides = sizes if len(sizes) == 6 else tuple(size for size in sizes for _ in range(2))
    return Pad("border", sides, False, *_padding(transform))


def _crop_center(transform: Transform) -> CropCenter:
    sizes = _sizes(transform, "roi_size")
    return CropCenter((sizes[0], sizes[1], sizes[2]))


_RESIZE: Mapping[Any, Literal["area", "linear", "nearest", "nearest-exact"]] = {
    "area": "area",
    "nearest": "nearest",
    "nearest-exact": "nearest-exact",
    **dict.fromkeys(("linear", "bilinear", "trilinear"), "linear"),
}


def _resize(transform: Transform) -> Resize:
    mode = transform.get("mode", "area")
    if not isinstance(mode, str) or mode not in _RESIZE:
        raise transform.refused("mode", f"is {short(mode)}; ctflow implements {', '.join(_RESIZE)}")
    corners = transform.get("align_corners", None)
    if corners not in (None, True, False) or (corners and _RESIZE[mode] != "linear"):
        raise transform.refused("align_corners", f"is {short(corners)}, which is not for mode {mode}")
    size_mode = transform.get("size_mode", "all")
    if size_mode == "longest":
        return Resize((transform.integer("spatial_size", 1, MOST_VOXELS),), _RESIZE[mode], bool(corners))
    if size_mode != "all":
        raise transform.refused("size_mode", f'must be "all" or "longest", not {short(size_mode)}')
    if not isinstance(transform.get("spatial_size"), list):
        raise transform.refused("spatial_size", "must be three whole numbers")  # MONAI takes one for a single axis
    return Resize(_sizes(transform, "spatial_size"), _RESIZE[mode], bool(corners))


def _scale_min_max(transform: Transform) -> ScaleMinMax:
    low, high = transform.number_or_none("minv", 0.0), transform.number_or_none("maxv", 1.0)
    return ScaleMinMax(low, high, transform.number_or_none("factor", None))


def _clip_percentiles(transform: Transform) -> ClipPercentiles:
    lower, upper = transform.number_or_none("lower"), transform.number_or_none("upper")
    sides = [side for side in (lower, upper) if side is not None]
    if not sides or not all(0 <= side <= 100 for side in sides) or sides != sorted(sides):
        raise transform.refused("upper", "and lower must be percentiles, 0 <= lower <= upper <= 100")
    sharpness = transform.number_or_none("sharpness_factor", None)
    if sharpness is not None and not sharpness > 0:
        raise transform.refused("sharpness_factor", f"must be above 0, not {sharpness:g}")
    return ClipPercentiles(lower, upper, sharpness)


def _threshold(transform: Transform) -> Threshold:
    return Threshold(transform.number("threshold"), transform.flag("above", True), transform.number("cval", 0.0))


def _lambda(transform: Transform) -> Linear:
    (place,) = transform.given("func")
    if not isinstance(place.value, str) or not place.value.startswith("$lambda"):
        raise transform.refused("func", f"is {short(place.value)}; ctflow implements lambda x: x * a + b", "expression")
    return Linear(*_understood(transform, "func", line_of_lambda, place.value[1:]))


def _axes(transform: Transform, name: str, value: Any) -> list[int]:
    axes = value if isinstance(value, list | tuple) else [value]
    if not all(_is_whole(axis) and -3 <= axis < 3 for axis in axes) or len({axis % 3 for axis in axes}) < len(axes):
        raise transform.refused(name, f"must be different axes from 0 to 2, not {short(value)}")
    return [axis % 3 for axis in axes]


def _flip(transform: Transform) -> Turn:
    given = transform.get("spatial_axis", None)
    axes = [0, 1, 2] if given is None else _axes(transform, "spatial_axis", given)
    return Turn((0, 1, 2), (0 in axes, 1 in axes, 2 in axes))


def _rotate(transform: Transform) -> Turn:
    axes = _axes(transform, "spatial_axes", transform.get("spatial_axes", [0, 1]))
    if len(axes) != 2:
        raise transform.refused("spatial_axes", "must be two axes")
    order, flip = [0, 1, 2], [False] * 3
    first, second = axes
    for _ in range(transform.integer("k", -100, 100, 1) % 4):
        # torch.rot90: the second axis becomes the first, reversed.
        order[first], order[second] = order[second], order[first]
        flip[first], flip[second] = not flip[second], flip[first]
    return Turn((order[0], order[1], order[2]), (flip[0], flip[1], flip[2]))


def _transpose(transform: Transform) -> Turn:
    indices = transform.get("indices")
    is_order = isinstance(indices, list) and all(map(_is_whole, indices)) and sorted(indices) == [0, 1, 2, 3]
    if not is_order or indices[0] != 0:
        raise transform.refused("indices", f"must be 0 and a permutation of 1, 2, 3, not {short(indices)}")
    return Turn((indices[1] - 1, indices[2] - 1, indices[3] - 1), (False,) * 3, moves_affine=False)


MAKERS: dict[str, Callable[[Transform], Step]] = {
    "Orientationd": _orient,
    "Spacingd": _resample,
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityRangePercentilesd": _scale_percentiles,
    "NormalizeIntensityd": _normalize,
    "CropForegroundd": _crop,
    "ScaleIntensityd": _scale_min_max,
    "ClipIntensityPercentilesd": _clip_percentiles,
    "ThresholdIntensityd": _threshold,
    "Lambdad": _lambda,
    "Resized": _resize,
    "SpatialPadd": _spatial_pad,
    "BorderPadd": _border_pad,
    "DivisiblePadd": _divisible_pad,
    "CenterSpatialCropd": _crop_center,
    "Flipd": _flip,
    "Rotate90d": _rotate,
    "Transposed": _transpose,
}
