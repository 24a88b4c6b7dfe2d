"""Every step, and the way back, against MONAI's own transforms."""

from __future__ import annotations

import itertools

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.data.utils import compute_shape_offset, zoom_affine
from monai.transforms import (
    Activationsd,
    AsDiscreted,
    Compose,
    CropForegroundd,
    Invertd,
    NormalizeIntensityd,
    Orientationd,
    ScaleIntensityRanged,
    ScaleIntensityRangePercentilesd,
    Spacingd,
)

from ctflow.core.errors import UnsupportedPixels
from ctflow.core.steps import CropForeground, Normalize, Orient, Resample, ScalePercentiles, ScaleRange
from ctflow.core.volume import Geometry, Volume
from ctflow.transforms import resample
from ctflow.transforms.orient import orientation_from_affine
from ctflow.transforms.prepare import prepare_volume
from ctflow.transforms.resample import linear_weights
from ctflow.transforms.restore import restore_slabs, source_boxes
from ctflow.transforms.tilt import untilted_grid
from dicom_support import LinearField, indices_of, rotation
from reasons import raises_reason


def volume_of(shape=(9, 11, 7), spacing=(2.5, 0.6, 0.9), turn=None, order=(2, 1, 0), dtype=np.int16) -> Volume:
    """A smooth random volume; `order` says along which world axis each array axis runs."""
    rng = np.random.default_rng(1)
    values = rng.integers(-1024, 1200, shape).astype(dtype)
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, target in enumerate(order):
        affine[target, axis] = spacing[axis]
    if turn is not None:
        affine[:3, :3] = turn @ affine[:3, :3]
    affine[:3, 3] = [-31.0, 12.5, 200.25]
    return Volume(values, Geometry(shape, affine))


def monai_image(volume: Volume) -> MetaTensor:
    """What MONAI's readers give: axes (W, H, D), RAS affine."""
    affine = np.diag([-1.0, -1, 1, 1]) @ volume.geometry.affine_mm[:, [2, 1, 0, 3]]
    return MetaTensor(torch.from_numpy(volume.array.astype(np.float32)).permute(2, 1, 0)[None].contiguous(), affine)


def monai_transform(step):
    if isinstance(step, Orient):
        return Orientationd("image", axcodes=step.axcodes, labels=None)
    if isinstance(step, Resample):
        return Spacingd("image", pixdim=step.spacing_mm, mode="bilinear")
    if isinstance(step, ScaleRange):
        return ScaleIntensityRanged("image", step.a_min, step.a_max, step.b_min, step.b_max, step.clip)
    if isinstance(step, ScalePercentiles):
        return ScaleIntensityRangePercentilesd(
            "image", step.lower, step.upper, step.b_min, step.b_max, step.clip, step.relative
        )
    if isinstance(step, Normalize):
        return NormalizeIntensityd("image", step.subtrahend, step.divisor, step.nonzero)
    return CropForegroundd("image", source_key="image", margin=step.margin)


def assert_same_as_monai(volume: Volume, steps, tolerance=2e-4):
    """Forward and back: the same values on the same grids."""
    prepared = prepare_volume(volume, steps, "cpu")
    transforms = Compose([monai_transform(step) for step in steps])
    data = transforms({"image": monai_image(volume)})
    theirs = data["image"]
    assert tuple(prepared.tensor.shape[1:]) == tuple(theirs.shape)
    scale = max(float(theirs.abs().max()), 1.0)
    assert float((prepared.tensor[0] - theirs.as_tensor()).abs().max()) <= tolerance * scale
    probabilities = torch.from_numpy(np.random.default_rng(2).random((2, *theirs.shape[1:]), dtype=np.float32))
    back = probabilities
    if any(isinstance(step, (Orient, Resample, CropForeground)) for step in steps):  # else MONAI has nothing to invert
        data["pred"] = MetaTensor(probabilities, meta=theirs.meta, applied_operations=theirs.applied_operations)
        invert = Invertd("pred", transform=transforms, orig_keys="image", nearest_interp=False, to_tensor=True)
        back = invert(data)["pred"].as_tensor()
    ours = torch.cat([slab for _, slab in restore_slabs(prepared, probabilities)], dim=1)
    assert tuple(ours.shape) == (2, *volume.array.shape)
    assert float((ours - back.permute(0, 3, 2, 1)).abs().max()) <= 1e-4


