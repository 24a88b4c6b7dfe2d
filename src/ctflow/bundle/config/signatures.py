"""Every argument of every MONAI class that a bundle may use, and how ctflow treats it.

A test compares this table with the installed MONAI: it detects arguments that MONAI adds, removes or gives another
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

REQUIRED: Final = object()  # no default

# Element types as text: MONAI evaluates those with $, ctflow only recognizes them. "float" alone is NumPy's, of
# 64 bits.
FLOAT32 = (None, "float32", "$np.float32", "$numpy.float32", "$torch.float32", "$torch.float")
FLOAT64 = ("float64", "$np.float64", "$numpy.float64", "$torch.float64", "$torch.double")
# Types that hold 255 labels.
INTEGERS = tuple(
    sign + name for name in ("uint8", "int16", "int32", "int64") for sign in ("", "$np.", "$numpy.", "$torch.")
)
_NOTHING: Mapping[str, Any] = MappingProxyType({})
_KEYS: Mapping[str, Any] = MappingProxyType({"keys": REQUIRED, "allow_missing_keys": False})


@dataclass(frozen=True)
class Signature:
    """The arguments of a class.

    Attributes:
        module: Where MONAI defines the class.
        read: Arguments that ctflow reads, with MONAI's defaults.
        only: Arguments for which ctflow supports only these values; the first is MONAI's default.
        held: Arguments on where and how MONAI holds or saves the data; they do not change the result.
        more: Those of `only` and `held` that MONAI takes as keyword arguments without naming them.
        per_key: Arguments that may be lists with a value for each of `keys`.
    """

    module: str
    read: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]
    held: frozenset[str]
    more: frozenset[str]
    per_key: frozenset[str]

    @property
    def arguments(self) -> frozenset[str]:
        """All arguments."""
        return frozenset({*self.read, *self.only, *self.held})


def _signature(
    module: str,
    read: Mapping[str, Any] = _NOTHING,
    only: Mapping[str, tuple[Any, ...]] = _NOTHING,
    *,
    held: str = "",
    more: str = "",
    per_key: str = "",
    keys: Mapping[str, Any] = _KEYS,
) -> Signature:
    words = (frozenset(text.split()) for text in (held, more, per_key))
    return Signature(f"monai.{module}", {**keys, **read}, only, *words)


_NONE, _FALSE = (None,), (False,)
_UTILITY, _INTENSITY, _POST = (f"transforms.{name}.dictionary" for name in ("utility", "intensity", "post"))
_META, _SPATIAL, _IO = (f"transforms.{name}.dictionary" for name in ("meta_utility", "spatial", "io"))
_VISTA = "apps.vista3d.transforms"
_CROP = "transforms.croppad.dictionary"
_READERS = tuple(
    word
    for name in ("ITKReader", "NibabelReader", "PydicomReader")
    for word in (name, name.lower(), f"$monai.data.{name}")
)

COMPOSE = _signature(
    "transforms.compose",
    {"transforms": None},
    {"unpack_items": _FALSE, "lazy": (False, None), "overrides": _NONE, "map_items": (True, 1)},
    held="log_stats",
    keys=_NOTHING,
)

INFERER = _signature(
    "inferers.inferer",
    {
        "roi_size": REQUIRED,
        "sw_batch_size": 1,
        "overlap": 0.25,
        "mode": "constant",
        "sigma_scale": 0.125,
        "padding_mode": "constant",
        "cval": 0.0,
    },
    {
        "with_coord": _FALSE,
        "buffer_dim": (-1, 0, 1, 2, -2, -3),
    },
    held="sw_device device progress cache_roi_weight_map cpu_thresh buffer_steps",
    keys=_NOTHING,
)

SIMPLE_INFERER = _signature("inferers.inferer", keys=_NOTHING)
SLICE_INFERER = Signature(
    INFERER.module,
    {"spatial_dim": 0, **INFERER.read},
    INFERER.only,
    INFERER.held,
    INFERER.arguments,  # handed on to the SlidingWindowInferer
    INFERER.per_key,
)

VISTA_NETWORK = _signature("networks.nets.vista3d", {"encoder_embed_dim": 48}, {"in_channels": (1,)}, keys=_NOTHING)
# Of the bundle's own code; with class prompts it only hands the window's size and number on.
VISTA_INFERER = _signature(
    "", {"roi_size": REQUIRED, "sw_batch_size": 1}, held="overlap use_point_window", keys=_NOTHING
)

_EVALUATED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "prepare_batch": _NONE,
        "iteration_update": _NONE,
        "mode": ("eval",),
        "decollate": (True,),
        "to_kwargs": (None, {}),
    }
)
_OF_EVALUATOR = (
    "device val_data_loader epoch_length non_blocking key_val_metric additional_metrics metric_cmp_fn val_handlers"
    " amp event_names event_to_attr amp_kwargs"
)
EVALUATOR = _signature(
    "engines.evaluator",
    {"network": REQUIRED, "inferer": None, "postprocessing": None},
    _EVALUATED,
    held=f"{_OF_EVALUATOR} compile compile_kwargs",
    keys=_NOTHING,
)
ENSEMBLE_EVALUATOR = _signature(
    "engines.evaluator",
    {"networks": REQUIRED, "pred_keys": None, "inferer": None, "postprocessing": None},
    _EVALUATED,
    held=_OF_EVALUATOR,
    keys=_NOTHING,
)

_PADDED: Mapping[str, Any] = MappingProxyType({"mode": "constant", "value": None, "constant_values": None})
_VALUES = "value constant_values"  # torch's and NumPy's name

# They become steps of a model.
STEPS: Mapping[str, Signature] = {
    "Orientationd": _signature(
        _SPATIAL,
        {"axcodes": None, "as_closest_canonical": False},
        {"labels": (None, [["L", "R"], ["P", "A"], ["I", "S"]]), "lazy": _FALSE},
    ),
    "Spacingd": _signature(
        _SPATIAL,
        {"pixdim": REQUIRED, "mode": "bilinear", "diagonal": False},
        {
            "padding_mode": ("border",),
            "align_corners": (False, None),
            "dtype": (*FLOAT64, *FLOAT32),
            "scale_extent": _FALSE,
            "recompute_affine": _FALSE,  # MONAI would then lose the volume's position
            "min_pixdim": _NONE,
            "max_pixdim": _NONE,
            "lazy": _FALSE,
        },
        held="ensure_same_shape",  # for several images
        per_key="mode padding_mode align_corners dtype scale_extent",
    ),
    "ScaleIntensityRanged": _signature(
        _INTENSITY,
        {"a_min": REQUIRED, "a_max": REQUIRED, "b_min": None, "b_max": None, "clip": False},
        {"dtype": FLOAT32[1:] + FLOAT32[:1]},
    ),
    "ScaleIntensityRangePercentilesd": _signature(
        _INTENSITY,
        {"lower": REQUIRED, "upper": REQUIRED, "b_min": REQUIRED, "b_max": REQUIRED, "clip": False, "relative": False},
        {"dtype": FLOAT32[1:] + FLOAT32[:1], "channel_wise": (False, True)},  # there is one channel
    ),
    "NormalizeIntensityd": _signature(
        _INTENSITY,
        {"subtrahend": None, "divisor": None, "nonzero": False, "channel_wise": False},
        {"dtype": FLOAT32[1:] + FLOAT32[:1]},
    ),
    "CropForegroundd": _signature(
        _CROP,
        {
            "source_key": REQUIRED,
            "margin": 0,
            "start_coord_key": "foreground_start_coord",
            "end_coord_key": "foreground_end_coord",
            "allow_smaller": False,
            "k_divisible": 1,
            "select_fn": None,
            **_PADDED,
        },
        {"channel_indices": (None, 0, [0]), "lazy": _FALSE},
        more=_VALUES,
        per_key="mode",
    ),
    "ScaleIntensityd": _signature(
        _INTENSITY,
        {"minv": 0.0, "maxv": 1.0, "factor": None},
        {"dtype": FLOAT32[1:] + FLOAT32[:1], "channel_wise": (False, True)},  # there is one channel
    ),
    "ClipIntensityPercentilesd": _signature(
        _INTENSITY,
        {"lower": REQUIRED, "upper": REQUIRED, "sharpness_factor": None},
        {"dtype": FLOAT32[1:] + FLOAT32[:1], "channel_wise": (False, True)},
    ),
    "ThresholdIntensityd": _signature(_INTENSITY, {"threshold": REQUIRED, "above": True, "cval": 0.0}),
    "Lambdad": _signature(
        _UTILITY,
        {"func": REQUIRED},
        {"inv_func": (None,), "track_meta": (True,), "overwrite": (True,)},
        per_key="func inv_func overwrite",
    ),
    "Resized": _signature(
        _SPATIAL,
        {"spatial_size": REQUIRED, "size_mode": "all", "mode": "area", "align_corners": None},
        {
            "anti_aliasing": _FALSE,
            "anti_aliasing_sigma": _NONE,
            "dtype": FLOAT32[1:] + FLOAT32[:1],
            "lazy": _FALSE,
        },
        per_key="mode align_corners anti_aliasing anti_aliasing_sigma dtype",
    ),
    "SpatialPadd": _signature(
        _CROP,
        {"spatial_size": REQUIRED, "method": "symmetric", **_PADDED},
        {"lazy": _FALSE},
        more=_VALUES,
        per_key="mode",
    ),
    "BorderPadd": _signature(
        _CROP, {"spatial_border": REQUIRED, **_PADDED}, {"lazy": _FALSE}, more=_VALUES, per_key="mode"
    ),
    "DivisiblePadd": _signature(
        _CROP,
        {"k": REQUIRED, "method": "symmetric", **_PADDED},
        {"lazy": _FALSE},
        more=_VALUES,
        per_key="mode",
    ),
    "CenterSpatialCropd": _signature(_CROP, {"roi_size": REQUIRED}, {"lazy": _FALSE}),
    "Flipd": _signature(_SPATIAL, {"spatial_axis": None}, {"lazy": _FALSE}),
    "Rotate90d": _signature(_SPATIAL, {"k": 1, "spatial_axes": (0, 1)}, {"lazy": _FALSE}),
    "Transposed": _signature(_UTILITY, {"indices": REQUIRED}),
}

_TYPED = _signature(
    _UTILITY,
    {"dtype": None},
    {"data_type": ("tensor",), "track_meta": (None, True)},
    held="device wrap_sequence",
    per_key="dtype",
)
# They load, save, or only change how the data are held.
HELD: Mapping[str, Signature] = {
    "LoadImaged": _signature(
        _IO,
        {"ensure_channel_first": False, "image_only": True, "meta_keys": None, "meta_key_postfix": "meta_dict"},
        {
            "reader": (None, *_READERS),
            "dtype": FLOAT32[1:],
            "prune_meta_pattern": _NONE,
            "affine_lps_to_ras": (True,),
        },
        held="overwriting simple_keys prune_meta_sep expanduser",
        more="affine_lps_to_ras",  # for the reader
        per_key="meta_keys meta_key_postfix",
    ),
    "EnsureChannelFirstd": _signature(_UTILITY, {}, {"channel_dim": (None, "no_channel")}, held="strict_check"),
    "EnsureTyped": _TYPED,
    "CastToTyped": _signature(_UTILITY, {"dtype": "float32"}, per_key="dtype"),
    "ToTensord": _signature(_UTILITY, {"dtype": None}, {"track_meta": (None, True)}, held="device wrap_sequence"),
    "ToDeviced": _signature(_UTILITY, held="device non_blocking copy", more="non_blocking copy"),
    "DeleteItemsd": _signature(
        _UTILITY, {}, {"sep": (".",), "use_re": _FALSE}, per_key="use_re", keys={"keys": REQUIRED}
    ),
    "SelectItemsd": _signature(_UTILITY),
    "Identityd": _signature(_UTILITY),
    # It changes prompts of a user, of which there are none.
    "VistaPreTransformd": _signature(_VISTA, held="special_index labels_dict subclass"),
    "FromMetaTensord": _signature(_META, {}, {"data_type": ("tensor",)}, per_key="data_type"),
    "ToMetaTensord": _signature(_META),
    "SaveImaged": _signature(
        _IO,
        {},
        {"scale": _NONE},
        held="meta_keys meta_key_postfix output_dir output_postfix output_ext resample mode padding_mode dtype"
        " output_dtype squeeze_end_dims data_root_dir separate_folder print_log output_format writer"
        " output_name_formatter folder_layout savepath_in_metadict",
    ),
}

# They make labels from the network's logits.
POST: Mapping[str, Signature] = {
    "Activationsd": _signature(
        _POST,
        {"sigmoid": False, "softmax": False},
        {"other": _NONE, "dim": (0,)},
        more="dim",
        per_key="sigmoid softmax other",
    ),
    "Invertd": _signature(
        _POST,
        {"transform": REQUIRED, "orig_keys": None, "nearest_interp": True, "meta_keys": None},
        {"post_func": _NONE},
        held="orig_meta_keys meta_key_postfix to_tensor device",
        per_key="orig_keys nearest_interp meta_keys post_func",
    ),
    "AsDiscreted": _signature(
        _POST,
        {"argmax": False, "threshold": None},
        {"to_onehot": _NONE, "rounding": _NONE, "dim": (0,), "keepdim": (True,)},
        more="dim keepdim",
        per_key="argmax threshold to_onehot rounding",
    ),
    "KeepLargestConnectedComponentd": _signature(
        _POST,
        {"applied_labels": None, "independent": True, "connectivity": None, "num_components": 1},
        {"is_onehot": (None, False)},
    ),
    "RemoveSmallObjectsd": _signature(
        _POST,
        {"min_size": 64, "connectivity": 1, "independent_channels": True, "by_measure": False},
        held="pixdim",  # MONAI takes that of the image
    ),
    "MeanEnsembled": _signature(_POST, {"output_key": None, "weights": None}, keys={"keys": REQUIRED}),
    "VoteEnsembled": _signature(_POST, {"output_key": None, "num_classes": None}, keys={"keys": REQUIRED}),
    "VistaPostTransformd": _signature(_VISTA),
    "FillHolesd": _signature(_POST, {"applied_labels": None, "connectivity": None}),
    "LabelFilterd": _signature(_POST, {"applied_labels": REQUIRED}),
    "MapLabelValued": _signature(
        _UTILITY,
        {"orig_labels": REQUIRED, "target_labels": REQUIRED},
        {"dtype": (*FLOAT32[1:], *FLOAT32[:1], *INTEGERS)},
    ),
}
