from __future__ import annotations

import json
import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from monai.metrics import DiceMetric, compute_hausdorff_distance
from monai.metrics.utils import get_edge_surface_distance
from scipy import ndimage

from ctflow.bench.exactness import (
    SIZE_CLASSES_MM,
    TUMOUR_FREE_ML,
    CaseComparison,
    FalsePositive,
    Lesion,
    LesionComparison,
    MaskComparison,
    compare_lesions,
    compare_masks,
    dice_of,
    summarise,
)

# MONAI 1.6 warns of an argument that it passes itself.
pytestmark = pytest.mark.filterwarnings("ignore:monai.metrics.utils get_mask_edges:FutureWarning")

UNIT = (1.0, 1.0, 1.0)
EPS32 = float(np.finfo(np.float32).eps)
SHAPES = st.tuples(*[st.integers(1, 9)] * 3)
SPACINGS = st.tuples(*[st.floats(0.3, 5.0).map(lambda mm: round(mm, 3))] * 3)


@st.composite
def two_masks(draw):
    """Blobs and noise, as full or empty as hypothesis likes, on one grid."""
    shape = draw(SHAPES)
    return draw(hnp.arrays(bool, shape)), draw(hnp.arrays(bool, shape)), draw(SPACINGS)


# 618 distances: float32 rounds the rank 0.95 * 617 = 586.15, and MONAI says 0.14996 mm for 0.15 mm.
LAST_BIT_OF_THE_RANK = (np.ones((1, 1, 618), bool), np.arange(618)[None, None] < 587, (1.0, 1.0, 1.0))


def as_monai(mask):
    return torch.from_numpy(np.asarray(mask, np.float32))[None, None]


def hausdorff95_by_monai(found, truth, spacing):
    """MONAI's value, and how far its float32 may lie from the exact one.

    `torch.quantile` takes the rank 0.95 (n - 1) in float32: between the two distances beside it the value may move by
    the rank's rounding times their difference, and distances are rounded to float32 themselves.
    """
    monai = {"spacing": list(spacing)}
    theirs = compute_hausdorff_distance(
        as_monai(found), as_monai(truth), include_background=True, percentile=95, **monai
    )
    masks = (torch.from_numpy(np.asarray(mask, bool)) for mask in (found, truth))
    rounding = 0.0
    for distances in get_edge_surface_distance(*masks, symmetric=True, **monai)[1]:
        ordered, rank = np.sort(distances.numpy()), int(0.95 * (len(distances) - 1))
        beside = ordered[max(rank - 1, 0) : rank + 3]
        rounding = max(rounding, EPS32 * (len(distances) * float(np.ptp(beside)) + 2 * float(beside[-1])))
    return float(theirs), rounding


@settings(max_examples=150, deadline=None)
@given(two_masks())
@example(LAST_BIT_OF_THE_RANK)
def test_masks_compare_as_monai_compares_them(case):
    found, truth, spacing = case
    ours = compare_masks(found, truth, spacing)
    metric = DiceMetric(include_background=True, ignore_empty=False)
    assert ours.dice == pytest.approx(float(metric(as_monai(found), as_monai(truth))), abs=1e-6)
    if found.any() and truth.any():
        theirs, rounding = hausdorff95_by_monai(found, truth, spacing)
        assert ours.hausdorff95_mm == pytest.approx(theirs, rel=0, abs=rounding)
    else:
        assert ours.hausdorff95_mm is None
    voxel_ml = math.prod(spacing) / 1000
    assert ours.volume_found_ml == pytest.approx(found.sum() * voxel_ml)
    assert ours.volume_truth_ml == pytest.approx(truth.sum() * voxel_ml)
    assert ours.volume_error_ml == pytest.approx((int(found.sum()) - int(truth.sum())) * voxel_ml)


def moved(found, steps):
    return replace(found, centroid=pytest.approx(tuple(np.add(found.centroid, steps))))