SCALE = ScaleRange(-1000, 400, 0.0, 1.0, True)
STEPS = {
    "as it is": (),
    "orient": (Orient("RAS"),),
    "orient otherwise": (Orient("PIR"),),
    "down": (Orient("RAS"), Resample((1.5, 1.5, 3.1)), SCALE),
    "up": (Orient("LPS"), Resample((0.4, 0.5, 1.0)), SCALE),
    "spacing first": (Resample((1.5, 1.0, 2.0)), Orient("SRA"), SCALE),
    "scale first": (SCALE, Orient("RAS"), Resample((1.0, 1.0, 1.0))),
    "twice": (Orient("RAS"), Resample((2.0, 2.0, 2.0)), Resample((1.1, 3.0, 0.9)), SCALE),
    "keep an axis": (Orient("RAS"), Resample((1.2, -1.0, 1.2)), SCALE),
    "nearly the same": (Orient("RAS"), Resample((0.9005, 0.5995, 2.5)), SCALE),
    "unclipped": (ScaleRange(-200, 300, -1.0, 1.0, False),),
    "no target": (ScaleRange(-200, 300, None, None, False),),
    "percentiles": (ScalePercentiles(5, 95, 0.0, 1.0, True, False),),
    "relative percentiles": (ScalePercentiles(10, 80, -1.0, 2.0, False, True),),
    "normalize": (Normalize(None, None, False),),
    "normalize nonzero": (SCALE, Normalize(None, None, True)),
    "normalize by number": (Normalize(50.0, 200.0, False),),
    "normalize all": (Orient("RAS"), Resample((1.5, 1.5, 1.5)), Normalize(None, None, False)),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_every_step_and_its_way_back_equal_monai(steps, dtype):
    assert_same_as_monai(volume_of(dtype=dtype), steps)


@pytest.mark.parametrize("margin", [0, 2, 5])
def test_the_foreground_crop_and_its_way_back_equal_monai(margin):
    volume = volume_of(shape=(14, 13, 12))
    array = np.full_like(volume.array, -1024)
    array[4:10, 5:9, 3:7] = volume.array[4:10, 5:9, 3:7] // 4 + 300
    steps = (Orient("RAS"), SCALE, CropForeground(margin), Resample((1.0, 1.0, 2.0)))
    assert_same_as_monai(Volume(array, volume.geometry), steps)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_orientation_equals_monai(order, signs):
    volume = volume_of(order=order, spacing=(2.5 * signs[0], 0.6 * signs[1], 0.9 * signs[2]))
    assert_same_as_monai(volume, (Orient("RAS"), Resample((1.2, 1.2, 1.2)), SCALE))


BETWEEN = [(1.5, 3.4), (2.5, 2.0), (5.0, 2.0), (1.25, 1.0), (0.7, 1.4), (3.0, 1.2), (0.9, 1.2), (1.7, 3.4)]


@pytest.mark.parametrize(("spacing", "wanted"), BETWEEN)
@pytest.mark.parametrize("turn", [None, rotation((0.3, -0.2, 0.1))])
def test_a_size_between_two_numbers_of_voxels_is_the_one_that_monai_takes(spacing, wanted, turn):
    for count in range(2, 60):
        volume = volume_of(shape=(count, 2, 2), spacing=(spacing, 0.6, 0.9), turn=turn)
        affine = monai_image(volume).affine.numpy()
        zoomed = zoom_affine(affine, [-1, -1, wanted], diagonal=False)
        expected, _ = compute_shape_offset((2, 2, count), affine, zoomed)
        prepared = prepare_volume(volume, (Resample((-1, -1, wanted)),), "cpu")
        assert tuple(prepared.tensor.shape[2:]) == tuple(expected), count


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(*[st.integers(2, 20)] * 3),
    spacing=st.tuples(*[st.floats(0.4, 5.0)] * 3),
    angles=st.tuples(*[st.floats(-0.7, 0.7)] * 3),
    wanted=st.tuples(*[st.floats(0.5, 4.0)] * 3),
)
def test_oblique_grids_equal_monai(shape, spacing, angles, wanted):
    volume = volume_of(shape=shape, spacing=spacing, turn=rotation(angles))
    assert_same_as_monai(volume, (Orient("RAS"), Resample(wanted), SCALE))


