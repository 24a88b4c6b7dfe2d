from __future__ import annotations

import pytest

from ctflow.bundle.config import Config
from ctflow.bundle.postprocessing import Postprocessing, postprocessing_from_config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.core.errors import BundleInvalid
from ctflow.core.steps import (
    CropForeground,
    KeepLargest,
    MapLabels,
    Normalize,
    Orient,
    Resample,
    ScalePercentiles,
    ScaleRange,
)
from reasons import raises_reason


def steps(*transforms, **top):
    return steps_from_config(
        Config(
            {"preprocessing": {"_target_": "Compose", "transforms": list(transforms)}, **top}, "configs/inference.json"
        )
    )


def transform(target, **arguments):
    return {"_target_": target, "keys": "image", **arguments}


SPACING = {"pixdim": [1, 2, 3], "mode": "bilinear"}
RANGE = {"a_min": -1000, "a_max": 400}
PERCENTILES = {"lower": 1, "upper": 99, "b_min": 0, "b_max": 1}


@pytest.mark.parametrize(
    ("item", "step"),
    [
        (transform("Orientationd", axcodes="LPS", labels=None), Orient("LPS")),
        (
            transform("Orientationd", axcodes=["R", "A", "S"], labels=[["L", "R"], ["P", "A"], ["I", "S"]]),
            Orient("RAS"),
        ),
        (transform("Orientationd", as_closest_canonical=True), Orient("RAS")),
        (transform("monai.transforms.Spacingd", **SPACING), Resample((1.0, 2.0, 3.0))),
        (transform("monai.transforms.spatial.dictionary.SpacingD", pixdim=1.5), Resample((1.5, 1.5, 1.5))),
        (transform("SpacingDict", pixdim=[2, -1, 0], mode=["bilinear"], recompute_affine=False), Resample((2, -1, 0))),
        (transform("ScaleIntensityRanged", **RANGE), ScaleRange(-1000, 400, None, None, clip=False)),
        (
            transform("ScaleIntensityRanged", **RANGE, b_min=0, b_max=1, clip=True, dtype="$torch.float32"),
            ScaleRange(-1000, 400, 0, 1, clip=True),
        ),
        (
            transform("ScaleIntensityRangePercentilesd", **PERCENTILES, channel_wise=True),
            ScalePercentiles(1, 99, 0, 1, clip=False, relative=False),
        ),
        (
            transform("ScaleIntensityRangePercentilesd", **PERCENTILES, relative=True, clip=True),
            ScalePercentiles(1, 99, 0, 1, clip=True, relative=True),
        ),
        (transform("NormalizeIntensityd"), Normalize(None, None, nonzero=False)),
        (
            transform("NormalizeIntensityd", subtrahend=[5], divisor=[2], nonzero=True, channel_wise=True),
            Normalize(5, 2, nonzero=True),
        ),
        (transform("CropForegroundd", source_key="image"), CropForeground(0)),
        (transform("CropForegroundd", source_key="image", margin=10, k_divisible=[1, 1, 1]), CropForeground(10)),
    ],
)
def test_a_transform_becomes_its_step(item, step):
    assert steps(item) == (step,)


def test_loaders_and_disabled_items_are_passed_over_and_order_is_kept():
    found = steps(
        transform("LoadImaged", reader="$monai.data.ITKReader"),
        transform("EnsureChannelFirstd"),
        transform("CropForegroundd", _disabled_=True),
        transform("CropForegroundd", _disabled_=" True "),
        transform("NormalizeIntensityd", _disabled_="@skip"),
        transform("CastToTyped", dtype="$np.float32"),
        transform("EnsureTyped", device="@device", dtype=["$torch.float32"]),
        "@spacing",
        transform("Orientationd", axcodes="RAS", _disabled_=False, _desc_="as the atlas"),
        skip=True,
        spacing=transform("Spacingd", pixdim="@mm"),
        mm=["@one", 2, "@list::0"],
        one=1,
        list=[4.5],
    )
    assert found == (Resample((1.0, 2.0, 4.5)), Orient("RAS"))