@settings(max_examples=60, deadline=None)
@given(two_masks(), st.integers(0, 12), st.tuples(*[st.integers(0, 4)] * 3))
def test_what_lies_around_changes_nothing(case, after, before):
    found, truth, spacing = case
    margins = [(first, after) for first in before]
    wide = [np.pad(mask, margins) for mask in (found, truth)]
    assert compare_masks(*wide, spacing) == compare_masks(found, truth, spacing)
    near, far = compare_lesions(found, truth, spacing), compare_lesions(*wide, spacing)
    assert far.lesions == near.lesions
    assert [moved(item, before) for item in near.false_positives] == list(far.false_positives)


def test_smooth_bodies_compare_as_monai_compares_them():
    rng = np.random.default_rng(4)
    found, truth = (ndimage.gaussian_filter(rng.normal(size=(40, 50, 60)), 3) > 0.03 for _ in range(2))
    spacing = (2.5, 0.7, 0.9)
    theirs, rounding = hausdorff95_by_monai(found, truth, spacing)
    assert rounding < 1e-3
    assert compare_masks(found, truth, spacing).hausdorff95_mm == pytest.approx(theirs, rel=0, abs=rounding)


def test_two_planes_are_as_far_apart_as_they_are_in_millimetres():
    found, truth = np.zeros((9, 5, 5), bool), np.zeros((9, 5, 5), bool)
    found[1], truth[5] = True, True
    assert compare_masks(found, truth, (2.5, 1.0, 1.0)).hausdorff95_mm == pytest.approx(10.0)


def test_empty_masks():
    empty, full = np.zeros((3, 4, 5), np.uint8), np.full((3, 4, 5), 7, np.uint8)
    assert compare_masks(empty, empty, UNIT) == MaskComparison(1.0, None, 0.0, 0.0, 0.0)
    assert compare_masks(full, empty, UNIT) == MaskComparison(0.0, None, 0.06, 0.0, 0.06)
    assert compare_masks(empty, full, UNIT) == MaskComparison(0.0, None, 0.0, 0.06, -0.06)
    assert compare_masks(full, full, UNIT) == MaskComparison(1.0, 0.0, 0.06, 0.06, 0.0)
    assert (dice_of(empty, empty), dice_of(full, empty)) == (1.0, 0.0)
    assert compare_lesions(empty, empty, UNIT) == LesionComparison((), ())
    assert [found.volume_ml for found in compare_lesions(full, empty, UNIT).false_positives] == [0.06]


@pytest.mark.parametrize("compare", [compare_masks, compare_lesions])
def test_masks_of_two_grids_are_refused(compare):
    with pytest.raises(ValueError, match="one grid"):
        compare(np.zeros((2, 2, 2)), np.zeros((2, 2, 3)), UNIT)


def boxes(*places, shape=(24, 24, 24), dtype=bool):
    """A mask with a box at each place; of integers, the boxes are numbered."""
    mask = np.zeros(shape, dtype)
    for number, place in enumerate(places, start=1):
        mask[tuple(slice(*span) for span in place)] = number
    return mask


A, B, C = ((2, 6), (2, 6), (2, 6)), ((12, 14), (12, 16), (12, 18)), ((20, 22), (2, 4), (18, 23))


def test_lesions_hit_missed_and_false_positives():
    found = boxes(((4, 6), (2, 6), (2, 6)), C, ((9, 10), (20, 21), (20, 21)))
    result = compare_lesions(found, boxes(A, B), UNIT)
    first, second = result.lesions
    assert (first.hit, second.hit) == (True, False)
    assert first.volume_ml == pytest.approx(0.064)
    assert first.dice == pytest.approx(2 * 32 / (64 + 32))
    assert first.hausdorff95_mm == pytest.approx(2.0), "two of its four slices were missed"
    assert second.hausdorff95_mm is None
    assert compare_masks(found, boxes(A, B), UNIT).hausdorff95_mm > 13, "the whole masks' is that of false findings"
    assert [item.centroid for item in result.false_positives] == [(20.5, 2.5, 20.0), (9.0, 20.0, 20.0)]
    assert first.longest_diameter_mm == pytest.approx(math.sqrt(27))
    assert math.pi / 6 * first.equivalent_diameter_mm**3 == pytest.approx(64)
    assert second.dice == 0.0
    assert [item.volume_ml for item in result.false_positives] == pytest.approx([0.020, 0.001])
    assert math.pi / 6 * result.false_positives[0].equivalent_diameter_mm ** 3 == pytest.approx(20)


