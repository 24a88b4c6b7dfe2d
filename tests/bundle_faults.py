"""Ways to spoil a bundle of `fuzz_bundles`, each with what ctflow must say: a part of the message, and the reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Said = tuple[str, str]
Fault = Callable[[Any], Said]
FAULTS: dict[str, Fault] = {}

_LABELS = [["L", "R"], ["P", "A"], ["I", "S"]]


def _fault(name: str) -> Callable[[Fault], Fault]:
    def keep(fault: Fault) -> Fault:
        FAULTS[name] = fault
        return fault

    return keep


def _items(bundle: Any, *targets: str) -> list[dict[str, Any]]:
    return [item for item in (*bundle.before, *bundle.after) if item["_target_"] in targets]


# ----------------------------------------------------------------------------------------- one transform that is wrong

SPACING = {"_target_": "Spacingd", "keys": "image", "pixdim": [2, 2, 2], "mode": "bilinear"}
CROP = {"_target_": "CropForegroundd", "keys": "image", "source_key": "image"}
RANGE = {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": -500, "a_max": 400}
PERCENTILES = {
    "_target_": "ScaleIntensityRangePercentilesd",
    "keys": "image",
    "lower": 1,
    "upper": 99,
    "b_min": 0,
    "b_max": 1,
}
NORMALIZE = {"_target_": "NormalizeIntensityd", "keys": "image"}
ORIENT = {"_target_": "Orientationd", "keys": "image", "axcodes": "LPS"}
TYPED = {"_target_": "EnsureTyped", "keys": "image"}
FIRST = {"_target_": "EnsureChannelFirstd", "keys": "image"}

# What is added behind preprocessing, and what is said of which argument.
BEFORE: list[tuple[dict[str, Any], str, str]] = [
    (SPACING | {"mode": "bicubic"}, "mode", "value"),
    (SPACING | {"mode": 3}, "mode", "value"),
    (SPACING | {"padding_mode": "zeros"}, "padding_mode", "value"),
    (SPACING | {"align_corners": True}, "align_corners", "value"),
    (SPACING | {"diagonal": 1}, "diagonal", "value"),
    (SPACING | {"scale_extent": True}, "scale_extent", "value"),
    (SPACING | {"recompute_affine": True}, "recompute_affine", "value"),
    (SPACING | {"min_pixdim": 1.0}, "min_pixdim", "value"),
    (SPACING | {"max_pixdim": [3, 3, 3]}, "max_pixdim", "value"),
    (SPACING | {"dtype": "float16"}, "dtype", "value"),
    (SPACING | {"lazy": True}, "lazy", "value"),
    (SPACING | {"mode": ["bilinear", "bilinear"]}, "mode", "value"),
    (SPACING | {"pixdim": [2, 2]}, "pixdim", "value"),
    (SPACING | {"pixdim": [2, 2, 2, 2]}, "pixdim", "value"),
    (
        SPACING | {"keys": ["label", "image"], "allow_missing_keys": True, "mode": ["bilinear", "spline"]},
        "mode",
        "value",
    ),
    (SPACING | {"keys": "label"}, "keys", "keys"),
    (SPACING | {"keys": ["image", "label"]}, "keys", "keys"),
    (SPACING | {"keys": ["image", "label"], "allow_missing_keys": False}, "keys", "keys"),
    (SPACING | {"keys": ["image", "image"]}, "keys", "keys"),
    (SPACING | {"keys": []}, "keys", "keys"),
    (SPACING | {"keys": 3}, "keys", "keys"),
    (SPACING | {"allow_missing_keys": "yes"}, "allow_missing_keys", "value"),
    (SPACING | {"colour": 1}, "colour", "argument"),
    (SPACING | {"pixdim#0": 3}, "pixdim#0", "argument"),
    (SPACING | {"+pixdim": [3]}, "+pixdim", "argument"),
    ({k: v for k, v in SPACING.items() if k != "pixdim"}, "pixdim", "argument"),
    ({k: v for k, v in SPACING.items() if k != "keys"}, "keys", "argument"),
    (SPACING | {"_target_": "monai.transforms.nowhere.Spacingd"}, "_target_", "target"),
    (SPACING | {"_target_": "scripts.transforms.Spacingd"}, "_target_", "target"),
    (SPACING | {"_target_": "RandFlipd"}, "_target_", "target"),
    (SPACING | {"_target_": "SaveImaged"}, "_target_", "target"),
    ({"_target_": "FromMetaTensord", "keys": "image"}, "_target_", "target"),
    ({"_target_": "ToMetaTensord", "keys": "image"}, "_target_", "target"),
    (SPACING | {"_mode_": "callable"}, "_mode_", "value"),
    (SPACING | {"_requires_": "@inferer"}, "_requires_", "value"),
    (SPACING | {"_requires_": ["$print()"]}, "_requires_#0", "expression"),
    (SPACING | {"_disabled_": 0}, "_disabled_", "value"),
    (SPACING | {"_desc_": "$print()"}, "_desc_", "expression"),
    (SPACING | {"pixdim": "$two()"}, "pixdim", "expression"),
    (SPACING | {"pixdim": [2, "$two", 2]}, "pixdim#1", "expression"),
    (SPACING | {"pixdim": "%inferer"}, "pixdim", "expression"),
    (SPACING | {"pixdim": "@nowhere"}, "pixdim", "reference"),
    (SPACING | {"pixdim": "@inferer#nowhere"}, "pixdim", "reference"),
    (SPACING | {"pixdim": "@##inferer"}, "pixdim", "reference"),
    (SPACING | {"pixdim": "@no-word"}, "pixdim", "reference"),
    (ORIENT | {"axcodes": "RAR"}, "axcodes", "value"),
    (ORIENT | {"labels": [["R", "L"], ["P", "A"], ["I", "S"]]}, "labels", "value"),
    (ORIENT | {"labels": _LABELS[:2]}, "labels", "value"),
    (RANGE | {"a_max": -500}, "a_max", "value"),
    (RANGE | {"clip": True}, "clip", "value"),
    (RANGE | {"dtype": "float64"}, "dtype", "value"),
    (RANGE | {"dtype": "np.float32"}, "dtype", "value"),
    (RANGE | {"b_min": "0"}, "b_min", "value"),
    (PERCENTILES | {"lower": 99.5}, "upper", "value"),
    (PERCENTILES | {"relative": True, "b_max": None}, "relative", "value"),
    ({k: v for k, v in PERCENTILES.items() if k != "b_min"}, "b_min", "argument"),
    (NORMALIZE | {"subtrahend": [3]}, "subtrahend", "value"),
    (NORMALIZE | {"divisor": 3, "channel_wise": True}, "divisor", "value"),
    (NORMALIZE | {"divisor": 0}, "divisor", "value"),
    (NORMALIZE | {"nonzero": 1}, "nonzero", "value"),
    (CROP | {"source_key": "label"}, "source_key", "keys"),
    (CROP | {"keys": "label", "source_key": "label", "allow_missing_keys": True}, "source_key", "keys"),
    ({k: v for k, v in CROP.items() if k != "source_key"}, "source_key", "argument"),
    (CROP | {"start_coord_key": "image"}, "start_coord_key", "keys"),
    (CROP | {"k_divisible": 0}, "k_divisible", "value"),
    (CROP | {"k_divisible": [1, 1]}, "k_divisible", "value"),
    (CROP | {"allow_smaller": "yes"}, "allow_smaller", "value"),
    (CROP | {"select_fn": "$lambda x: x * x > 3"}, "select_fn", "expression"),
    (CROP | {"select_fn": None}, "select_fn", "value"),
    (CROP | {"channel_indices": 1}, "channel_indices", "value"),
    (CROP | {"mode": "linear_ramp"}, "mode", "value"),
    (CROP | {"margin": -1}, "margin", "value"),
    (CROP | {"constant_values": 3, "mode": "edge"}, "constant_values", "argument"),
    (TYPED | {"track_meta": False}, "track_meta", "value"),
    (TYPED | {"data_type": "numpy"}, "data_type", "value"),
    (TYPED | {"dtype": "float"}, "dtype", "value"),
    (TYPED | {"dtype": "torch.float32"}, "dtype", "value"),
    (
        TYPED | {"keys": ["image", "label"], "allow_missing_keys": True, "dtype": ["float16", "float32"]},
        "dtype",
        "value",
    ),
    ({"_target_": "CastToTyped", "keys": "image", "dtype": "$torch.float16"}, "dtype", "value"),
    ({"_target_": "ToDeviced", "keys": "image", "device": "cpu", "dtype": "$torch.half"}, "dtype", "argument"),
    ({"_target_": "SelectItemsd", "keys": "label", "allow_missing_keys": True}, "keys", "keys"),
    ({"_target_": "DeleteItemsd", "keys": ["label", "image"]}, "keys", "keys"),
    ({"_target_": "DeleteItemsd", "keys": "image.x"}, "keys", "keys"),
    ({"_target_": "DeleteItemsd", "keys": ["label", "ima"], "use_re": [False, True]}, "use_re", "value"),
    ({"_target_": "DeleteItemsd", "keys": "label", "allow_missing_keys": True}, "allow_missing_keys", "argument"),
    (FIRST, "_target_", "order"),
    (FIRST | {"channel_dim": 0}, "channel_dim", "value"),
    ({"_target_": "LoadImaged", "keys": "image"}, "_target_", "order"),
    ({"_target_": "LoadImaged", "keys": "image", "affine_lps_to_ras": False}, "affine_lps_to_ras", "value"),
    ({"_target_": "LoadImaged", "keys": "image", "prune_meta_pattern": "affine"}, "prune_meta_pattern", "value"),
    ({"_target_": "LoadImaged", "keys": "image", "reader": "PILReader"}, "reader", "value"),
    ({"_target_": "LoadImaged", "keys": "image", "dtype": "int16"}, "dtype", "value"),
]


def _added(item: dict[str, Any], argument: str, reason: str) -> Fault:
    def spoil(bundle: Any) -> Said:
        bundle.before.append(dict(item))
        return f"#{argument} ", reason

    return spoil


for _number, (_item, _argument, _reason) in enumerate(BEFORE):
    _wanted = "value" if _reason in ("", "argument or value") else _reason
    FAULTS[f"{_item['_target_']} {_argument} {_number}"] = _added(_item, _argument, _wanted)

# Arguments of the parts that every bundle has.
CHANGED: list[tuple[str, str, Any, str, str]] = [
    ("inferer", "padding_mode", "edge", "padding_mode", "value"),
    ("inferer", "cval", "-1", "cval", "value"),
    ("inferer", "cval", False, "cval", "value"),
    ("inferer", "sigma_scale", 0, "sigma_scale", "value"),
    ("inferer", "sigma_scale", [0.125], "sigma_scale", "value"),
    ("inferer", "with_coord", True, "with_coord", "value"),
    ("inferer", "overlap", [0.5], "overlap", "value"),
    ("inferer", "overlap", [0.5, 0.5, 1.25], "overlap", "value"),
    ("inferer", "overlap", 1, "overlap", "value"),
    ("inferer", "roi_size", [16], "roi_size", "value"),
    ("inferer", "roi_size", [16, 16, -2], "roi_size", "value"),
    ("inferer", "mode", "linear", "mode", "value"),
    ("inferer", "sw_batch_size", [4], "sw_batch_size", "value"),
    ("inferer", "buffer_dim", 3, "buffer_dim", "value"),
    ("inferer", "colour", 1, "colour", "argument"),
    ("inferer", "overlap#0", 0.5, "overlap#0", "argument"),
    ("inferer", "+overlap", 0.5, "+overlap", "argument"),
    ("inferer", "_disabled_", True, "_disabled_", "value"),
    ("inferer", "_target_", "SaliencyInferer", "_target_", "target"),
    ("inferer", "_target_", "monai.inferers.utils.SlidingWindowInferer", "_target_", "target"),
    ("network_def", "_disabled_", "true", "_disabled_", "value"),
    ("network_def", "_requires_", "@inferer", "_requires_", "value"),
    ("network_def", "colour", 1, "colour", "argument"),
    ("network_def", "_target_", "monai.networks.blocks.UNet", "_target_", "target"),
    ("network_def", "_target_", "monai.networks.nets.nowhere.UNet", "_target_", "target"),
    ("network_def", "in_channels", "$one()", "in_channels", "expression"),
    ("preprocessing", "lazy", True, "lazy", "value"),
    ("preprocessing", "overrides", {"image": {"mode": "nearest"}}, "overrides", "value"),
    ("preprocessing", "map_items", False, "map_items", "value"),
    ("preprocessing", "unpack_items", True, "unpack_items", "value"),
    ("preprocessing", "_disabled_", True, "_disabled_", "value"),
    ("postprocessing", "lazy", True, "lazy", "value"),
    ("evaluator", "inferer", "@other", "inferer", "workflow"),
    ("evaluator", "postprocessing", "@preprocessing", "postprocessing", "workflow"),
    ("evaluator", "network", "$@other.to(@device)", "network", "workflow"),
    ("evaluator", "mode", "train", "mode", "value"),
    ("evaluator", "decollate", False, "decollate", "value"),
    ("evaluator", "prepare_batch", "$lambda x, *_: x", "prepare_batch", "expression"),
    ("evaluator", "_target_", "EnsembleEvaluator", "network", "argument"),
    ("evaluator", "_target_", "SupervisedTrainer", "_target_", "target"),
    ("dataset", "transform", "@postprocessing", "transform", "workflow"),
]


def _changed(part: str, name: str, value: Any) -> Callable[[Any], None]:
    def spoil(bundle: Any) -> None:
        if part in ("evaluator", "dataset"):
            bundle.document["other"] = {"_target_": "SimpleInferer"}
            whole = {"_target_": "SupervisedEvaluator", "network": "@network", "inferer": "@inferer"}
            whole |= {"postprocessing": "@postprocessing"}
            bundle.document[part] = {"_target_": "Dataset", "data": "$[]"} if part == "dataset" else whole
        bundle.document[part][name] = value

    return spoil


def _with_said(spoil: Callable[[Any], None], said: Said) -> Fault:
    def fault(bundle: Any) -> Said:
        spoil(bundle)
        return said

    return fault


for _number, (_part, _name, _value, _argument, _reason) in enumerate(CHANGED):
    _said = (f"{_part}#{_argument} ", _reason)
    FAULTS[f"{_part} {_name} {_number}"] = _with_said(_changed(_part, _name, _value), _said)

# Arguments of the transforms after the network: which transform, the argument, its value, and what is said.
AFTER: list[tuple[str, str, Any, str, str]] = [
    ("Activationsd", "dim", 1, "dim", "value"),
    ("Activationsd", "other", "$torch.tanh", "other", "expression"),
    ("Activationsd", "keys", "image", "keys", "keys"),
    ("Activationsd", "keys", ["pred", "image"], "keys", "keys"),
    ("Activationsd", "keys", ["pred", "boxes"], "keys", "keys"),
    ("Activationsd", "colour", 1, "colour", "argument"),
    ("Invertd", "nearest_interp", "yes", "nearest_interp", "value"),
    ("Invertd", "nearest_interp", None, "nearest_interp", "value"),
    ("Invertd", "orig_keys", "label", "orig_keys", "keys"),
    ("Invertd", "orig_keys", "pred", "orig_keys", "keys"),
    ("Invertd", "transform", "@other", "transform", "workflow"),
    ("Invertd", "transform", {"_target_": "Compose", "transforms": []}, "transform", "workflow"),
    ("Invertd", "transform", "$copy.deepcopy(@dataset)", "transform", "workflow"),
    ("Invertd", "post_func", "$abs", "post_func", "expression"),
    ("Invertd", "keys", ["image", "pred"], "keys", "keys"),
    ("Invertd", "meta_keys", "pred", "meta_keys", "keys"),
    ("AsDiscreted", "to_onehot", 2, "to_onehot", "value"),
    ("AsDiscreted", "rounding", "torchrounding", "rounding", "value"),
    ("AsDiscreted", "keepdim", False, "keepdim", "value"),
    ("AsDiscreted", "keys", "label", "keys", "keys"),
    ("AsDiscreted", "dtype", "uint8", "dtype", "argument"),
]
PER_KEY = {"other", "nearest_interp", "orig_keys", "post_func", "meta_keys", "to_onehot", "rounding"}


def _spoilt_after(target: str, name: str, value: Any) -> Callable[[Any], None]:
    def spoil(bundle: Any) -> None:
        (item,) = _items(bundle, target)
        if name == "keys":
            item.pop("allow_missing_keys", None)
        elif name in PER_KEY and isinstance(item["keys"], list):
            # Plainly written, so that the fault is the only one.
            item["keys"] = "pred"
            item.pop("allow_missing_keys", None)
            for other, given in list(item.items()):
                if isinstance(given, list) and other != "keys":
                    item[other] = (
                        next(v for v in given if v not in (None, "label")) if other == "orig_keys" else given[0]
                    )
        item[name] = value
        bundle.document["other"] = {"_target_": "Compose", "transforms": []}

    return spoil


for _number, (_part, _name, _value, _argument, _reason) in enumerate(AFTER):
    FAULTS[f"{_part} {_name} {_number}"] = _with_said(_spoilt_after(_part, _name, _value), (f"#{_argument} ", _reason))


# ------------------------------------------------------------------------------------------------ the order of the list


@_fault("no EnsureChannelFirstd")
def _(bundle: Any) -> Said:
    bundle.before[:] = [item for item in bundle.before if item["_target_"] != "EnsureChannelFirstd"]
    bundle.before[0].pop("ensure_channel_first", None)
    has_step = any("Load" not in i["_target_"] and "image" in str(i["keys"]) and _is_step(i) for i in bundle.before)
    return ("#_target_ is" if has_step else "preprocessing loads"), "order"


def _is_step(item: dict[str, Any]) -> bool:
    return any(word in item["_target_"] for word in ("Orient", "Spacing", "Scale", "Normalize", "Crop"))


@_fault("ToTensord after Spacingd")
def _(bundle: Any) -> Said:
    bundle.before.extend([dict(SPACING), {"_target_": "ToTensord", "keys": "image"}])
    return "#_target_ comes after a spatial transform", "order"


@_fault("zeros that depend on rounding")
def _(bundle: Any) -> Said:
    clip = RANGE | {"b_min": 0, "b_max": 1, "clip": True}
    bundle.before.extend([clip, dict(SPACING), bundle.one_of(dict(CROP), NORMALIZE | {"nonzero": True})])
    return "which depends on rounding", "order"


@_fault("postprocessing in another order")
def _(bundle: Any) -> Said:
    activate, invert, discrete = _items(bundle, "Activationsd", "Invertd", "AsDiscreted")
    keep = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}
    orders = [activate, activate, invert, discrete], [activate, invert, invert, discrete], [activate, discrete]
    bundle.after[:] = bundle.one_of(*orders, [discrete, activate, invert], [activate, keep, invert, discrete])
    return "postprocessing", "order"


@_fault("the image deleted before Invertd")
def _(bundle: Any) -> Said:
    bundle.after.insert(0, {"_target_": "DeleteItemsd", "keys": "image"})
    return "#keys removes 'image'", "keys"


@_fault("only the prediction kept before Invertd")
def _(bundle: Any) -> Said:
    bundle.after.insert(0, {"_target_": "SelectItemsd", "keys": "pred"})
    return "#keys removes 'image'", "keys"


@_fault("the prediction's place forgotten before Invertd")
def _(bundle: Any) -> Said:
    item = {"_target_": "EnsureTyped", "keys": "pred", "track_meta": False}
    bundle.after.insert(0, item)
    return "#track_meta ", "value"


@_fault("the prediction rounded before AsDiscreted")
def _(bundle: Any) -> Said:
    bundle.after.insert(1, {"_target_": "CastToTyped", "keys": "pred", "dtype": "uint8"})
    return "#dtype ", "value"


# ------------------------------------------------------------------------------------------- references and overrides


@_fault("written: a disabled item by reference")
def _(bundle: Any) -> Said:
    bundle.document["off"] = SPACING | {"_disabled_": True}
    bundle.before.append("@off")
    return "#_disabled_ is true", "value"


@_fault("written: a circle")
def _(bundle: Any) -> Said:
    bundle.document |= {"a": "@b", "b": "@a"}
    bundle.before.append("@a")
    return "is a reference to itself", "reference"


def _overriding(key: str, value: Any, said: str) -> Fault:
    def spoil(bundle: Any) -> Said:
        bundle.document[key] = value
        return said, "override"

    return spoil


for _key, _value in {
    "nowhere#overlap": 0.5,
    "inferer#nowhere#overlap": 0.5,
    "preprocessing#transforms#99": {},
    "preprocessing#transforms#-99#keys": "image",
    "preprocessing#transforms#first": {},
    "image_key#0": "label",
    "evaluate::amp": True,
    "+inferer": [0.5],
    "+preprocessing#transforms": {"_target_": "Spacingd"},
    "+image_key": "label",
    "+nowhere#overlap": {},
    "inferer#": 1,
    "inferer# overlap": 1,
    "": {},
    "+": {},
}.items():
    FAULTS[f"written: {_key!r}"] = _overriding(_key, _value, f"{_key} is an override that MONAI cannot apply")


@_fault("written: an override before what it changes")
def _(bundle: Any) -> Said:
    entries = list(bundle.document.items())
    bundle.document.clear()
    bundle.document.update({"inferer#overlap": 0.5, **dict(entries)})
    return "inferer#overlap is an override that MONAI cannot apply", "override"


@_fault("written: an override through a reference")
def _(bundle: Any) -> Said:
    bundle.document["sliding"] = bundle.document["inferer"]
    bundle.document["inferer"] = "@sliding"
    bundle.document["inferer#overlap"] = 0.5
    return "inferer#overlap is an override that MONAI cannot apply", "override"


@_fault("written: an override that spoils")
def _(bundle: Any) -> Said:
    sign = bundle.one_of("#", "::")
    bundle.document[f"inferer{sign}padding_mode"] = "edge"
    return "inferer#padding_mode ", "value"


@_fault("written: a merge that spoils")
def _(bundle: Any) -> Said:
    bundle.document["+inferer"] = {"cval": "3"}
    return "inferer#cval ", "value"


@_fault("written: a merged transform that spoils")
def _(bundle: Any) -> Said:
    bundle.document["+preprocessing#transforms"] = [SPACING | {"keys": "label"}]
    return "#keys names 'label'", "keys"