@settings(max_examples=100, deadline=None)
@given(angles=st.tuples(*[st.floats(-3.1, 3.1)] * 3), spacing=st.tuples(*[st.floats(0.3, 6.0)] * 3))
def test_orientation_equals_nibabel(angles, spacing):
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * spacing
    expected = nibabel.io_orientation(affine)
    assert orientation_from_affine(affine) == [(int(axis), int(sign)) for axis, sign in expected]


def test_interpolation_weights_sum_to_one_and_stop_at_the_border():
    weights = linear_weights([-3.0, 0.0, 0.25, 3.999, 4.0, 9.0], 5)
    assert np.allclose(weights.sum(axis=1), 1)
    assert weights[0].tolist() == weights[1].tolist() == [1, 0, 0, 0, 0]
    assert weights[2].tolist() == [0.75, 0.25, 0, 0, 0]
    assert weights[-1].tolist() == [0, 0, 0, 0, 1]
    assert linear_weights([0, 1], 1).tolist() == [[1], [1]]


@pytest.mark.parametrize("depth", [1, 7, 8, 9, 16, 17])
def test_slabs_cover_the_source_once(depth):
    volume = volume_of(shape=(depth, 5, 6))
    prepared = prepare_volume(volume, (Orient("RAS"),), "cpu")
    rows = [list(range(depth))[place] for place, _ in restore_slabs(prepared, prepared.tensor[0])]
    assert list(itertools.chain(*rows)) == list(range(depth))
    back = torch.cat([slab for _, slab in restore_slabs(prepared, prepared.tensor[0])], dim=1)
    assert np.array_equal(back[0].numpy(), volume.array.astype(np.float32))


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_the_size_of_a_slab_changes_no_value(monkeypatch, at_once):
    volume, steps = volume_of(shape=(9, 12, 10)), (Orient("RAS"), Resample((1.5, 0.5, 1.1)), SCALE)
    expected = prepare_volume(volume, steps, "cpu")
    back = torch.cat([slab for _, slab in restore_slabs(expected, expected.tensor[0])], dim=1)
    monkeypatch.setattr(resample, "_SLAB", at_once)
    prepared = prepare_volume(volume, steps, "cpu")
    assert torch.allclose(prepared.tensor, expected.tensor, atol=1e-6)
    found = torch.cat([slab for _, slab in restore_slabs(prepared, expected.tensor[0])], dim=1)
    assert torch.allclose(found, back, atol=1e-6)


def test_a_gpus_slabs_stay_within_their_memory():
    for channels, shape, wanted in [(14, (512, 512, 300), (700, 512, 512)), (1, (700, 512, 512), (100, 340, 340))]:
        rows = resample._rows_at_once(channels, shape, wanted)
        assert rows >= 1
        assert rows * channels * wanted[1] * wanted[2] * 4 <= 2**28
        assert rows * channels * shape[0] / wanted[0] * shape[1] * shape[2] * 4 <= 2**28


def test_an_axis_that_keeps_its_voxels_needs_no_product(monkeypatch):
    """Also one that is only turned round: the values stay exactly as they are."""

    def refuse(*_):
        raise AssertionError("a product")

    monkeypatch.setattr(torch, "einsum", refuse)
    monkeypatch.setattr(torch, "matmul", refuse)
    volume = volume_of()
    prepared = prepare_volume(volume, (Orient("RAS"), Resample((0.9, 0.6, 2.5)), Orient("PIR")), "cpu")
    back = torch.cat([slab for _, slab in restore_slabs(prepared, prepared.tensor[0])], dim=1)
    assert np.array_equal(back[0].numpy(), volume.array.astype(np.float32))


def test_nothing_in_the_foreground_is_a_named_error():
    volume = volume_of()
    empty = Volume(np.full_like(volume.array, -1024), volume.geometry)
    with raises_reason(UnsupportedPixels, "scaling", names="CropForegroundd"):
        prepare_volume(empty, (SCALE, CropForeground(0)), "cpu")