@pytest.mark.parametrize(
    ("item", "key", "reason"),
    [
        (transform("RandFlipd"), "_target_", "target"),
        (transform("scripts.transforms.Spacingd", **SPACING), "_target_", "target"),
        (transform("monai.transforms.os.system; x"), "_target_", "target"),
        (transform(3), "_target_", "target"),
        (transform("$open('x')"), "_target_", "expression"),
        (transform("Spacingd", **SPACING, _mode_="callable"), "_mode_", "value"),
        (transform("Spacingd", **SPACING, _disabled_="$1"), "_disabled_", "value"),
        (transform("Spacingd", **SPACING, _disabled_=3), "_disabled_", "value"),
        (transform("Spacingd"), "pixdim", "argument"),
        (transform("Spacingd", pixdim=[1, 2]), "pixdim", "value"),
        (transform("Spacingd", pixdim=1e-9), "pixdim", "value"),
        (transform("Spacingd", pixdim=float("nan")), "pixdim", "value"),
        (transform("Spacingd", pixdim="$@x"), "pixdim", "reference"),
        (transform("Spacingd", pixdim=["$one()", 1, 1]), "pixdim#0", "expression"),
        (transform("Spacingd", pixdim=1, mode="bicubic"), "mode", "value"),
        (transform("Spacingd", pixdim=1, mode=["bilinear", "bilinear"]), "mode", "value"),
        (transform("Spacingd", pixdim=1, mode=[]), "mode", "value"),
        (transform("Spacingd", pixdim=1, padding_mode="zeros"), "padding_mode", "value"),
        (transform("Spacingd", pixdim=1, align_corners=True), "align_corners", "value"),
        (transform("Spacingd", pixdim=1, diagonal="yes"), "diagonal", "value"),
        (transform("Spacingd", pixdim=1, scale_extent=True), "scale_extent", "value"),
        (transform("Spacingd", pixdim=1, max_pixdim=2), "max_pixdim", "value"),
        (transform("Spacingd", pixdim=1, lazy=True), "lazy", "value"),
        (transform("Spacingd", pixdim=1, colour="red"), "colour", "argument"),
        (transform("Orientationd", axcodes="RAR"), "axcodes", "value"),
        (transform("Orientationd", axcodes="ras"), "axcodes", "value"),
        (transform("Orientationd", axcodes=3), "axcodes", "value"),
        (transform("Orientationd"), "axcodes", "argument"),
        (transform("Orientationd", axcodes="RAS", labels=[["R", "L"], ["P", "A"], ["I", "S"]]), "labels", "value"),
        (transform("ScaleIntensityRanged", a_min=1), "a_max", "argument"),
        (transform("ScaleIntensityRanged", a_min=1, a_max=1), "a_max", "value"),
        (transform("ScaleIntensityRanged", a_min=True, a_max=1), "a_min", "value"),
        (transform("ScaleIntensityRanged", a_min=1, a_max=10**400), "a_max", "value"),
        (transform("ScaleIntensityRanged", **RANGE, clip=True), "clip", "value"),
        (transform("ScaleIntensityRanged", **RANGE, clip="yes"), "clip", "value"),
        (transform("ScaleIntensityRanged", **RANGE, dtype="float16"), "dtype", "value"),
        (transform("ScaleIntensityRangePercentilesd", **{**PERCENTILES, "lower": 99.5}), "upper", "value"),
        (transform("ScaleIntensityRangePercentilesd", lower=1, upper=2), "b_min", "argument"),
        (
            transform("ScaleIntensityRangePercentilesd", **{**PERCENTILES, "b_min": None}, relative=True),
            "relative",
            "value",
        ),
        (transform("NormalizeIntensityd", divisor=0), "divisor", "value"),
        (transform("NormalizeIntensityd", subtrahend=[1, 2]), "subtrahend", "value"),
        (transform("NormalizeIntensityd", subtrahend=[1]), "subtrahend", "value"),
        (transform("NormalizeIntensityd", divisor=2, channel_wise=True), "divisor", "value"),
        (transform("Spacingd", pixdim=1, recompute_affine=True), "recompute_affine", "value"),
        (transform("Spacingd", pixdim=1, dtype="float16"), "dtype", "value"),
        (transform("ScaleIntensityRanged", **RANGE, dtype="float"), "dtype", "value"),
        (
            transform("CropForegroundd", source_key="image", select_fn="$lambda x: x.mean() > -500"),
            "select_fn",
            "expression",
        ),
        (transform("CropForegroundd", source_key="image", margin=[1, 2, 3]), "margin", "value"),
        (transform("CropForegroundd", source_key="image", margin=-1), "margin", "value"),
        (transform("CropForegroundd", source_key="image", k_divisible=[32, 32]), "k_divisible", "value"),
        (transform("CropForegroundd", source_key="image", allow_smaller=1), "allow_smaller", "value"),
        (transform("CropForegroundd", source_key="image", channel_indices=1), "channel_indices", "value"),
        (transform("CropForegroundd", source_key="image", mode="linear_ramp"), "mode", "value"),
        (transform("CastToTyped", dtype="float16"), "dtype", "value"),
        (transform("SpatialPadd", spatial_size=[1, 2]), "spatial_size", "value"),
        (transform("BorderPadd", spatial_border=-1), "spatial_border", "value"),
        (transform("DivisiblePadd", k=4, method="left"), "method", "value"),
        (transform("SpatialPadd", spatial_size=9, mode="edge", value=3), "value", "argument"),
        (transform("Resized", spatial_size=9), "spatial_size", "value"),
        (transform("Resized", spatial_size=[9, 9, 9], mode="bicubic"), "mode", "value"),
        (transform("Resized", spatial_size=[9, 9, 9], align_corners=True), "align_corners", "value"),
        (transform("Resized", spatial_size=9, size_mode="shortest"), "size_mode", "value"),
        (transform("Rotate90d", spatial_axes=[0, 0]), "spatial_axes", "value"),
        (transform("Flipd", spatial_axis=3), "spatial_axis", "value"),
        (transform("Transposed", indices=[1, 0, 2, 3]), "indices", "value"),
        (transform("Lambdad", func="$lambda x: x.sqrt()"), "func", "expression"),
        (transform("Lambdad", func="$torch.sqrt"), "func", "expression"),
        (transform("Lambdad", func="$lambda x: x * x"), "func", "expression"),
        (transform("ClipIntensityPercentilesd", lower=None, upper=None), "upper", "value"),
        (transform("ClipIntensityPercentilesd", lower=1, upper=9, sharpness_factor=0), "sharpness_factor", "value"),
        (transform("EnsureTyped", dtype="$torch.float16"), "dtype", "value"),
    ],
)
def test_what_ctflow_does_not_do_is_refused_by_its_full_key(item, key, reason):
    with raises_reason(BundleInvalid, reason, names=f"configs/inference.json: preprocessing#transforms#1#{key} "):
        steps(transform("LoadImaged", ensure_channel_first=True), item)


