"""The bundle's transforms -> ctflow's steps before and after the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ctflow.bundle.config import Component, Config, Place, is_disabled, is_number, short
from ctflow.model import (
    Activation,
    CropForeground,
    Normalize,
    Orient,
    Resample,
    ScalePercentiles,
    ScaleRange,
    Step,
)

MOST_TRANSFORMS = 200
_PACKAGE = "monai.transforms"
# They load, save, or change only how the data are held.
SKIPPED_BEFORE = frozenset(
    {"LoadImaged", "EnsureChannelFirstd", "EnsureTyped", "CastToTyped", "ToTensord", "ToDeviced", "DeleteItemsd"}
    | {"SelectItemsd", "Identityd", "FromMetaTensord", "ToMetaTensord"}
)
SKIPPED_AFTER = frozenset(
    {"SaveImaged", "EnsureTyped", "CastToTyped", "ToTensord", "ToDeviced", "DeleteItemsd", "SelectItemsd", "Identityd"}
    | {"FromMetaTensord", "ToMetaTensord"}
)
# Recognised as text; an expression is not evaluated even here.
_FLOAT32 = frozenset(
    word + name for word in ("", "$") for name in ("float32", "float", "np.float32", "numpy.float32", "torch.float32")
)
_ORDER = "Activationsd, Invertd, AsDiscreted"


def steps_from_config(config: Config) -> tuple[Step, ...]:
    """What `preprocessing` asks for, in its order.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: A transform, or an argument that changes its result, is not one that ctflow does.
    """
    steps = []
    for transform in _transforms(config, "preprocessing"):
        if transform.target in SKIPPED_BEFORE:
            _check_type(transform)
            continue
        maker = _STEPS.get(transform.target)
        if maker is None:
            raise transform.refused("_target_", f"is {transform.target}; ctflow does {', '.join(_STEPS)}")
        steps.append(maker(transform))
    return tuple(steps)


def activation_from_config(config: Config) -> tuple[Activation, float | None]:
    """What `postprocessing` asks for: the activation, and the threshold or None for the argmax.

    Args:
        config: configs/inference.json.

    Raises:
        BundleInvalid: Not Activationsd, Invertd, AsDiscreted in this order, or not as ctflow does them.
    """
    transforms = [t for t in _transforms(config, "postprocessing") if t.target not in SKIPPED_AFTER]
    targets = [transform.target for transform in transforms]
    if targets != ["Activationsd", "Invertd", "AsDiscreted"]:
        found = ", ".join(targets[:8]) or "none of them"
        raise config.invalid("postprocessing", f"has {found}; ctflow does {_ORDER}, in this order")
    activate, invert, discrete = transforms
    activation = _activation(activate)
    _check_invert(invert)
    return activation, _threshold(discrete, activation)


def _transforms(config: Config, key: str) -> Iterator[Component]:
    compose = Component(config, config.top(key), _PACKAGE)
    if compose.target != "Compose":
        raise compose.refused("_target_", f"is {compose.target}; ctflow reads a Compose")
    compose.demand_known({"transforms", "map_items", "unpack_items", "log_stats", "lazy", "overrides"})
    compose.demand(lazy=(False, None), unpack_items=(False,), overrides=(None,))
    # The list itself may hold references; what its items hold is looked at one by one, and only where needed.
    place = config.resolved(compose.place("transforms") if "transforms" in compose.names else _missing(compose))
    if not isinstance(place.value, list) or len(place.value) > MOST_TRANSFORMS:
        raise compose.refused("transforms", f"must be a list of at most {MOST_TRANSFORMS} transforms")
    for number, item in enumerate(place.value):
        item_place = config.resolved(Place(f"{place.id}#{number}", item))
        if not is_disabled(config, item_place):
            transform = Component(config, item_place, _PACKAGE)
            transform.target = _usual_name(transform.target)
            yield transform


def _missing(compose: Component) -> Place:
    raise compose.refused("transforms", "is missing; Compose needs it")


def _usual_name(name: str) -> str:
    """MONAI has each dictionary transform under three names: Spacingd, SpacingD, SpacingDict."""
    for ending in ("Dict", "D"):
        if name.endswith(ending):
            return name[: -len(ending)] + "d"
    return name


def _check_type(transform: Component) -> None:
    """A cast is skipped only where it keeps float32, which ctflow computes in."""
    if transform.target not in ("CastToTyped", "EnsureTyped") or "dtype" not in transform.names:
        return
    value = transform.place("dtype").value
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if value is not None and not (isinstance(value, str) and value in _FLOAT32):
        raise transform.refused("dtype", f"is {short(value)}; ctflow does only float32")


# ----------------------------------------------------------------------------------------------------- preprocessing


def _orient(transform: Component) -> Orient:
    transform.demand_known({"keys", "axcodes", "as_closest_canonical", "labels", "allow_missing_keys", "lazy"})
    transform.demand(lazy=(False,))
    labels = transform.get("labels", None)
    if labels is not None and labels != [["L", "R"], ["P", "A"], ["I", "S"]]:
        raise transform.refused("labels", f"is {short(labels)}; ctflow does only MONAI's own")
    if transform.flag("as_closest_canonical", False):
        return Orient("RAS")
    axcodes = transform.get("axcodes")
    if isinstance(axcodes, list) and all(isinstance(code, str) for code in axcodes):
        axcodes = "".join(axcodes)
    pairs = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    if not isinstance(axcodes, str) or sorted(pairs.get(code, 9) for code in axcodes) != [0, 1, 2]:
        raise transform.refused("axcodes", f'must be three letters like "RAS", not {short(axcodes)}')
    return Orient(axcodes)


def _resample(transform: Component) -> Resample:
    transform.demand_known(
        {"keys", "pixdim", "diagonal", "mode", "padding_mode", "align_corners", "dtype", "scale_extent", "lazy"}
        | {"recompute_affine", "min_pixdim", "max_pixdim", "ensure_same_shape", "allow_missing_keys"}
    )
    transform.demand(
        mode=("bilinear",),
        padding_mode=("border",),
        align_corners=(False, None),
        diagonal=(False,),
        scale_extent=(False,),
        min_pixdim=(None,),
        max_pixdim=(None,),
        lazy=(False,),
    )
    pixdim = transform.get("pixdim")
    sizes = pixdim if isinstance(pixdim, list) else [pixdim]
    sizes = sizes * 3 if len(sizes) == 1 else sizes
    # Below 0.1 mm a chest would not fit into any memory; 0 or less keeps the axis as it is.
    if len(sizes) != 3 or not all(is_number(mm) and (mm <= 0 or 0.1 <= mm <= 100) for mm in sizes):
        raise transform.refused("pixdim", f"must be one or three spacings from 0.1 to 100 mm, not {short(pixdim)}")
    return Resample((float(sizes[0]), float(sizes[1]), float(sizes[2])))


def _target_range(transform: Component, **default: Any) -> tuple[float | None, float | None, bool]:
    b_min, b_max = transform.number_or_none("b_min", **default), transform.number_or_none("b_max", **default)
    clip = transform.flag("clip", False)
    if clip and b_min is None and b_max is None:
        raise transform.refused("clip", "is true, but neither b_min nor b_max is given")
    return b_min, b_max, clip


def _scale_range(transform: Component) -> ScaleRange:
    transform.demand_known({"keys", "a_min", "a_max", "b_min", "b_max", "clip", "dtype", "allow_missing_keys"})
    _check_scaled_type(transform)
    a_min, a_max = transform.number("a_min"), transform.number("a_max")
    if a_min == a_max:
        raise transform.refused("a_max", "equals a_min")
    return ScaleRange(a_min, a_max, *_target_range(transform, default=None))


def _scale_percentiles(transform: Component) -> ScalePercentiles:
    transform.demand_known(
        {"keys", "lower", "upper", "b_min", "b_max", "clip", "relative", "channel_wise", "dtype", "allow_missing_keys"}
    )
    _check_scaled_type(transform)
    lower, upper = transform.number("lower"), transform.number("upper")
    if not 0 <= lower < upper <= 100:
        raise transform.refused("upper", f"and lower must be 0 <= lower < upper <= 100, not {lower:g} and {upper:g}")
    b_min, b_max, clip = _target_range(transform)
    relative = transform.flag("relative", False)
    if relative and (b_min is None or b_max is None):
        raise transform.refused("relative", "is true, but b_min or b_max is null")
    return ScalePercentiles(lower, upper, b_min, b_max, clip, relative)


def _normalize(transform: Component) -> Normalize:
    transform.demand_known(
        {"keys", "subtrahend", "divisor", "nonzero", "channel_wise", "dtype", "allow_missing_keys"}
    )  # channel_wise makes no difference to ctflow's one channel
    _check_scaled_type(transform)
    divisor = transform.number_or_none("divisor", None)
    if divisor == 0:
        raise transform.refused("divisor", "must not be 0")
    return Normalize(transform.number_or_none("subtrahend", None), divisor, transform.flag("nonzero", False))


def _check_scaled_type(transform: Component) -> None:
    if "dtype" in transform.names:
        value = transform.place("dtype").value
        if not (isinstance(value, str) and value in _FLOAT32):
            raise transform.refused("dtype", f"is {short(value)}; ctflow does only float32")


def _crop(transform: Component) -> CropForeground:
    if "select_fn" in transform.names and transform.place("select_fn").value is not None:
        given = short(transform.place("select_fn").value)
        raise transform.refused("select_fn", f"is {given}; ctflow does only MONAI's own, values above 0")
    transform.demand_known(
        {"keys", "source_key", "select_fn", "channel_indices", "margin", "allow_smaller", "k_divisible", "mode", "lazy"}
        | {"start_coord_key", "end_coord_key", "allow_missing_keys"}
    )
    transform.demand(
        channel_indices=(None,), allow_smaller=(False,), k_divisible=(1,), mode=("constant",), lazy=(False,)
    )
    return CropForeground(transform.integer("margin", 0, 1000, 0))


_STEPS: dict[str, Callable[[Component], Step]] = {
    "Orientationd": _orient,
    "Spacingd": _resample,
    "ScaleIntensityRanged": _scale_range,
    "ScaleIntensityRangePercentilesd": _scale_percentiles,
    "NormalizeIntensityd": _normalize,
    "CropForegroundd": _crop,
}


# ---------------------------------------------------------------------------------------------------- postprocessing


def _activation(transform: Component) -> Activation:
    transform.demand_known({"keys", "sigmoid", "softmax", "other", "allow_missing_keys", "dim"})
    _demand_none(transform, "other")
    transform.demand(dim=(0,))
    softmax, sigmoid = transform.flag("softmax", False), transform.flag("sigmoid", False)
    if softmax == sigmoid:
        raise transform.refused("softmax", "or sigmoid must be true, and not both")
    return "softmax" if softmax else "sigmoid"


def _check_invert(transform: Component) -> None:
    transform.demand_known(
        {"keys", "transform", "orig_keys", "meta_keys", "orig_meta_keys", "meta_key_postfix", "nearest_interp"}
        | {"to_tensor", "device", "post_func", "allow_missing_keys"}
    )
    _demand_none(transform, "post_func")
    if transform.flag("nearest_interp", True):
        raise transform.refused(
            "nearest_interp", "must be false (MONAI's default is true): ctflow resamples probabilities linearly"
        )


def _threshold(transform: Component, activation: Activation) -> float | None:
    transform.demand_known(
        {"keys", "argmax", "to_onehot", "threshold", "rounding", "allow_missing_keys", "dim", "keepdim"}
    )
    transform.demand(to_onehot=(None,), rounding=(None,), dim=(0,), keepdim=(True,))
    argmax, threshold = transform.flag("argmax", False), transform.number_or_none("threshold", None)
    if activation == "softmax" and argmax and threshold is None:
        return None
    if activation == "sigmoid" and not argmax and threshold is not None:
        if not 0 < threshold < 1:
            raise transform.refused("threshold", f"must lie between 0 and 1, not {threshold:g}")
        return threshold
    raise transform.refused("argmax", "and threshold: ctflow does softmax with argmax, or sigmoid with a threshold")


def _demand_none(transform: Component, name: str) -> None:
    """Refuse a function by its text; it would not be executed."""
    if name in transform.names and transform.place(name).value is not None:
        raise transform.refused(name, f"is {short(transform.place(name).value)}; ctflow does no such function")
