"""plans.json -> preprocessing, windows and network of one of its configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.config import is_number, short
from ctflow.bundle.nnunet.folder import PLANS
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec
from ctflow.core.steps import ClipNormalize, CropNonzero, Orient, ResampleSpline, Spline, Step, ZScore
from ctflow.core.volume import Size3
from ctflow.networks.build import check_size
from ctflow.networks.nnunet import CLASS_ARGUMENTS, check_nnunet_arguments

# SimpleITK gives a DICOM series as slices, rows and columns towards S, P and L; nibabel's reader with reorientation
# gives S, A and R.
_AXES = {
    "SimpleITKIO": "SPL",
    "NibabelIO": "SPL",
    "NibabelIOWithReorient": "SAR",
}
_RESAMPLING = "resample_data_or_seg_to_shape"
_LARGEST_PATCH, _LARGEST_MM = 1024, 100.0
_DEEPEST = 8  # configurations that inherit from each other
_NETWORKS = "dynamic_network_architectures.architectures"


@dataclass(frozen=True)
class Planned:
    """What a plans.json says of one configuration; see `ModelSpec`."""

    steps: tuple[Step, ...]
    roi: Size3
    network: NetworkSpec
    notes: tuple[str, ...]


def configuration_from_plans(plans: Mapping[str, Any], name: str, out_channels: int) -> Planned:
    """Read a configuration.

    Args:
        plans: plans.json, parsed.
        name: The configuration that was trained.
        out_channels: Channels of the network, which plans.json leaves to the labels.

    Raises:
        BundleInvalid: A part is missing or is one that ctflow does not support; the message names the key.

    Source: nnU-Net 2.8.1 `PlansManager`, `ConfigurationManager` and `DefaultPreprocessor`.
    """
    given = _inherited(plans, name)
    at = f"configurations#{name}"
    _demand(given.get("preprocessor_name"), "DefaultPreprocessor", f"{at}#preprocessor_name")
    _demand(plans.get("label_manager", "LabelManager"), "LabelManager", "label_manager")
    if given.get("previous_stage") is not None:
        raise invalid_plans(
            f"{at}#previous_stage",
            f"is {short(given['previous_stage'])}: a cascade needs the result of another model; give -m the folder of "
            "3d_fullres, or of 3d_lowres alone",
            "cascade",
        )
    patch = given.get("patch_size")
    if isinstance(patch, list) and len(patch) == 2:
        raise invalid_plans(f"{at}#patch_size", "has 2 sizes: ctflow runs 3d_fullres and 3d_lowres", "target")
    d, h, w = (int(size) for size in _three(patch, f"{at}#patch_size", 1, _LARGEST_PATCH, whole=True))
    axes, notes = _axes(plans)
    spacing = _three(given.get("spacing"), f"{at}#spacing", 1e-3, _LARGEST_MM)
    resample = ResampleSpline(spacing, _spline(given, "data", at), _spline(given, "probabilities", at))
    steps = (Orient(axes), CropNonzero(), *_normalization(plans, given, at), resample)
    return Planned(steps, (d, h, w), _network(given, at, out_channels), notes)


def invalid_plans(place: str, problem: str, reason: str = "value") -> BundleInvalid:
    """The error for a key of plans.json."""
    return BundleInvalid(f"{PLANS}: {place} {problem}", reason=reason)


def _inherited(plans: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A configuration over those that it inherits from."""
    found = plans.get("configurations")
    given: dict[str, Any] = {}
    wanted: Any = name
    for _ in range(_DEEPEST):
        layer = found.get(wanted) if isinstance(found, Mapping) and isinstance(wanted, str) else None
        if not isinstance(layer, Mapping):
            raise invalid_plans(
                "configurations", f"has no {short(wanted)}, which the checkpoint was trained with", "keys"
            )
        given = {**layer, **given}
        if "inherits_from" not in layer:
            return given
        wanted = layer["inherits_from"]
    raise invalid_plans(f"configurations#{name}", "inherits from itself, or too often", "reference")


def _demand(value: Any, only: str, place: str) -> None:
    if value != only:
        raise invalid_plans(place, f"is {short(value)}; ctflow implements only {only}")


def _three(given: Any, place: str, low: float, high: float, *, whole: bool = False) -> tuple[float, float, float]:
    kind = "whole numbers" if whole else "numbers"
    is_valid = isinstance(given, list) and len(given) == 3
    if not is_valid or not all(is_number(n) and low <= n <= high and (not whole or isinstance(n, int)) for n in given):
        raise invalid_plans(place, f"must be three {kind} from {low:g} to {high:g}, not {short(given)}")
    return float(given[0]), float(given[1]), float(given[2])


def _axes(plans: Mapping[str, Any]) -> tuple[str, tuple[str, ...]]:
    """The axes of the network's grid, as codes for `Orient`, and a note."""
    reader = plans.get("image_reader_writer")
    if not isinstance(reader, str) or reader not in _AXES:
        raise invalid_plans("image_reader_writer", f"is {short(reader)}; ctflow knows {', '.join(_AXES)}")
    forward = plans.get("transpose_forward")
    if not isinstance(forward, list) or not all(type(each) is int for each in forward) or sorted(forward) != [0, 1, 2]:
        raise invalid_plans("transpose_forward", f"must be an order of the axes 0, 1 and 2, not {short(forward)}")
    axes = "".join(_AXES[reader][axis] for axis in forward)
    note = f"axes: {axes}, as {reader} reads a DICOM series; files in another orientation gave the model other axes"
    return axes, () if reader == "NibabelIOWithReorient" else (note,)