@pytest.mark.parametrize(
    ("value", "said", "reason"),
    [
        ("$[1]", "preprocessing ", "target"),
        ("@nowhere", "'@nowhere'", "reference"),
        ("@preprocessing", "preprocessing ", "reference"),
        (None, "preprocessing ", "target"),
        ({"transforms": []}, "preprocessing#_target_ ", "argument"),
        ({"_target_": "Sequential", "transforms": []}, "preprocessing#_target_ is Sequential", "target"),
        ({"_target_": "Compose"}, "preprocessing#transforms ", "argument"),
        ({"_target_": "Compose", "transforms": "$@a + @b"}, "preprocessing#transforms ", "reference"),
        ({"_target_": "Compose", "transforms": {}}, "preprocessing#transforms ", "value"),
        ({"_target_": "Compose", "transforms": [None] * 300}, "200", "value"),
        ({"_target_": "Compose", "transforms": [], "lazy": True}, "preprocessing#lazy", "value"),
        ({"_target_": "Compose", "transforms": [], "extra": 1}, "preprocessing#extra", "argument"),
        ({"_target_": "Compose", "transforms": ["%x.json"]}, "preprocessing#transforms#0 ", "expression"),
    ],
)
def test_a_list_that_cannot_be_known_is_refused(value, said, reason):
    with raises_reason(BundleInvalid, reason, names=said):
        steps_from_config(Config({"preprocessing": value}, "configs/inference.json"))


def answer(target, **arguments):
    return transform(target, **{"keys": "pred", **arguments})


def after(*transforms):
    document = {
        "preprocessing": {"_target_": "Compose"},
        "postprocessing": {"_target_": "Compose", "transforms": list(transforms)},
    }
    return postprocessing_from_config(Config(document, "configs/inference.json"))


INVERT = answer(
    "Invertd", transform="@preprocessing", orig_keys="image", meta_keys="y", device="$d", nearest_interp=False
)
SOFTMAX, SIGMOID = answer("Activationsd", softmax=True), answer("Activationsd", sigmoid=True)
ARGMAX, HALF = answer("AsDiscreted", argmax=True), answer("AsDiscreted", threshold=0.5)


def test_softmax_with_argmax_and_sigmoid_with_threshold():
    save = answer("SaveImaged", output_dir="$x", resample=False)
    assert after(SOFTMAX, INVERT, ARGMAX, save) == Postprocessing("softmax")
    assert after(answer("EnsureTyped"), SIGMOID, INVERT, HALF) == Postprocessing("sigmoid", 0.5)
    assert after(answer("Activationsd", softmax=[True], other=None), INVERT, ARGMAX) == Postprocessing("softmax")


