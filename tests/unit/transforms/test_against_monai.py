"""Every transform of preprocessing, in chains, against MONAI: the image, and the way back for values and labels."""

from __future__ import annotations

import warnings
from typing import Any

import monai.transforms
import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor

from ctflow.bundle.config import Config
from ctflow.bundle.preprocessing import steps_from_config
from ctflow.core.errors import BundleInvalid, UnsupportedPixels
from ctflow.core.volume import Geometry, Volume
from ctflow.transforms.prepare import prepare_volume
from ctflow.transforms.restore import restore_labels, restore_slabs

K = {"keys": "image"}
PADS = {"SpatialPadd", "BorderPadd", "DivisiblePadd"}
INEXACT = {"Resized", "Rotate90d", "CenterSpatialCropd", "CropForegroundd", *PADS}
SIZES = st.integers(4, 30)
MODES = ("constant", "edge", "replicate", "reflect", "minimum", "symmetric")


def some(name: str, **arguments: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"_target_": st.just(name), "keys": st.just("image")}
        | {key: value if isinstance(value, st.SearchStrategy) else st.just(value) for key, value in arguments.items()}
    )


SPACINGS = st.lists(st.sampled_from([0.75, 1.0, 1.5, 2.0, 2.5, 3.0, -1, 1.37]), min_size=3, max_size=3)
AXES = st.lists(st.integers(0, 2), min_size=1, max_size=3, unique=True)
STEPS = st.one_of(
    some("Orientationd", axcodes=st.sampled_from(["RAS", "LPS", "SAR", "PIR"])),
    some("Spacingd", pixdim=SPACINGS, mode=st.sampled_from(["bilinear", "nearest"])),
    some("ScaleIntensityd", minv=st.sampled_from([-1.0, 0.0, None]), maxv=st.sampled_from([1.0, 2.0])),
    some("ScaleIntensityd", minv=None, maxv=None, factor=st.sampled_from([0.5, -0.2])),
    some("ScaleIntensityRanged", a_min=-500, a_max=500, b_min=0, b_max=1, clip=st.booleans()),
    some("NormalizeIntensityd", channel_wise=st.booleans(), nonzero=st.booleans()),
    some("ClipIntensityPercentilesd", lower=st.sampled_from([None, 2]), upper=st.sampled_from([98, 99.5])),
    some(
        "ClipIntensityPercentilesd",
        lower=st.sampled_from([0, 2]),
        upper=st.sampled_from([None, 98]),
        sharpness_factor=st.sampled_from([0.01, 1, 10.0]),
    ),
    some("ThresholdIntensityd", threshold=10.0, above=st.booleans(), cval=st.sampled_from([0.0, -7.0])),
    some("Lambdad", func=st.sampled_from(["$lambda x: x * 2 - 1", "$lambda v: (v + 1000) / 500", "$lambda x: -x"])),
    some("Resized", spatial_size=st.lists(SIZES, min_size=3, max_size=3), mode=st.sampled_from(["area", "nearest"])),
    some("Resized", spatial_size=[-1, 9, 20], mode="trilinear", align_corners=st.sampled_from([None, True, False])),
    some("Resized", spatial_size=SIZES, size_mode="longest", mode=st.sampled_from(["bilinear", "nearest-exact"])),
    some("SpatialPadd", spatial_size=SIZES, method=st.sampled_from(["symmetric", "end"]), mode=st.sampled_from(MODES)),
    some("BorderPadd", spatial_border=st.sampled_from([2, [0, 1, 3], [0, 1, 2, 3, 0, 1]]), mode=st.sampled_from(MODES)),
    some("BorderPadd", spatial_border=1, mode="constant", value=st.sampled_from([-1000, 0.5])),
    some("DivisiblePadd", k=st.sampled_from([4, [2, 8, 5], [-1, 3, 7]]), mode=st.sampled_from(["constant", "edge"])),
    some("CenterSpatialCropd", roi_size=st.sampled_from([7, [5, -1, 100], [12, 9, 4]])),
    some(
        "CropForegroundd", source_key="image", margin=st.integers(0, 4), allow_smaller=st.booleans(),
        k_divisible=st.sampled_from([1, 4, [2, 1, 3]]), mode=st.sampled_from(["constant", "edge", "minimum"]),
        select_fn=st.sampled_from(["$lambda x: x > -200", "$lambda x: x >= 0.0"]),
    ),
    some("Flipd", spatial_axis=st.none() | AXES | st.integers(-3, 2)),
    some("Rotate90d", k=st.integers(-1, 5), spatial_axes=st.permutations(range(3)).map(lambda axes: axes[:2])),
    some("Transposed", indices=st.permutations([1, 2, 3]).map(lambda order: [0, *order])),
)  # fmt: skip


