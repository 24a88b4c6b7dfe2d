"""What the demonstration model is trained on: where lesions are kept away from, what is drawn, how it is acquired."""

from __future__ import annotations

from dataclasses import replace

import make_set
import nibabel as nib
import numpy as np
import pytest
import real_chests
from acquisition import Sample, acquire
from hypothesis import given, settings
from hypothesis import strategies as st
from lungs import lung_distance, vessels_of
from make_set import EXCLUDED, MIMIC, NEAR, OUTSIDE, with_places, write_case
from mimics import draw_lung_disease
from real_chests import (
    CLEAR_MM,
    SMALLEST_BOX_MM,
    SPACING_MM,
    as_acquired,
    boxes_clear_of,
    noise_hu,
    prepare_background,
    read_backgrounds,
)
from validate import judge, total

from ctflow.core.volume import Geometry, Volume
from ctflow.phantom import phantom_from_seed
from ctflow.phantom.grid import Field, Grid

CUBIC = (3.0, 3.0, 3.0)


@pytest.fixture(scope="module")
def chest():
    phantom = phantom_from_seed(7, (100, 112, 112), tumours=3)
    hu = phantom.volume.array.astype(np.float32)
    spacing = phantom.volume.geometry.spacing_mm
    return hu, phantom.numbers, spacing, lung_distance(hu, spacing)


@st.composite
def lesions_in_a_volume(draw):
    shape = tuple(draw(st.integers(80, 260)) for _ in range(3))
    boxes = []
    for _ in range(draw(st.integers(1, 4))):
        first = [draw(st.integers(-20, n)) for n in shape]
        boxes.append(np.array([(a, a + draw(st.integers(1, 40))) for a in first]))
    return shape, boxes


@settings(max_examples=200, deadline=None)
@given(lesions_in_a_volume())
def test_no_voxel_within_30_mm_of_a_lesion_is_in_a_box(case):
    shape, lesions = case
    for box in boxes_clear_of(lesions, shape, SPACING_MM):
        for part, n in zip(box, shape, strict=True):
            assert 0 <= part.start < part.stop <= n
        for lesion in lesions:
            gaps = [
                max(low - part.stop, part.start - high, -1) + 1 for part, (low, high) in zip(box, lesion, strict=True)
            ]
            assert max(gaps) * SPACING_MM > CLEAR_MM


def test_what_is_clear_of_all_lesions_is_used():
    assert boxes_clear_of([], (50, 60, 70), SPACING_MM) == [(slice(0, 50), slice(0, 60), slice(0, 70))]
    corner = np.array([(0, 10), (0, 10), (0, 10)])
    boxes = boxes_clear_of([corner], (200, 200, 200), SPACING_MM)
    assert len(boxes) == 3, "behind it on each axis"
    assert all(min(part.stop - part.start for part in box) * SPACING_MM >= SMALLEST_BOX_MM for box in boxes)


def test_the_lesion_of_a_background_is_found_again_on_cubic_voxels():
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    affine[0, 2], affine[1, 1], affine[2, 0] = 0.8, 0.8, -5.0  # the first slice is the uppermost
    affine[:3, 3] = -60, -70, 300
    array = np.full((30, 150, 150), -800, np.int16)
    array[10:13, 40:60, 80:100] = 50
    corners = np.array([[-60 + 79 * 0.8, -70 + 39 * 0.8, 300 - 13 * 5], [-60 + 101 * 0.8, -70 + 61 * 0.8, 300 - 9 * 5]])
    background = prepare_background(0, "one", Volume(array, Geometry(array.shape, affine)), [corners])
    (lesion,) = background["lesions"]
    marked = np.argwhere(background["hu"] > -300)
    assert (marked.min(axis=0) >= lesion[:, 0]).all()
    assert (marked.max(axis=0) < lesion[:, 1]).all()
    assert background["thickness_mm"] == pytest.approx(5.0)
    assert not background["flip"], "a mirrored lesion would lie elsewhere"


def test_prepared_backgrounds_are_those_of_the_catalogue_or_none(tmp_path, monkeypatch):
    fields = dict.fromkeys(real_chests.Background.__dataclass_fields__, "")
    entry = real_chests.Background(**{**fields, "name": "one", "use": "train", "lesions": ()})
    stored = {"hu": np.zeros((2, 2, 2), np.int16), "name": "one", "entry": repr(entry)}
    np.savez_compressed(tmp_path / "train-one.npz", **stored)
    monkeypatch.setattr(real_chests, "read_catalogue", lambda: (entry,))
    (background,) = read_backgrounds(tmp_path, "train", 1)
    assert background["hu"].shape == (2, 2, 2)
    lesion = real_chests.Background(**{**fields, "name": "one", "use": "train", "lesions": ("nodule",)})
    monkeypatch.setattr(real_chests, "read_catalogue", lambda: (lesion,))
    with pytest.raises(ValueError, match="prepared from another entry"):
        read_backgrounds(tmp_path, "train", 1)
    monkeypatch.setattr(real_chests, "read_catalogue", lambda: (replace(entry, use="held-out"),))
    assert read_backgrounds(tmp_path, "train", 1) == [], "its use is another now"
    monkeypatch.setattr(real_chests, "read_catalogue", lambda: (entry, replace(entry, name="two")))
    with pytest.raises(ValueError, match="train-two.npz is missing"):
        read_backgrounds(tmp_path, "train", 1)


def test_places_tell_tumour_mimic_body_and_air_apart(chest):
    hu, numbers, spacing, lung = chest
    places = with_places(hu, numbers, spacing, lung)
    assert (places[numbers > 0] == numbers[numbers > 0]).all()
    inside = (lung < -3) & (hu > -300) & (numbers == 0)
    assert (places[inside] == MIMIC).all(), "vessels in the lungs"
    assert (places[:, 0] == OUTSIDE).all(), "air before the chest"
    assert {NEAR, OUTSIDE, MIMIC} <= set(np.unique(places))