def test_diameters_are_in_millimetres():
    result = compare_lesions(boxes(), boxes(A), (2.0, 0.5, 3.0))
    (lesion,) = result.lesions
    assert lesion.longest_diameter_mm == pytest.approx(math.hypot(6, 1.5, 9))
    assert lesion.volume_ml == pytest.approx(64 * 3 / 1000)


def test_several_found_components_make_one_lesion_and_their_excess_counts():
    found = boxes(((1, 3), (2, 6), (2, 6)), ((5, 7), (2, 6), (2, 6)))
    (lesion,) = compare_lesions(found, boxes(A), UNIT).lesions
    assert lesion.dice == pytest.approx(2 * 32 / (64 + 64))
    assert compare_lesions(found, boxes(A), UNIT).false_positives == ()


def test_corners_touch():
    truth = np.zeros((4, 4, 4), bool)
    truth[1, 1, 1] = truth[2, 2, 2] = True
    (lesion,) = compare_lesions(truth, truth, UNIT).lesions
    assert lesion.dice == 1.0
    assert lesion.longest_diameter_mm == pytest.approx(math.sqrt(3))


HALVES = (((2, 6), (2, 6), (2, 6)), ((2, 6), (2, 6), (6, 12)))


def test_touching_lesions_stay_apart_by_number():
    apart, together = boxes(*HALVES, dtype=np.int32), boxes(*HALVES)
    both = compare_lesions(together, apart, UNIT).lesions
    assert [lesion.volume_ml for lesion in both] == pytest.approx([0.064, 0.096])
    assert [lesion.dice for lesion in both] == [1.0, 1.0], "what lies in the other lesion is no excess"
    (one,) = compare_lesions(together, together, UNIT).lesions
    assert one.volume_ml == pytest.approx(0.160)
    first, second = compare_lesions(boxes(HALVES[0]), apart, UNIT).lesions
    assert (first.dice, second.hit) == (1.0, False)


def test_lesions_may_have_any_numbers():
    truth = boxes(A, B, dtype=np.int64) * 1_000_003 - 5_000_000 * boxes(A)
    expected = compare_lesions(boxes(A), boxes(A, B), UNIT)
    assert compare_lesions(boxes(A), truth, UNIT) == expected


@settings(max_examples=80, deadline=None)
@given(two_masks())
def test_lesions_agree_with_a_plain_count(case):
    """Component by component with whole-volume masks, as one would write it without care for time."""
    found, truth, spacing = case
    touching = np.ones((3, 3, 3))
    numbers, lesions = ndimage.label(truth, touching)
    components, count = ndimage.label(found, touching)
    result = compare_lesions(found, truth, spacing)
    assert len(result.lesions) == lesions
    for number, lesion in enumerate(result.lesions, start=1):
        mine = numbers == number
        union = np.isin(components, [k for k in range(1, count + 1) if (mine & (components == k)).any()])
        union &= mine | ~truth
        assert lesion.hit == bool(union.any())
        assert lesion.dice == pytest.approx(2 * (mine & union).sum() / (mine.sum() + union.sum()))
        whole = compare_masks(union, mine, spacing).hausdorff95_mm
        assert (lesion.hausdorff95_mm is None) == (whole is None), "None where it was missed"
        # In the box of a lesion the same distance comes from other multiples of the spacing, and may round otherwise.
        assert lesion.hausdorff95_mm == (None if whole is None else pytest.approx(whole, rel=1e-9))
    false = [components == k for k in range(1, count + 1) if not (truth & (components == k)).any()]
    false.sort(key=lambda mask: -mask.sum())  # stable: of equal ones the first comes first
    voxel_ml = math.prod(spacing) / 1000
    assert [item.volume_ml / voxel_ml for item in result.false_positives] == pytest.approx([m.sum() for m in false])
    for item, mask in zip(result.false_positives, false, strict=True):
        assert item.centroid == pytest.approx(ndimage.center_of_mass(mask))