def _spline(given: Mapping[str, Any], kind: str, at: str) -> Spline:
    place = f"{at}#resampling_fn_{kind}"
    _demand(given.get(f"resampling_fn_{kind}"), _RESAMPLING, place)
    arguments = given.get(f"resampling_fn_{kind}_kwargs")
    arguments = arguments if isinstance(arguments, Mapping) else {}
    unknown = sorted(set(arguments) - {"is_seg", "order", "order_z", "force_separate_z"})
    if unknown or arguments.get("is_seg", False) is not False:
        raise invalid_plans(
            f"{place}_kwargs", f"has {short(unknown[0] if unknown else 'is_seg')}, which ctflow does not know"
        )
    orders = arguments.get("order", 3), arguments.get("order_z", 0)
    highest = 5 if kind == "data" else 1  # splines of a higher order exceed the values, which nnU-Net then clips
    if not all(type(order) is int and 0 <= order <= highest for order in orders):
        raise invalid_plans(f"{place}_kwargs", f"must have orders from 0 to {highest}, not {short(orders)}")
    apart = arguments.get("force_separate_z", False)
    if apart is not None and not isinstance(apart, bool):
        raise invalid_plans(f"{place}_kwargs", f"must have true, false or null as force_separate_z, not {short(apart)}")
    return Spline(orders[0], orders[1], apart)


def _normalization(plans: Mapping[str, Any], given: Mapping[str, Any], at: str) -> tuple[Step, ...]:
    schemes, masks = given.get("normalization_schemes"), given.get("use_mask_for_norm")
    if not isinstance(schemes, list) or len(schemes) != 1:
        raise invalid_plans(
            f"{at}#normalization_schemes", f"must have one entry, for one CT, not {short(schemes)}", "inputs"
        )
    masked = masks[0] if isinstance(masks, list) and len(masks) == 1 else None
    if not isinstance(masked, bool):
        raise invalid_plans(f"{at}#use_mask_for_norm", f"must be [true] or [false], not {short(masks)}")
    if schemes[0] == "NoNormalization":
        return ()
    if schemes[0] == "ZScoreNormalization":
        return (ZScore(masked),)
    if schemes[0] != "CTNormalization":
        raise invalid_plans(
            f"{at}#normalization_schemes",
            f"is {short(schemes[0])}; ctflow implements CTNormalization, ZScoreNormalization and NoNormalization",
        )
    place = "foreground_intensity_properties_per_channel"
    found = plans.get(place, plans.get("foreground_intensity_properties_by_modality"))
    figures = found.get("0") if isinstance(found, Mapping) else None
    keys = ("percentile_00_5", "percentile_99_5", "mean", "std")
    if not isinstance(figures, Mapping) or not all(is_number(figures.get(key)) for key in keys):
        raise invalid_plans(f"{place}#0", f"must have the numbers {', '.join(keys)}")
    lower, upper, mean, deviation = (float(figures[key]) for key in keys)
    if not lower < upper or deviation <= 0:
        raise invalid_plans(f"{place}#0", "must have ascending percentiles and a deviation above 0")
    return (ClipNormalize(lower, upper, mean, deviation),)


def _network(given: Mapping[str, Any], at: str, out_channels: int) -> NetworkSpec:
    made = given.get("architecture", _architecture_of_old_plans(given))
    if not isinstance(made, Mapping) or not isinstance(made.get("arch_kwargs"), Mapping):
        raise invalid_plans(f"{at}#architecture", "must name a network and its arguments", "network")
    imported = made.get("_kw_requires_import", [])
    if not isinstance(imported, list) or not set(map(str, imported)) <= set(CLASS_ARGUMENTS):
        raise invalid_plans(
            f"{at}#architecture#_kw_requires_import", f"is {short(imported)}, not {', '.join(CLASS_ARGUMENTS)}"
        )
    arguments = {**copy.deepcopy(dict(made["arch_kwargs"])), "input_channels": 1, "num_classes": out_channels}
    for key, value in arguments.items():
        check_size(value, f"{PLANS}: {at}#architecture#{key[:80]}")
    name = str(made.get("network_class_name"))
    check_nnunet_arguments(name, arguments)
    return NetworkSpec(name, arguments)


def _architecture_of_old_plans(given: Mapping[str, Any]) -> dict[str, Any] | None:
    """The network of plans from before nnU-Net 2.4, which held only its sizes; None if there is none."""
    kind, encoder = given.get("UNet_class_name"), given.get("n_conv_per_stage_encoder")
    base, most = given.get("UNet_base_num_features"), given.get("unet_max_num_features")
    if not isinstance(encoder, list) or type(base) is not int or type(most) is not int or len(encoder) > 32:
        return None
    home, blocks = {
        "PlainConvUNet": ("unet", "n_conv_per_stage"),
        "ResidualEncoderUNet": ("residual_unet", "n_blocks_per_stage"),
    }.get(str(kind), ("unet", "n_conv_per_stage"))
    return {
        "network_class_name": f"{_NETWORKS}.{home}.{kind}",
        "arch_kwargs": {
            "n_stages": len(encoder),
            "features_per_stage": [min(base * 2**stage, most) for stage in range(len(encoder))],
            "conv_op": "torch.nn.Conv3d",
            "kernel_sizes": given.get("conv_kernel_sizes"),
            "strides": given.get("pool_op_kernel_sizes"),
            blocks: encoder,
            "n_conv_per_stage_decoder": given.get("n_conv_per_stage_decoder"),
            "conv_bias": True,
            "norm_op": "torch.nn.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
    }
