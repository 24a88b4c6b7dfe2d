"""The body is found, lungs and arms with it; thin things beside it are not."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage

from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.phantom import phantom_from_seed
from ctflow.window.find_body import find_body, mask_of_body

SPACING = (2.5, 1.5, 1.5)
SHAPE = (40, 240, 280)
AIR, WATER, LUNG = -1000, 20, -870


def ellipse(centre, axes):
    """(H, W) bool; both in voxels (row, column)."""
    rows, columns = np.mgrid[: SHAPE[1], : SHAPE[2]]
    return ((rows - centre[0]) / axes[0]) ** 2 + ((columns - centre[1]) / axes[1]) ** 2 <= 1


def chest(centre=(120, 140)):
    """HU and the body's voxels: a trunk with two lungs, and two arms beside it that do not touch it."""
    row, column = centre
    trunk, left, right = (
        ellipse((row, column + by), axes) for by, axes in ((0, (70, 95)), (40, (50, 28)), (-40, (50, 28)))
    )
    arms = ellipse((row, column - 118), (18, 14)) | ellipse((row, column + 118), (18, 14))
    body = np.broadcast_to(trunk | arms, SHAPE)
    hu = np.where(body, WATER, AIR)
    hu[:, left | right] = LUNG
    noise = np.random.default_rng(0).normal(0, 30, SHAPE)
    return (hu + noise).astype(np.int16), body


def mask_of(hu, spacing=SPACING):
    body = find_body(torch.from_numpy(hu), spacing)
    assert body.shape == hu.shape
    mask = mask_of_body(body, torch.device("cpu"))
    return torch.cat([mask.mask_of_slices(slice(d, d + 1)) for d in range(len(hu))]).numpy()


def test_trunk_lungs_and_arms_are_the_body_and_the_corners_are_not():
    hu, body = chest()
    mask = mask_of(hu)
    assert mask[body].all()
    assert not mask[:, :15, :30].any()
    assert mask.mean() < 0.75


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_what_is_thin_is_left_out_even_where_it_touches(kind):
    """A table's shell of 4.5 mm on which the trunk lies, a hose and a sheet."""
    hu, body = chest()
    before = mask_of(hu)
    hu[:, 190:193] = 300
    hu[:, 190:230, 5:8] = hu[:, 190:230, -8:-5] = 300
    hu[:, 20:23, 20:24] = 0
    hu[:, 60] = np.maximum(hu[:, 60], -200)
    mask = mask_of(hu.astype(kind))
    assert mask[body].all()
    assert not mask[:, 215:].any()
    assert not mask[:, :30, :40].any()
    assert mask.sum() < 1.1 * before.sum()


@pytest.mark.parametrize(
    "cut", [np.s_[:, 60:], np.s_[:, :, 100:], np.s_[:, :, :170], np.s_[:, :110], np.s_[:, 130:, 110:]]
)
def test_a_lung_that_the_field_of_view_cuts_is_kept(cut):
    hu, body = chest()
    mask = mask_of(np.ascontiguousarray(hu[cut]))
    assert mask[body[cut]].all()


@pytest.mark.parametrize("spacing", [(5.0, 0.7, 0.7), (0.5, 0.5, 0.5), (10.0, 2.0, 2.0), (1.0, 3.0, 3.0)])
def test_any_spacing_will_do(spacing):
    hu, body = chest()
    scale = [now / new for now, new in zip(SPACING, spacing, strict=True)]
    size = [round(n * by) for n, by in zip((12, *SHAPE[1:]), scale, strict=True)]
    index = np.ix_(
        *(np.minimum((np.arange(n) / by).astype(int), top - 1) for n, by, top in zip(size, scale, SHAPE, strict=True))
    )
    assert mask_of(hu[index], spacing)[body[index]].all()


@pytest.mark.parametrize("shape", [(1, 60, 60), (16, 20, 24), (3, 7, 200), (1, 1, 1)])
def test_a_volume_all_of_body_is_all_body(shape):
    assert mask_of(np.zeros(shape, np.int16)).all()


@pytest.mark.parametrize("seed", [0, 3])
def test_a_phantoms_body_is_kept_whole(seed):
    phantom = phantom_from_seed(seed, (32, 112, 112))
    volume = phantom.volume
    mask = mask_of(volume.array, volume.geometry.spacing_mm)
    assert mask[phantom.labels > 0].all()
    # The table touches nothing of the body that is thick: opened, the largest part is the trunk.
    numbers, _ = ndimage.label(ndimage.binary_opening(volume.array > -400, iterations=3))
    trunk = numbers == np.bincount(numbers.ravel())[1:].argmax() + 1
    whole = np.stack([ndimage.binary_fill_holes(each) for each in trunk])
    assert (volume.array[whole] < -700).any(), "lungs are in it"
    assert mask[whole].all()


def test_a_patients_lungs_and_nodule_are_kept_and_the_table_is_not(data):
    (candidate,) = select_series(scan_folder(data / "lidc-idri-0314")).selected
    volume = assemble_series(candidate.series).volume
    mask = mask_of(volume.array, volume.geometry.spacing_mm)
    trunk = ndimage.binary_erosion(volume.array[::4, ::4, ::4] > -300, iterations=2)
    numbers, _ = ndimage.label(trunk)
    trunk = numbers == np.bincount(numbers.ravel())[1:].argmax() + 1
    whole = np.stack([ndimage.binary_fill_holes(each) for each in trunk])
    assert (volume.array[::4, ::4, ::4][whole] < -800).sum() > 10_000, "lungs are in it"
    assert mask[::4, ::4, ::4][whole].all()
    nodule = np.asarray(nibabel.load(data / "lidc-idri-0314.nodule.nii.gz").dataobj) > 0
    ours = volume.geometry.affine_mm[:, [2, 1, 0, 3]] * np.array([[-1], [-1], [1], [1]])
    theirs = nibabel.load(data / "lidc-idri-0314.nodule.nii.gz").affine
    points = np.c_[np.argwhere(nodule), np.ones(nodule.sum())] @ theirs.T @ np.linalg.inv(ours).T
    w, h, d = np.round(points[:, :3]).astype(int).T
    assert mask[d, h, w].all()
    assert not mask[:, 480:].any()
    assert mask.mean() < 0.55


def test_air_a_table_and_scattered_noise_are_no_body():
    air = np.full(SHAPE, AIR, np.int16)
    assert find_body(torch.from_numpy(air), SPACING) is None
    air[:, 190:193] = 300
    assert find_body(torch.from_numpy(air), SPACING) is None
    air[np.random.default_rng(0).random(SHAPE) < 0.2] = 0
    assert find_body(torch.from_numpy(air), SPACING) is None


def test_a_box_touches_the_body_where_it_holds_a_voxel_of_it():
    hu, _ = chest()
    body, mask = find_body(torch.from_numpy(hu), SPACING), mask_of(hu)
    rng = np.random.default_rng(1)
    answers = []
    for _ in range(300):
        starts = [int(rng.integers(0, n)) for n in SHAPE]
        stops = [min(start + int(rng.integers(1, 40)), n) for start, n in zip(starts, SHAPE, strict=True)]
        box = tuple(slice(*pair) for pair in zip(starts, stops, strict=True))
        answers.append(body.touches(box))
        assert body.touches(box) or not mask[box].any()
    assert len(set(answers)) == 2
    assert not body.touches((slice(0, 0), slice(0, 240), slice(0, 280)))