def test_lungs_are_neither_room_air_nor_trachea(chest):
    hu, _, spacing, lung = chest
    assert 1500 < (lung < 0).sum() * np.prod(spacing) / 1000 < 9000
    assert (lung[:, 0] > 0).all()
    grid = Grid(hu.shape, spacing)
    points = vessels_of(hu, lung, grid, np.random.default_rng(0)).starts_mm
    assert len(points) == 400
    index = tuple(np.rint((points[:, k] - grid.lines_mm[k][0]) / spacing[k]).astype(int) for k in range(3))
    assert (hu[index] > -150).all()
    assert (lung[index] < -6).all()


def test_disease_stays_in_the_lungs_and_off_the_tumours(chest):
    hu, numbers, spacing, lung = chest
    grid = Grid(hu.shape, spacing)
    changed = 0
    for seed in range(4):
        drawn = hu.copy()
        marks = draw_lung_disease(np.random.default_rng(seed), drawn, grid, Field(lung, grid, grid), numbers)
        touched = drawn != hu
        changed += int(marks.sum())
        assert not touched[numbers > 0].any()
        assert not touched[lung > 2].any()
        assert not marks[numbers > 0].any()
    assert changed > 1000


def test_what_is_drawn_gets_the_noise_of_the_image_and_the_thickness_of_its_slices():
    rng = np.random.default_rng(1)
    before = rng.normal(40, 20, (40, 60, 60)).astype(np.float32)
    assert noise_hu(before) == pytest.approx(20, rel=0.1)
    drawn = before.copy()
    drawn[18:22, 20:40, 20:40] = 500
    thin, thick = (as_acquired(np.random.default_rng(2), before, drawn, mm) for mm in (1.0, 6.0))
    assert thin[20, 25:35, 25:35].std() == pytest.approx(20, rel=0.35), "not one constant value"
    assert np.abs(thin[14] - before[14]).max() == 0
    assert thick[17, 25:35, 25:35].mean() > 100, "partial volume beside its first slice"
    assert (thin[:, :10] == before[:, :10]).all()


@pytest.mark.parametrize("seed", range(6))
def test_another_acquisition_keeps_labels_where_the_tissue_is(seed):
    hu = np.full((120, 100, 100), -800, np.float32)
    labels = np.zeros(hu.shape, np.uint8)
    hu[50:70, 40:60, 40:60], labels[50:70, 40:60, 40:60] = 900, 1
    before = hu.copy()
    sample = Sample(hu, labels, (1.5, 1.5, 1.5))
    shown = acquire(np.random.default_rng(seed), sample, native_mm=1.0)
    assert (hu == before).all(), "what was given stays as it was"
    assert shown.hu.shape == shown.labels.shape
    assert min(n * mm for n, mm in zip(shown.hu.shape, shown.spacing_mm, strict=True)) >= 105.0
    if (shown.labels == 1).sum() > 500:
        inside = np.argwhere(shown.labels == 1).mean(axis=0) * shown.spacing_mm + shown.start_mm
        bright = np.argwhere(shown.hu > 300).mean(axis=0) * shown.spacing_mm + shown.start_mm
        assert inside == pytest.approx(bright, abs=1.5)


def test_a_case_lies_in_nifti_where_it_lay_in_the_patient(tmp_path):
    hu = np.zeros((4, 5, 6), np.float32)
    hu[3, 2, 1] = 100
    write_case(tmp_path / "case", Sample(hu, (hu > 0).astype(np.uint8), (5.0, 1.0, 2.0), (10.0, 20.0, 30.0)))
    image = nib.load(tmp_path / "case" / "image.nii")
    (index,) = np.argwhere(np.asarray(image.dataobj) == 100)
    right_anterior_superior = image.affine @ [*index, 1]
    assert right_anterior_superior[:3] == pytest.approx([-(30 + 1 * 2), -(20 + 2 * 1), 10 + 3 * 5])


def test_a_network_is_judged_by_what_it_finds_and_what_it_invents():
    labels = np.zeros((30, 30, 30), np.uint8)
    labels[2:8, 2:8, 2:8], labels[2:8, 20:26, 2:8], labels[20:28, 20:28, 20:28] = 1, 2, EXCLUDED
    marked = np.zeros(labels.shape, bool)
    marked[2:8, 2:8, 2:8] = True
    marked[20:28, 2:10, 2:10] = marked[28, 28, 2] = True  # 0.512 ml and a speck, invented
    marked[20:28, 20:28, 20:28] = True  # beside a real lesion: neither right nor wrong
    judged = judge(marked, labels, 0.001)
    assert (judged["tumours"], judged["found"], judged["false"]) == (2, 1, 1)
    assert judged["dice"] == 0.5
    assert judged["false_ml"] == pytest.approx(0.513)
    empty = judge(np.zeros_like(marked), np.zeros_like(labels), 0.001)
    summed = total({"a": judged, "b": empty})
    assert summed["dice"] == 0.5
    assert summed["false_a_case"] == 0.5
    assert summed["score"] == pytest.approx(0.5 - 0.05 * 0.5)


def test_a_set_is_begun_only_in_a_new_folder_with_the_backgrounds_of_the_catalogue(tmp_path, monkeypatch, capsys):
    for words, said in (
        ([str(tmp_path), "--phantoms", "1"], "exists"),
        ([str(tmp_path / "set"), "--backgrounds", str(tmp_path / "none")], "C3N-00247"),
    ):
        monkeypatch.setattr("sys.argv", ["make_set.py", *words])
        with pytest.raises(SystemExit) as ended:
            make_set.main()
        assert ended.value.code == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
