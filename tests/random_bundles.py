"""Random small bundles of what ctflow accepts, written in the many ways that mean the same to MONAI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

Json = Any


# -------------------------------------------------------------------------------------------------------- the bundles


@dataclass
class Bundle:
    """A bundle in the making.

    Attributes:
        rng: Where every choice comes from.
        document: configs/inference.json; the order of its keys is that of the file.
        channels: Of the network's answer.
        size: A window's size that the network takes.
    """

    rng: np.random.Generator
    document: dict[str, Json] = field(default_factory=dict)
    channels: int = 2
    size: int = 16

    def one_of(self, *values: Json) -> Json:
        return values[int(self.rng.integers(len(values)))]

    def often(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def number(self, low: float, high: float, digits: int = 2) -> float:
        return round(float(self.rng.uniform(low, high)), digits)

    @property
    def before(self) -> list[Json]:
        return self.document["preprocessing"]["transforms"]

    @property
    def after(self) -> list[Json]:
        return self.document["postprocessing"]["transforms"]


def sound_bundle(rng: np.random.Generator) -> Bundle:
    """A bundle that ctflow must accept, written plainly."""
    bundle = Bundle(rng)
    network = _network(bundle)
    bundle.document = {
        "device": "$torch.device('cpu')",
        "image_key": "image",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": _before(bundle)},
        "dataset": {"_target_": "Dataset", "data": "$[]", "transform": "@preprocessing"},
        "inferer": _inferer(bundle),
        "postprocessing": {"_target_": "Compose", "transforms": _after(bundle)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "$[]",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
    }
    if bundle.often(0.3):
        bundle.document["preprocessing"] |= bundle.one_of({"lazy": None}, {"map_items": True}, {"log_stats": False})
    if bundle.often(0.3):
        del bundle.document["evaluator"], bundle.document["dataset"]
    return bundle


def _network(bundle: Bundle) -> dict[str, Json]:
    bundle.channels = bundle.one_of(1, 2, 2, 3)
    common = {"spatial_dims": 3, "in_channels": 1, "out_channels": bundle.channels}
    bundle.size = bundle.one_of(12, 16)
    if bundle.often(0.85):
        act = bundle.one_of("RELU", ["leakyrelu", {"negative_slope": 0.2}], "PRELU")
        norm = bundle.one_of("INSTANCE", ["group", {"num_groups": 1}], "BATCH")
        return {"_target_": "UNet", **common, "channels": [2, 3], "strides": [2], "act": act, "norm": norm}
    bundle.size = 32
    return {"_target_": "BasicUNet", **common, "features": [2, 2, 2, 2, 2, 2]}


def _keys(bundle: Bundle, *, is_list_safe: bool = True) -> dict[str, Json]:
    keys = bundle.one_of("image", "image", ["image"], "@image_key", ["@image_key"])
    if is_list_safe and bundle.often(0.15):
        other = bundle.one_of(["image", "label"], ["label", "image"], ["image", "label", "mask"])
        return {"keys": other, "allow_missing_keys": True}
    if is_list_safe and bundle.often(0.1):
        return {"keys": keys, "allow_missing_keys": bundle.one_of(True, False)}
    return {"keys": keys}


def _per_key(bundle: Bundle, transform: dict[str, Json], name: str, value: Json, other: Json) -> None:
    """An argument with one value for all keys, or a list with one for each: `other` for those without data."""
    keys = transform["keys"]
    if isinstance(keys, list) and bundle.often(0.5):
        transform[name] = [value if key in ("image", "@image_key", "pred") else other for key in keys]
    else:
        transform[name] = value


def _before(bundle: Bundle) -> list[Json]:
    load: dict[str, Json] = {"_target_": "LoadImaged", **_keys(bundle)}
    load |= bundle.one_of({}, {}, {"image_only": True}, {"reader": "NibabelReader"}, {"reader": "nibabelreader"})
    load |= bundle.one_of({}, {}, {"dtype": "float32"}, {"dtype": "$np.float32"}, {"image_only": False})
    transforms = [load]
    if bundle.often(0.2):
        load["ensure_channel_first"] = True
    else:
        channel_first = {"_target_": "EnsureChannelFirstd", **_keys(bundle)}
        transforms.append(channel_first | bundle.one_of({}, {}, {"channel_dim": "no_channel"}, {"strict_check": False}))
    spatial = [bundle.often(0.7), bundle.often(0.7), bundle.often(0.3)]
    steps = [maker(bundle) for maker, is_done in zip((_orient, _spacing, _crop), spatial, strict=True) if is_done]
    for _ in range(int(bundle.rng.integers(1, 3))):
        at = int(bundle.rng.integers(len(steps) + 1))
        steps.insert(at, bundle.one_of(_range, _percentiles, _normalize)(bundle))
    if bundle.often(0.15):
        steps.append(bundle.one_of(_orient, _spacing)(bundle))
    if bundle.often(0.15):
        steps.insert(int(bundle.rng.integers(len(steps) + 1)), _of_label(bundle))
    _leave_out_rounding(steps)
    for step in steps:
        transforms.append(step)
        if bundle.often(0.15):
            transforms.append(_bookkeeping(bundle))
    if bundle.often(0.5):
        transforms.append({"_target_": "EnsureTyped", **_keys(bundle)})
    return transforms


def _leave_out_rounding(steps: list[Json]) -> None:
    """Nothing that depends on exact zeros behind a resampling of clipped values: ctflow rejects it."""
    is_flat = is_near = False
    for step in list(steps):
        if "image" not in str(step["keys"]):
            continue
        is_flat = is_flat or step.get("clip", False) or step.get("margin", 0) > 0
        is_near = is_near or (is_flat and step["_target_"] == "Spacingd")
        if is_near and step["_target_"] == "CropForegroundd":
            steps.remove(step)
        if is_near and step.get("nonzero"):
            step["nonzero"] = False


def _bookkeeping(bundle: Bundle) -> dict[str, Json]:
    kind = bundle.one_of("EnsureTyped", "CastToTyped", "ToDeviced", "DeleteItemsd", "SelectItemsd", "Identityd")
    if kind == "DeleteItemsd":
        return {"_target_": kind, "keys": bundle.one_of("label", ["label", "mask"])}
    found: dict[str, Json] = {"_target_": kind, **_keys(bundle)}
    if kind == "ToDeviced":
        found["device"] = bundle.one_of("cpu", "@device", "$torch.device('cpu')")
    if kind in ("EnsureTyped", "CastToTyped") and bundle.often(0.5):
        word = bundle.one_of("float32", "$np.float32", "$torch.float32", "$torch.float", "$numpy.float32")
        _per_key(bundle, found, "dtype", word, "uint8")
    if kind == "EnsureTyped":
        found |= bundle.one_of({}, {"track_meta": True}, {"data_type": "tensor"}, {"device": "@device"})
    return found


def _of_label(bundle: Bundle) -> dict[str, Json]:
    """A transform of what is not there: it does nothing, whatever it asks for."""
    found = bundle.one_of(
        {"_target_": "Spacingd", "pixdim": 9, "mode": "nearest"},
        {"_target_": "Orientationd", "axcodes": "LPS"},
        {"_target_": "ScaleIntensityRanged", "a_min": 1, "a_max": 1},
        {"_target_": "CropForegroundd", "source_key": "image", "margin": [1, 2, 3]},
        {"_target_": "CastToTyped", "dtype": "uint8"},
    )
    return found | {"keys": bundle.one_of("label", ["label", "mask"]), "allow_missing_keys": True}


def _orient(bundle: Bundle) -> dict[str, Json]:
    pairs = [bundle.one_of("L", "R"), bundle.one_of("P", "A"), bundle.one_of("I", "S")]
    axcodes = "".join(str(code) for code in bundle.rng.permutation(pairs))
    found: dict[str, Json] = {"_target_": "Orientationd", **_keys(bundle)}
    if bundle.often(0.1):
        return found | {"as_closest_canonical": True}
    found["axcodes"] = bundle.one_of(axcodes, axcodes, "RAS", list(axcodes))
    return found | bundle.one_of({}, {}, {"labels": [["L", "R"], ["P", "A"], ["I", "S"]]}, {"lazy": False})


def _spacing(bundle: Bundle) -> dict[str, Json]:
    sizes = [bundle.one_of(bundle.number(1.3, 4), bundle.number(1.3, 4), 2.0, -1, 0) for _ in range(3)]
    found: dict[str, Json] = {"_target_": "Spacingd", **_keys(bundle)}
    found["pixdim"] = bundle.one_of(sizes, sizes, sizes[:1], max(float(sizes[0]), 1.5))
    _per_key(bundle, found, "mode", "bilinear", "nearest")
    if bundle.often(0.3):
        _per_key(bundle, found, "padding_mode", "border", "zeros")
    if bundle.often(0.2):
        _per_key(bundle, found, "align_corners", bundle.one_of(False, None), True)
    if bundle.often(0.2):
        word = bundle.one_of("float64", "$np.float64", "$torch.float64", "float32", "$np.float32", None)
        _per_key(bundle, found, "dtype", word, "float64")
    return found | bundle.one_of({}, {}, {"diagonal": False}, {"ensure_same_shape": True}, {"max_pixdim": None})


def _range(bundle: Bundle) -> dict[str, Json]:
    low = bundle.number(-1100, 0)
    found = {"_target_": "ScaleIntensityRanged", **_keys(bundle), "a_min": low, "a_max": low + bundle.number(100, 2000)}
    b_min = bundle.one_of(0, 0.0, -1, bundle.number(-3, 0))
    found |= bundle.one_of({}, {"b_min": b_min, "b_max": b_min + bundle.number(1, 3)}, {"b_min": None})
    if found.get("b_min") is not None:
        found["clip"] = bundle.one_of(True, True, False)
    return found | bundle.one_of({}, {}, {"dtype": "$np.float32"}, {"dtype": None}, {"dtype": "float32"})


def _percentiles(bundle: Bundle) -> dict[str, Json]:
    found = {"_target_": "ScaleIntensityRangePercentilesd", **_keys(bundle)}
    found |= {"lower": bundle.one_of(0, 0.5, 5), "upper": bundle.one_of(90, 99.5, 100)}
    if bundle.often(0.2):
        return found | {"b_min": None, "b_max": bundle.one_of(None, 2.0)}
    found |= {"b_min": bundle.one_of(0, -1.5), "b_max": bundle.one_of(1, 2.5), "clip": bundle.one_of(True, False)}
    return found | bundle.one_of({}, {}, {"relative": True}, {"channel_wise": True}, {"relative": False})


def _normalize(bundle: Bundle) -> dict[str, Json]:
    found = {"_target_": "NormalizeIntensityd", **_keys(bundle), "nonzero": bundle.one_of(True, False)}
    values = {"subtrahend": bundle.number(-500, 500), "divisor": bundle.number(50, 500)}
    given = {name: value for name, value in values.items() if bundle.often(0.4)}
    if bundle.often(0.4):
        found["channel_wise"] = True
        given = {name: [value] for name, value in given.items()}
    return found | given


def _crop(bundle: Bundle) -> dict[str, Json]:
    found = {"_target_": "CropForegroundd", **_keys(bundle), "source_key": bundle.one_of("image", "@image_key")}
    found |= bundle.one_of({}, {"margin": int(bundle.rng.integers(0, 6))}, {"k_divisible": bundle.one_of(1, [1, 1, 1])})
    return found | bundle.one_of({}, {}, {"start_coord_key": None}, {"end_coord_key": "end"}, {"mode": "constant"})


def _inferer(bundle: Bundle) -> dict[str, Json]:
    size = bundle.size
    sizes = bundle.one_of(size, [size] * 3, [size, size, 20] if size < 32 else 32)
    found = {"_target_": "SlidingWindowInferer", "roi_size": sizes, "sw_batch_size": bundle.one_of(1, 2, 4, 7)}
    if bundle.often(0.8):
        overlap = bundle.one_of(0, 0.25, 0.5, 0.6, bundle.number(0, 0.6))
        found["overlap"] = bundle.one_of(overlap, overlap, [overlap] * 3)
    found |= bundle.one_of({}, {"mode": "constant"}, {"mode": "gaussian"}, {"mode": "gaussian"})
    found |= bundle.one_of({}, {}, {"sigma_scale": 0.125}, {"sigma_scale": [0.125] * 3}, {"padding_mode": "constant"})
    found |= bundle.one_of({}, {"cval": 0}, {"with_coord": False}, {"cache_roi_weight_map": True})
    found |= bundle.one_of({}, {}, {"device": "@device"}, {"sw_device": "$@device"}, {"cpu_thresh": 5})
    return found | bundle.one_of(
        {}, {}, {"buffer_steps": 1}, {"buffer_steps": 2, "buffer_dim": bundle.one_of(0, -1, 1)}
    )


def _after(bundle: Bundle) -> list[Json]:
    is_sigmoid = bundle.channels == 1
    activate: dict[str, Json] = {"_target_": "Activationsd", **_answer_keys(bundle)}
    _per_key(bundle, activate, "sigmoid" if is_sigmoid else "softmax", value=True, other=False)
    activate |= bundle.one_of({}, {}, {"other": None}, {"dim": 0}, {"softmax" if is_sigmoid else "sigmoid": False})
    invert: dict[str, Json] = {"_target_": "Invertd", **_answer_keys(bundle)}
    invert["transform"] = bundle.one_of("@preprocessing", "@preprocessing", "$@preprocessing")
    _per_key(bundle, invert, "orig_keys", bundle.one_of("image", "@image_key"), "label")
    _per_key(bundle, invert, "nearest_interp", value=False, other=True)
    invert |= bundle.one_of({}, {"to_tensor": True}, {"meta_key_postfix": "meta_dict"}, {"device": "cpu"})
    discrete: dict[str, Json] = {"_target_": "AsDiscreted", **_answer_keys(bundle)}
    if is_sigmoid:
        _per_key(bundle, discrete, "threshold", bundle.one_of(0.5, 0.4, bundle.number(0.2, 0.8)), None)
    else:
        _per_key(bundle, discrete, "argmax", value=True, other=False)
    discrete |= bundle.one_of({}, {}, {"to_onehot": None}, {"keepdim": True}, {"rounding": None})
    found = [activate, invert, discrete]
    if bundle.often(0.3):
        found.insert(0, {"_target_": "EnsureTyped", "keys": "pred"} | bundle.one_of({}, {"device": "@device"}))
    if bundle.often(0.2):
        found.append({"_target_": "CastToTyped", "keys": "pred", "dtype": bundle.one_of("uint8", "$np.uint8", "int32")})
    if bundle.often(0.2):
        found.append(
            bundle.one_of({"_target_": "SelectItemsd", "keys": "pred"}, {"_target_": "DeleteItemsd", "keys": "image"})
        )
    return found


def _answer_keys(bundle: Bundle) -> dict[str, Json]:
    if bundle.often(0.15):
        return {"keys": bundle.one_of(["pred", "boxes"], ["boxes", "pred"]), "allow_missing_keys": True}
    return {"keys": bundle.one_of("pred", "pred", ["pred"])}


def lengthen(bundle: Bundle) -> None:
    """One more step behind the others: of those that turn, pad, crop or scale what is there."""
    size = [int(bundle.rng.integers(4, 30)) for _ in range(3)]
    steps: list[dict[str, Json]] = [
        {"_target_": "Flipd", "spatial_axis": bundle.one_of(None, 0, [0, 2], -1)},
        {"_target_": "Rotate90d", "k": bundle.one_of(1, 2, 3), "spatial_axes": bundle.one_of([0, 1], [1, 2], [2, 0])},
        {"_target_": "Transposed", "indices": bundle.one_of([0, 2, 1, 3], [0, 3, 2, 1])},
        {"_target_": "CenterSpatialCropd", "roi_size": size},
        {"_target_": "ScaleIntensityd", "minv": -1, "maxv": bundle.one_of(1, 2.5)},
        {"_target_": "ClipIntensityPercentilesd", "lower": 2, "upper": bundle.one_of(98, None)},
    ]
    if not any("Crop" in item["_target_"] for item in bundle.before):  # ctflow refuses to pad what a crop left empty
        steps += [
            {"_target_": "SpatialPadd", "spatial_size": size} | bundle.one_of({}, {"method": "end"}, {"value": -1}),
            {"_target_": "BorderPadd", "spatial_border": bundle.one_of(2, [1, 0, 3])},
            {"_target_": "DivisiblePadd", "k": bundle.one_of(8, [4, 1, 16])},
            {"_target_": "Resized", "spatial_size": [each + 4 for each in size], "mode": "trilinear"},
        ]
    bundle.before.append(bundle.one_of(*steps) | {"keys": bundle.one_of("image", ["image"], "@image_key")})


def ensembled(bundle: Bundle) -> None:
    """Several copies of the network, whose predictions are combined before or after any of the three transforms."""
    document, count = bundle.document, bundle.one_of(2, 3)
    keys = bundle.one_of([f"pred_{number}" for number in range(count)], ["a", "b", "c"][:count])
    is_sigmoid = bundle.channels == 1
    after: list[dict[str, Json]] = [
        {"_target_": "Activationsd", "sigmoid" if is_sigmoid else "softmax": True},
        {"_target_": "Invertd", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False},
        {"_target_": "AsDiscreted", **({"threshold": bundle.number(0.2, 0.8)} if is_sigmoid else {"argmax": True})},
    ]
    combined_at = bundle.one_of(0, 1, 2, 3)
    combine: dict[str, Json] = {"_target_": "MeanEnsembled", "output_key": "pred"}
    if combined_at == len(after):
        combine["_target_"] = "VoteEnsembled"
        combine |= {} if is_sigmoid else {"num_classes": bundle.one_of(bundle.channels, bundle.channels + 1)}
    elif bundle.often(0.5):
        combine["weights"] = [bundle.number(0.1, 2) for _ in keys]
    after.insert(combined_at, combine)
    for number, item in enumerate(after):
        several = bundle.one_of(keys, keys[::-1])
        item["keys"] = several if number <= combined_at else "pred"
    document["postprocessing"]["transforms"] = after
    for number in range(count):
        document[f"network_{number}"] = bundle.one_of("$", "$copy.") + "deepcopy(@network_def).to(@device)"
    document["handlers"] = [
        {
            "_target_": "CheckpointLoader",
            "load_path": f"models/{number}.pt",
            "load_dict": {"model": f"@network_{number}"},
        }
        for number in range(count)
    ]
    document["evaluator"] = {
        "_target_": bundle.one_of("EnsembleEvaluator", "monai.engines.EnsembleEvaluator"),
        "networks": [f"@network_{number}" for number in range(count)],
        "inferer": "@inferer",
        "postprocessing": "@postprocessing",
    }
    if keys[0] == "a" or bundle.often(0.3):
        document["evaluator"]["pred_keys"] = keys


# --------------------------------------------------------------------------------- many ways to write the same bundle


def rewritten(bundle: Bundle) -> None:
    """Write the same in other words: long names, references, overrides, merged lists and disabled items."""
    document = bundle.document
    for part in (document["preprocessing"], document["postprocessing"], document["inferer"], document["network_def"]):
        _rename(bundle, part)
    for items in (bundle.before, bundle.after):
        for item in items:
            _rename(bundle, item)
    while bundle.often(0.4):
        _disabled_item(bundle)
    while bundle.often(0.5):
        _referred(bundle)
    while bundle.often(0.5):
        bundle.one_of(_overridden, _overridden, _split_list, _split_object)(bundle)


def _rename(bundle: Bundle, item: dict[str, Json]) -> None:
    name = item["_target_"]
    package = {
        "SlidingWindowInferer": "monai.inferers",
        "UNet": "monai.networks.nets",
        "BasicUNet": "monai.networks.nets",
    }
    home = package.get(name, "monai.transforms")
    if name.endswith("d") and bundle.often(0.2):
        name = name[:-1] + bundle.one_of("D", "Dict")
    if bundle.often(0.2):
        name = f"{home}.{name}"
    item["_target_"] = name
    if bundle.often(0.1):
        more = bundle.one_of(
            {"_desc_": "as the atlas"}, {"_disabled_": False}, {"_mode_": "default"}, {"_requires_": []}
        )
        item |= {key: value for key, value in more.items() if key not in item}


def _disabled_item(bundle: Bundle) -> None:
    items = bundle.one_of(bundle.before, bundle.after)
    item = {
        "_target_": bundle.one_of("RandFlipd", "Spacingd", "scripts.mine.Wild"),
        "_disabled_": bundle.one_of(True, " True "),
    }
    items.insert(int(bundle.rng.integers(len(items) + 1)), item)


def _fresh(bundle: Bundle, value: Json) -> str:
    """Put a value under a new top-level key, or into an object or list there; the reference to it."""
    name = f"v{len(bundle.document)}"
    kind = bundle.one_of("plain", "object", "list")
    content = {"plain": value, "object": {"x": value}, "list": [None, value]}[kind]
    entries = list(bundle.document.items())
    entries.insert(int(bundle.rng.integers(len(entries) + 1)), (name, content))
    bundle.document.clear()
    bundle.document.update(entries)
    sign = bundle.one_of("#", "::")
    return f"@{name}" + {"plain": "", "object": f"{sign}x", "list": f"{sign}1"}[kind]


def _places(bundle: Bundle) -> list[tuple[dict[str, Json], str]]:
    """Arguments of the components that still stand in their place."""
    document = bundle.document
    parts = [document["inferer"], document["network_def"]]
    for key in ("preprocessing", "postprocessing"):
        part = document[key]
        if isinstance(part, dict) and isinstance(part.get("transforms"), list):
            parts += [item for item in part["transforms"] if isinstance(item, dict) and "_disabled_" not in item]
    return [
        (part, name)
        for part in parts
        if isinstance(part, dict)
        for name, value in part.items()
        if name not in ("_target_", "_disabled_", "_requires_", "transform") and _is_literal(value)
    ]


def _is_literal(value: Json) -> bool:
    if isinstance(value, list):
        return all(_is_literal(item) for item in value)
    return not (isinstance(value, str) and value[:1] in ("@", "$"))


def _referred(bundle: Bundle) -> None:
    part, name = bundle.one_of(*_places(bundle))
    if isinstance(part[name], list) and part[name] and bundle.often(0.4):
        at = int(bundle.rng.integers(len(part[name])))
        part[name] = list(part[name])
        part[name][at] = _fresh(bundle, part[name][at])
    elif bundle.often(0.3) and bundle.before:
        items = bundle.before
        at = int(bundle.rng.integers(len(items)))
        if isinstance(items[at], dict) and "_disabled_" not in items[at]:
            items[at] = _fresh(bundle, items[at])
    else:
        part[name] = _fresh(bundle, part[name])


def _overridden(bundle: Bundle) -> None:
    """Another value stands in its place, and the right one in an override behind it."""
    document = bundle.document
    key = bundle.one_of("preprocessing", "postprocessing", "inferer", "network_def")
    part, path = document[key], [key]
    if key in ("preprocessing", "postprocessing"):
        items = part["transforms"]
        if not items:
            return
        at = int(bundle.rng.integers(len(items)))
        is_split = any(override.startswith(f"+{key}") for override in document)
        path += ["transforms", str(at - len(items) if bundle.often(0.3) and not is_split else at)]
        part = items[at]
    if not isinstance(part, dict) or "_disabled_" in part:
        return
    name = bundle.one_of(*part)
    value = part[name]
    if value == "wrong" or (isinstance(value, list) and "wrong" in value):
        return
    if isinstance(value, list) and value and bundle.often(0.3):
        at = int(bundle.rng.integers(len(value)))
        path += [name, str(at)]
        part[name] = [*value[:at], "wrong", *value[at + 1 :]]
        value = value[at]
    else:
        path.append(name)
        part[name] = "wrong"
        if bundle.often(0.3):
            del part[name]
    document[bundle.one_of("#", "::").join(path)] = value


def _split_list(bundle: Bundle) -> None:
    key = bundle.one_of("preprocessing", "postprocessing")
    items = bundle.document[key]["transforms"]
    if any(override.startswith((f"{key}#", f"{key}::", f"+{key}")) for override in bundle.document):
        return  # an override of an item may count from the end, and a second part would come before the first
    cut = int(bundle.rng.integers(len(items)))
    bundle.document[key]["transforms"] = items[:cut]
    bundle.document[f"+{key}{bundle.one_of('#', '::')}transforms"] = items[cut:]


def _split_object(bundle: Bundle) -> None:
    key = bundle.one_of("inferer", "network_def")
    part = bundle.document[key]
    if any(override.startswith((f"{key}#", f"{key}::", f"+{key}")) for override in bundle.document):
        return
    names = [name for name in part if bundle.often(0.4)]
    bundle.document[f"+{key}"] = {name: part.pop(name) for name in names}