def test_values_that_are_not_finite_are_a_named_error():
    volume = volume_of(dtype=np.float32)
    volume.array[0, 0, 0] = np.inf
    with raises_reason(UnsupportedPixels, "scaling"):
        prepare_volume(volume, (Normalize(0.0, 1.0, False),), "cpu")


def test_a_flat_image_does_not_divide_by_zero():
    volume = volume_of()
    flat = Volume(np.full_like(volume.array, 7), volume.geometry)
    assert float(prepare_volume(flat, (ScalePercentiles(1, 99, 2.0, 3.0, False, False),), "cpu").tensor.mean()) == 2.0
    assert float(prepare_volume(flat, (Normalize(None, None, False),), "cpu").tensor.abs().max()) == 0.0
    zeros = Volume(np.zeros_like(volume.array), volume.geometry)
    assert float(prepare_volume(zeros, (Normalize(None, None, True),), "cpu").tensor.abs().max()) == 0.0


@pytest.mark.parametrize("is_cropped", [False, True])
def test_activation_then_way_back_then_argmax_equals_monai(is_cropped):
    """The two-class shortcut: one channel goes back, not two; both do where a crop leaves less than 1 of the two."""
    from ctflow.core.model import ModelSpec, NetworkSpec  # noqa: PLC0415
    from ctflow.transforms.postprocess import labels_from_probabilities, probabilities_from_logits  # noqa: PLC0415

    volume = volume_of(shape=(12, 14, 13))
    steps = (Orient("RAS"), Resample((1.5, 1.5, 1.5)), SCALE)
    if is_cropped:
        volume.array[[0, 1, 2, -1]] = -1024
        volume.array[:, :3] = -1024
        steps = (SCALE, CropForeground(0), *steps[:2])
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", {}), 1, 2, steps, (8, 8, 8), 0.25, "constant", 1, "softmax", None, (), "", False
    )
    prepared = prepare_volume(volume, steps, "cpu")
    logits = torch.from_numpy(np.random.default_rng(3).standard_normal((1, 2, *prepared.tensor.shape[2:]), np.float32))
    slabs = restore_slabs(prepared, probabilities_from_logits(logits, spec))
    ours = np.concatenate([labels_from_probabilities(slab, spec).numpy() for _, slab in slabs])
    transforms = Compose([monai_transform(step) for step in steps])
    data = transforms({"image": monai_image(volume)})
    image = data["image"]
    data["pred"] = MetaTensor(logits[0], meta=image.meta, applied_operations=image.applied_operations)
    invert = Invertd("pred", transform=transforms, orig_keys="image", nearest_interp=False, to_tensor=True)
    chain = Compose([Activationsd("pred", softmax=True), invert, AsDiscreted("pred", argmax=True)])
    theirs = chain(data)["pred"].as_tensor()[0].permute(2, 1, 0).numpy()
    assert (ours != theirs).mean() < 1e-3  # ties of resampled probabilities at exactly one half
    assert ours.any()


def test_an_implausible_spacing_is_refused_before_memory_runs_out():
    with raises_reason(UnsupportedPixels, "implausible-spacing", names="PixelSpacing"):
        prepare_volume(volume_of(spacing=(2.5, 5000.0, 5000.0)), (Orient("RAS"), Resample((0.5, 0.5, 0.5))), "cpu")


def tilted_volume(by_mm: tuple[float, float], turn=None) -> Volume:
    """A linear field on slices that are each displaced by so much more in their plane (down, across)."""
    affine = volume_of(turn=turn).geometry.affine_mm.copy()
    unit = affine[:3, 1:3] / np.linalg.norm(affine[:3, 1:3], axis=0)
    affine[:3, 0] += unit @ by_mm
    geometry = Geometry((9, 11, 7), affine)
    field = LinearField().at(geometry.world_from_index(indices_of(geometry.shape)))
    return Volume(field.astype(np.float32), geometry)