def test_a_clinical_volume_takes_seconds():
    truth = np.zeros((300, 512, 512), np.uint8)
    truth[100:140, 200:260, 300:360] = 1
    found = np.roll(truth, (1, 2, 3), (0, 1, 2))
    found[0, 0, 0] = found[-1, -1, -1] = 1  # false positives at opposite corners
    start = time.process_time()
    masks = compare_masks(found, truth, (1.0, 0.7, 0.7))
    lesions = compare_lesions(found, truth, (1.0, 0.7, 0.7))
    assert time.process_time() - start < 30
    assert masks.dice == pytest.approx(lesions.lesions[0].dice, abs=1e-4)
    assert len(lesions.false_positives) == 2


def lesion(diameter_mm, dice):
    distance = diameter_mm / 10 if dice else None
    return Lesion(diameter_mm, diameter_mm, math.pi / 6000 * diameter_mm**3, dice, dice > 0, distance)


def case_of(lesions, false_ml=(), dice=0.5):
    false = tuple(FalsePositive((6000 * ml / math.pi) ** (1 / 3), ml, (0.0, 0.0, 0.0)) for ml in false_ml)
    return CaseComparison(MaskComparison(dice, None, 0, 0, 0), LesionComparison(tuple(lesions), false))


def test_summary_by_size():
    cases = [
        case_of([lesion(6.0, 0.6), lesion(9.99, 0.0), lesion(10.0, 0.8)], [0.2, 0.3], dice=0.7),
        case_of([lesion(25, 0.9), lesion(5.9, 0.4), lesion(60, 0.9)], dice=0.8),
        case_of([], [TUMOUR_FREE_ML, 0.1], dice=0.0),
        case_of([], [TUMOUR_FREE_ML + 1e-6], dice=0.0),
    ]
    summary = summarise(cases)
    json.dumps(summary, allow_nan=False)
    assert (summary["cases"], summary["cases_with_truth"]) == (4, 2)
    assert summary["mean_dice"] == pytest.approx(0.75)
    assert summary["tumour_free"] == {"cases": 2, "clean": 1, "limit_ml": TUMOUR_FREE_ML}
    overall = summary["overall"]
    assert (overall["lesions"], overall["hits"]) == (6, 5)
    assert overall["sensitivity"] == pytest.approx(5 / 6)
    assert overall["mean_dice"] == pytest.approx((0.6 + 0 + 0.8 + 0.9 + 0.4 + 0.9) / 6)
    assert overall["mean_hausdorff95_mm"] == pytest.approx((0.6 + 1.0 + 2.5 + 0.59 + 6.0) / 5), "of the found ones"
    assert overall["false_positives_a_case"] == pytest.approx(5 / 4)
    rows = summary["by_size"]
    assert [(row["from_mm"], row["to_mm"]) for row in rows] == list(SIZE_CLASSES_MM)
    assert [(row["lesions"], row["hits"]) for row in rows] == [(2, 1), (1, 1), (1, 1)]
    assert [row["mean_dice"] for row in rows] == pytest.approx([0.3, 0.8, 0.9])
    assert [row["false_positives"] for row in rows] == [4, 0, 0], "0.1 ml is a sphere of 5.8 mm"


@pytest.mark.parametrize("cases", [[], [case_of([])]])
def test_summary_of_nothing_divides_by_nothing(cases):
    summary = summarise(cases)
    json.dumps(summary, allow_nan=False)
    assert summary["mean_dice"] is None
    assert summary["overall"]["sensitivity"] is None
    assert all(row["mean_dice"] is None for row in summary["by_size"])