def scan(seed: int) -> Volume:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(8, 20, 3))
    hu = rng.normal(-600, 250, shape) + 700 * (rng.random(shape) > 0.8)
    hu[: shape[0] // 5] = -1000
    affine = np.eye(4)
    axes = [(2, 1, 0), (1, 2, 0), (0, 2, 1)][seed % 3]
    affine[:3, :3] = np.eye(3)[:, axes] * rng.choice([0.75, 1.0, 1.5, 2.5], 3) * rng.choice([-1, 1], 3)
    affine[:3, 3] = rng.normal(0, 50, 3)
    return Volume(hu.astype(np.float32), Geometry(shape, affine))  # type: ignore[arg-type]


def compose(items: list[dict[str, Any]]) -> monai.transforms.Compose:
    made = []
    for item in items:
        arguments = {key: value for key, value in item.items() if key != "_target_"}
        for key in ("func", "select_fn"):
            if key in arguments:
                arguments[key] = eval(arguments[key][1:])  # the lambdas above
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made.append(getattr(monai.transforms, item["_target_"])(**arguments))
    return monai.transforms.Compose(made)


def image_of(volume: Volume) -> MetaTensor:
    ras = np.diag([-1.0, -1, 1, 1]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]
    array = torch.from_numpy(volume.array.transpose(2, 1, 0).copy())[None]
    return MetaTensor(array, affine=torch.from_numpy(ras))


def inverted(transform: monai.transforms.Compose, data: dict[str, Any], values: torch.Tensor, *, nearest: bool) -> Any:
    invert = monai.transforms.Invertd(
        keys="pred", transform=transform, orig_keys="image", nearest_interp=nearest, to_tensor=True
    )
    return torch.as_tensor(invert({**data, "pred": MetaTensor(values, meta=data["image"].meta)})["pred"])


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(items=st.lists(STEPS, min_size=1, max_size=4), seed=st.integers(0, 30))
def test_chains_of_transforms_and_their_way_back_are_monais(items, seed):
    volume = scan(seed)
    try:
        document = {"preprocessing": {"_target_": "Compose", "transforms": items}}
        steps = steps_from_config(Config(document, "configs/inference.json"))
        prepared = prepare_volume(volume, steps, "cpu")
    except (BundleInvalid, UnsupportedPixels) as error:
        assume(error.reason not in ("order", "scaling"))
        raise
    transform = compose(items)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = transform({"image": image_of(volume)})
        theirs = torch.as_tensor(data["image"])[0]
        ours = prepared.tensor[0, 0]
        assert ours.shape == theirs.shape
        width = max(float(theirs.max() - theirs.min()), float(theirs.abs().max()), 1e-6)
        # A voxel next to a threshold may fall on the other side.
        assert float(((ours - theirs).abs() > 1e-4 * width).float().mean()) <= 2e-3
        rng = np.random.default_rng(seed)
        labels = torch.from_numpy(rng.integers(0, 5, tuple(ours.shape)).astype(np.uint8))
        back = inverted(transform, data, labels[None].float(), nearest=True)[0]
        found = restore_labels(prepared, labels).permute(2, 1, 0)
        # Behind these MONAI's affine is off by its last bit, which decides between two voxels equally near.
        names = {item["_target_"] for item in items}
        is_chance = "Spacingd" in names and bool(names & INEXACT)
        assert is_chance or torch.equal(found, back.to(torch.uint8))
        values = torch.rand((2, *ours.shape), generator=torch.Generator().manual_seed(seed))
        back = inverted(transform, data, values, nearest=False)
        found = torch.cat([slab for _, slab in restore_slabs(prepared, values)], dim=1).permute(0, 3, 2, 1)
        torch.testing.assert_close(found, back, atol=2e-4, rtol=0)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    spacing=st.lists(st.sampled_from([0.75, 1.0, 1.5, 2.5, 1.37]), min_size=3, max_size=3) | st.just(1.25),
    mode=st.sampled_from(["bilinear", "nearest"]),
    seed=st.integers(0, 30),
)
def test_a_grid_along_the_patients_axes_is_monais(spacing, mode, seed):
    items = [
        {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
        {"_target_": "Spacingd", "keys": "image", "pixdim": spacing, "mode": mode, "diagonal": True},
    ]
    volume, transform = scan(seed), compose(items)
    document = {"preprocessing": {"_target_": "Compose", "transforms": items}}
    prepared = prepare_volume(volume, steps_from_config(Config(document, "configs/inference.json")), "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = transform({"image": image_of(volume)})
        torch.testing.assert_close(prepared.tensor[0, 0], torch.as_tensor(data["image"])[0], atol=0.2, rtol=0)
        values = torch.rand((2, *prepared.tensor.shape[2:]), generator=torch.Generator().manual_seed(seed))
        back = inverted(transform, data, values, nearest=False)
    found = torch.cat([slab for _, slab in restore_slabs(prepared, values)], dim=1).permute(0, 3, 2, 1)
    torch.testing.assert_close(found, back, atol=2e-4, rtol=0)


@pytest.mark.parametrize("spacing", [[1.5, 1.5, 1.5], [3.0, 3.0, 3.0]])
def test_labels_on_voxels_exactly_between_two_are_those_that_monai_takes(spacing):
    rng = np.random.default_rng(2)
    affine = np.diag([0.75, 0.75, 0.75, 1.0])[:, [2, 1, 0, 3]]
    volume = Volume(rng.normal(0, 100, (60, 52, 44)).astype(np.float32), Geometry((60, 52, 44), affine))
    items = [{"_target_": "Orientationd", **K, "axcodes": "RAS"}, {"_target_": "Spacingd", **K, "pixdim": spacing}]
    document = {"preprocessing": {"_target_": "Compose", "transforms": items}}
    prepared = prepare_volume(volume, steps_from_config(Config(document, "x")), "cpu")
    transform = compose(items)
    data = transform({"image": image_of(volume)})
    labels = torch.from_numpy(rng.integers(0, 105, tuple(prepared.tensor.shape[2:])).astype(np.uint8))
    back = inverted(transform, data, labels[None].float(), nearest=True)[0]
    assert torch.equal(restore_labels(prepared, labels).permute(2, 1, 0), back.to(torch.uint8))