NEAREST = {**INVERT, "nearest_interp": True}
KEEP = answer("KeepLargestConnectedComponentd", applied_labels=[1, 2])
MAP = answer("MapLabelValued", orig_labels=[1, 2], target_labels=[7, 0])
MAP_ALL = answer("MapLabelValued", orig_labels=[0, 1, 2], target_labels=[0, 7, 0])
KEPT, MAPPED = KeepLargest((1, 2), independent=True, connectivity=3, count=1), MapLabels(((1, 7), (2, 0)))


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ((SOFTMAX, ARGMAX, NEAREST), Postprocessing("softmax", None, "labels")),
        ((SOFTMAX, NEAREST, ARGMAX), Postprocessing("softmax", None, "labels")),
        ((INVERT, SOFTMAX, ARGMAX), Postprocessing("softmax", None, "logits")),
        ((INVERT, ARGMAX), Postprocessing("none", None, "logits")),
        ((ARGMAX, NEAREST), Postprocessing("none", None, "labels")),
        ((SOFTMAX, ARGMAX, KEEP, NEAREST, MAP), Postprocessing("softmax", None, "labels", [KEPT], [MAPPED])),
        ((SOFTMAX, INVERT, ARGMAX, MAP_ALL), Postprocessing("softmax", None, "probabilities", [], [MAPPED])),
        ((SOFTMAX, INVERT, ARGMAX, KEEP, MAP), Postprocessing("softmax", None, "probabilities", [], [KEPT, MAPPED])),
    ],
)
def test_orders_that_bundles_use(order, expected):
    assert after(*order) == expected


@pytest.mark.parametrize(
    "order",
    [(), (SOFTMAX, ARGMAX), (SOFTMAX, INVERT), (SOFTMAX, KEEP, INVERT, ARGMAX), (SOFTMAX, SOFTMAX, INVERT, ARGMAX),
     (SOFTMAX, INVERT, INVERT, ARGMAX), (SOFTMAX, INVERT, ARGMAX, ARGMAX), (NEAREST, SIGMOID, HALF)],
)  # fmt: skip
def test_an_order_without_a_meaning_is_refused(order):
    with raises_reason(BundleInvalid, "order", names="postprocessing"):
        after(*order)


@pytest.mark.parametrize(
    ("transforms", "key", "reason"),
    [
        ((answer("Activationsd"), INVERT, ARGMAX), "0#softmax", "value"),
        ((answer("Activationsd", softmax=True, sigmoid=True), INVERT, ARGMAX), "0#softmax", "value"),
        ((answer("Activationsd", softmax=True, other="$f"), INVERT, ARGMAX), "0#other", "expression"),
        ((answer("Activationsd", softmax=True, dim=1), INVERT, ARGMAX), "0#dim", "value"),
        ((SOFTMAX, ARGMAX, INVERT), "2#nearest_interp", "value"),
        ((SOFTMAX, ARGMAX, answer("RemoveSmallObjectsd", by_measure="mm"), NEAREST), "2#by_measure", "value"),
        ((SOFTMAX, ARGMAX, answer("LabelFilterd", applied_labels=[300]), NEAREST), "2#applied_labels", "value"),
        (
            (SOFTMAX, ARGMAX, NEAREST, answer("MapLabelValued", orig_labels=[0], target_labels=[1])),
            "3#orig_labels",
            "value",
        ),
        ((SOFTMAX, answer("MeanEnsembled", output_key="pred"), INVERT, ARGMAX), "1#keys", "keys"),
        ((SOFTMAX, {**INVERT, "nearest_interp": "$x"}, ARGMAX), "1#nearest_interp", "expression"),
        ((SOFTMAX, {**INVERT, "post_func": "$f"}, ARGMAX), "1#post_func", "expression"),
        ((SOFTMAX, INVERT, HALF), "2#argmax", "value"),
        ((SIGMOID, INVERT, ARGMAX), "2#argmax", "value"),
        ((SIGMOID, INVERT, answer("AsDiscreted", threshold=1.5)), "2#threshold", "value"),
        ((SIGMOID, INVERT, answer("AsDiscreted", threshold=True)), "2#threshold", "value"),
        ((SOFTMAX, INVERT, answer("AsDiscreted", argmax=True, to_onehot=2)), "2#to_onehot", "value"),
        ((SOFTMAX, INVERT, answer("AsDiscreted", argmax=True, rounding="torchrounding")), "2#rounding", "value"),
    ],
)
def test_postprocessing_that_ctflow_does_not_do_is_refused_by_key(transforms, key, reason):
    with raises_reason(BundleInvalid, reason, names=f"postprocessing#transforms#{key} "):
        after(*transforms)