@pytest.mark.parametrize("by_mm", [(0.8, 0.0), (-0.8, 0.0), (0.3, -0.5)])
@pytest.mark.parametrize("turn", [None, rotation((0.2, -0.4, 0.7))])
def test_the_tilt_of_a_volume_is_removed_where_it_lies(by_mm, turn):
    volume = tilted_volume(by_mm, turn)
    untilted = untilted_grid(volume.geometry)
    assert untilted.geometry.is_orthogonal
    prepared = prepare_volume(volume, [], "cpu")
    found = prepared.tensor[0, 0].permute(2, 1, 0).numpy()
    assert found.shape == untilted.geometry.shape
    points = untilted.geometry.world_from_index(indices_of(found.shape))
    inverse = np.linalg.inv(volume.geometry.affine_mm)
    index = points @ inverse[:3, :3].T + inverse[:3, 3]
    inside = ((index > -1e-6) & (index < np.array([9, 11, 7]) - 1 + 1e-6)).all(axis=-1)
    assert inside.sum() > 9 * 9 * 5
    assert np.abs(found - LinearField().at(points))[inside].max() < 1e-3
    corners = list(itertools.product((0, 8), (0, 10), (0, 6)))
    inverse = np.linalg.inv(untilted.geometry.affine_mm)
    reached = volume.geometry.world_from_index(corners) @ inverse[:3, :3].T + inverse[:3, 3]
    assert (reached > -1e-6).all()
    assert (reached < np.array(found.shape) - 1 + 1e-6).all(), "no slice is cut"


@pytest.mark.parametrize("by_mm", [(0.8, 0.0), (0.3, -0.5)])
def test_the_way_back_leads_to_the_tilted_slices(by_mm):
    """A field stays what it is, also through the model's axes and spacing, but for its borders."""
    volume = tilted_volume(by_mm)
    prepared = prepare_volume(volume, [Orient("RAS"), Resample((0.7, 0.5, 1.5))], "cpu")
    back = torch.cat([slab for _, slab in restore_slabs(prepared, prepared.tensor[0])], dim=1)[0].numpy()
    assert back.shape == volume.array.shape
    assert np.abs(back - volume.array)[2:-2, 3:-3, 2:-2].max() < 0.05


def test_what_is_not_tilted_stays_on_its_own_grid():
    assert untilted_grid(volume_of(turn=rotation((0.2, -0.4, 0.7))).geometry) is None
    assert prepare_volume(volume_of(), [], "cpu").untilted is None


@pytest.mark.parametrize(
    "steps",
    [
        (),
        (Orient("PIR"),),
        (Orient("RAS"), Resample((1.5, 1.5, 1.5))),
        (Resample((0.4, 0.5, 1.0)), Orient("LPS")),
        (ScaleRange(-1000, 1000, 0, 1, True), CropForeground(2), Resample((1.0, 1.0, 3.0))),
    ],
)
@pytest.mark.parametrize("by_mm", [(0.0, 0.0), (0.8, 0.0), (-0.5, 0.4)])
def test_no_source_voxel_outside_its_box_takes_from_a_box_of_the_networks_grid(steps, by_mm):
    """Also the other way round, except for tilted slices: the border voxels of the box do take from it."""
    prepared = prepare_volume(tilted_volume(by_mm), steps, "cpu")
    grid, rng = prepared.tensor.shape[2:], np.random.default_rng(0)
    for _ in range(40):
        size = tuple(int(n) for n in rng.integers(1, 6, 3))
        start = tuple(int(rng.integers(1 - length, n)) for length, n in zip(size, grid, strict=True))
        probabilities = torch.zeros(1, *grid)
        inside = (slice(max(n, 0), n + length) for n, length in zip(start, size, strict=True))
        probabilities[(slice(None), *inside)] = 1
        taken = torch.cat([slab[0] for _, slab in restore_slabs(prepared, probabilities)]).numpy() > 0
        box = source_boxes(prepared, size)(start)
        assert taken.sum() == taken[box].sum()
        if by_mm == (0.0, 0.0):
            assert taken.any() == all(part.stop > part.start for part in box)
            assert taken[box].all()


@pytest.mark.parametrize("by_mm", [(0.0, 0.0), (0.8, 0.0)])
def test_the_uploaded_volume_is_shown_before_any_step(by_mm):
    volume, seen = tilted_volume(by_mm), []
    prepare_volume(volume, (SCALE,), "cpu", lambda source: seen.append(source.numpy().copy()))
    assert np.array_equal(seen[0], volume.array)
