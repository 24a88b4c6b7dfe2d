from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import SimpleITK as itk
from hypothesis import given, settings
from hypothesis import strategies as st

from ctflow.core.model import Code, Segment
from ctflow.core.volume import Geometry, Volume
from ctflow.measurements.components import MOST_FINDINGS
from ctflow.measurements.lengths import axes_in_slices_mm, longest_distance_mm
from ctflow.measurements.measure import measure_segments, split_findings

ROUNDING = 1e-9  # of matrix products in other sizes, relative; what `ctflow.measurements` takes for equal
SEGMENT = Segment(1, "tumour", Code("1", "SCT", "a"), Code("2", "SCT", "b"))


def measured_on(labels, geometry: Geometry, segments=(SEGMENT,), hu=None):
    """Measurements of labels on a volume; its HU matter to few tests."""
    return measure_segments(labels, Volume(np.zeros(labels.shape, np.int16) if hu is None else hu, geometry), segments)


def oblique(shape, spacing=(2.0, 0.7, 0.9)) -> Geometry:
    turn, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((3, 3)))
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing
    affine[:3, 3] = [10, -20, 30]
    return Geometry(shape, affine)


def ellipsoid(shape, spacing, centre, radii_mm):
    index = np.indices(shape).reshape(3, -1).T
    inside = ((((index - centre) * spacing) / radii_mm) ** 2).sum(axis=1) <= 1
    return inside.reshape(shape).astype(np.uint8)


def test_an_ellipsoid_has_its_volume_diameter_and_centre():
    shape, spacing, centre, radii = (40, 70, 60), (2.0, 0.7, 0.9), (20, 35, 30), (30.0, 14.0, 20.0)
    geometry = oblique(shape, spacing)
    (measured,) = measured_on(ellipsoid(shape, spacing, centre, radii), geometry, [SEGMENT])
    assert measured.volume_ml == pytest.approx(4 / 3 * np.pi * np.prod(radii) / 1000, rel=0.02)
    assert measured.longest_diameter_mm == pytest.approx(60.0, abs=2.0)
    assert measured.centroid_mm == pytest.approx(tuple(geometry.world_from_index(centre)), abs=0.1)
    assert measured.components == 1
    assert measured.findings[0].volume_ml == pytest.approx(measured.volume_ml)
    assert measured.findings_left_out == 0


def brute_force(mask, geometry) -> float:
    points = geometry.world_from_index(np.argwhere(mask))
    return float(np.linalg.norm(points[:, None] - points[None], axis=2).max())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.02, 0.9), shape=st.tuples(*[st.integers(1, 8)] * 3))
def test_the_longest_diameter_is_exact(seed, density, shape):
    from scipy import ndimage  # noqa: PLC0415

    mask = (np.random.default_rng(seed).random(shape) < density).astype(np.uint8)
    geometry = oblique(shape)
    (measured,) = measured_on(mask, geometry, [SEGMENT])
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    assert measured.components == count
    assert measured.voxels == int(mask.sum())
    if count:
        expected = max(brute_force(components == index, geometry) for index in range(1, count + 1))
        assert measured.longest_diameter_mm == pytest.approx(expected, abs=1e-9)
        assert sum(finding.volume_ml for finding in measured.findings) <= measured.volume_ml + 1e-9


@pytest.mark.parametrize("shape", [(50, 1, 1), (1, 40, 1), (1, 9, 12), (9, 1, 12), (7, 7, 1), (1, 1, 1)])
def test_flat_and_straight_components_are_measured(shape):
    geometry = oblique(shape)
    (measured,) = measured_on(np.ones(shape, np.uint8), geometry, [SEGMENT])
    assert measured.longest_diameter_mm == pytest.approx(brute_force(np.ones(shape), geometry))


def test_many_points_are_measured_in_blocks():
    rng = np.random.default_rng(0)
    sphere = rng.standard_normal((3000, 3))
    sphere /= np.linalg.norm(sphere, axis=1, keepdims=True)
    expected = max(float(np.linalg.norm(sphere - point, axis=1).max()) for point in sphere)
    assert longest_distance_mm(sphere) == pytest.approx(expected)


def test_more_than_a_hundred_components_are_counted_not_listed():
    mask = np.zeros((9, 45, 45), np.uint8)
    mask[::4, ::3, ::3] = 1
    count = int(mask.sum())
    mask[0, 0, 1] = 1  # the largest
    (measured,) = measured_on(mask, oblique(mask.shape), [SEGMENT])
    assert measured.components == count
    assert len(measured.findings) == MOST_FINDINGS
    assert measured.findings_left_out == count - MOST_FINDINGS
    assert measured.findings[0].volume_ml == pytest.approx(2 * oblique(mask.shape).voxel_ml)


def test_a_thin_component_beyond_the_list_decides_the_longest_diameter():
    mask = np.zeros((5, 120, 120), np.uint8)
    for row in range(0, 110, 8):
        for column in range(0, 60, 6):
            mask[:, row : row + 4, column : column + 4] = 1  # 140 blocks of 80 voxels
    mask[0, :60, 118] = 1  # a line of 60
    geometry = oblique(mask.shape)
    (measured,) = measured_on(mask, geometry, [SEGMENT])
    assert measured.findings_left_out > 0
    assert measured.longest_diameter_mm == pytest.approx(59 * 0.7)
    assert max(finding.longest_diameter_mm for finding in measured.findings) < 59 * 0.7


def test_an_empty_segment_is_told_and_others_are_measured():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1] = 2
    other = Segment(2, "cyst", SEGMENT.category, SEGMENT.type)
    empty, single = measured_on(labels, oblique(labels.shape), [SEGMENT, other])
    assert asdict(empty) == {
        "number": 1, "label": "tumour", "voxels": 0, "volume_ml": 0.0, "longest_diameter_mm": None,
        "centroid_mm": None, "components": 0, "findings": (), "findings_left_out": 0,
        "hu_range": None, "implausible": {"findings": 0, "volume_ml": 0.0, "outside_body": 0, "hu_range": 0},
    }  # fmt: skip
    assert single.longest_diameter_mm == 0.0
    assert single.voxels == 1


def sheared(shape) -> Geometry:
    """Steps that are at right angles to nothing, as after gantry tilt."""
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([(0.4, 1.1, 2.5), (0.1, 0.8, 0.05), (0.9, 0.2, 0)])
    return Geometry(shape, affine)


GRIDS = {"oblique": oblique, "thick": lambda shape: oblique(shape, (5.0, 0.5, 1.25)), "sheared": sheared}


def axes_by_brute_force(mask, geometry) -> tuple[float, float]:
    """Every pair of every slice, in world coordinates."""
    found = []
    normal = np.cross(geometry.affine_mm[:3, 1], geometry.affine_mm[:3, 2])
    for d, section in enumerate(mask):
        points = geometry.world_from_index(np.column_stack([np.full(int(section.sum()), d), np.argwhere(section)]))
        for a in points:
            for b in points:
                length = float(np.linalg.norm(b - a))
                across = np.cross(normal, b - a)
                extent = float(np.ptp(points @ across)) / float(np.linalg.norm(across)) if length else 0.0
                found.append((round(length, 7), round(extent, 7)))  # equal lengths are equal
    return max(found)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    density=st.floats(0.3, 0.9),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    grid=st.sampled_from(sorted(GRIDS)),
)
def test_axes_centroid_volume_and_hu_equal_brute_force(seed, density, shape, grid):
    from scipy import ndimage  # noqa: PLC0415

    rng = np.random.default_rng(seed)
    mask = (rng.random(shape) < density).astype(np.uint8)
    hu = rng.integers(-1024, 3000, shape, dtype=np.int16)
    geometry = GRIDS[grid](shape)
    (measured,) = measured_on(mask, geometry, hu=hu)
    components, count = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    places = [components == index for index in range(1, count + 1)]
    for finding, place in zip(measured.findings, sorted(places, key=np.sum, reverse=True), strict=True):
        assert (finding.long_axis_mm, finding.short_axis_mm) == pytest.approx(
            axes_by_brute_force(place, geometry), abs=1e-6
        )
        assert finding.long_axis_mm <= finding.longest_diameter_mm + 1e-9
        assert finding.short_axis_mm <= finding.long_axis_mm + 1e-9
        assert finding.volume_ml == pytest.approx(place.sum() * geometry.voxel_ml)
        assert finding.mean_hu == pytest.approx(hu[place].mean())
        assert finding.sd_hu == pytest.approx(hu[place].std())
        centre = geometry.world_from_index(np.argwhere(place)).mean(axis=0)
        assert finding.centroid_mm == pytest.approx(tuple(centre))


def axes_of_every_slice(mask, geometry) -> tuple[float, float]:
    """Each slice by itself, none of them left out."""
    long = short = 0.0
    for section in mask:
        if section.any():
            found_long, found_short = axes_in_slices_mm(section[None], geometry)
            if found_long > long * (1 + 1e-9):
                long, short = found_long, found_short
            elif found_long >= long * (1 - 1e-9):
                short = max(short, found_short)
    return long, short


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    density=st.floats(0.01, 0.9),
    shape=st.tuples(*[st.integers(1, 14)] * 3),
    grid=st.sampled_from(sorted(GRIDS)),
)
def test_slices_that_cannot_be_the_longest_change_nothing(seed, density, shape, grid):
    mask = np.random.default_rng(seed).random(shape) < density
    if mask.any():
        expected = axes_of_every_slice(mask, GRIDS[grid](shape))
        assert axes_in_slices_mm(mask, GRIDS[grid](shape)) == pytest.approx(expected, rel=ROUNDING, abs=ROUNDING)


@pytest.mark.parametrize("grid", sorted(GRIDS))
@pytest.mark.parametrize("radii", [(9, 9, 9), (12, 5, 8), (4, 15, 15), (14, 13.4, 3)])
def test_slices_of_a_round_finding_that_cannot_be_the_longest_change_nothing(grid, radii):
    mask = ellipsoid((30, 32, 34), (1, 1, 1), (14.5, 15.2, 16), radii).astype(bool)
    expected = axes_of_every_slice(mask, GRIDS[grid](mask.shape))
    assert axes_in_slices_mm(mask, GRIDS[grid](mask.shape)) == pytest.approx(expected, rel=ROUNDING)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(33, 400), form=st.sampled_from(["cube", "ball", "line", "plane"]))
def test_points_that_cannot_be_an_end_of_the_longest_distance_change_nothing(seed, count, form):
    random = np.random.default_rng(seed)
    points = random.integers(0, 12, (count, 3)).astype(float)
    if form == "ball":
        points = np.round(8 * points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1))
    points[:, {"line": [0, 1], "plane": [2]}.get(form, [])] = 3
    points = points @ oblique((1, 1, 1)).affine_mm[:3, :3].T
    steps = points[:, None] - points[None]
    expected = float(np.sqrt(np.einsum("ijk,ijk->ij", steps, steps).max()))
    assert longest_distance_mm(points) == pytest.approx(expected, rel=ROUNDING)


@pytest.mark.parametrize("grid", ["oblique", "thick"])
def test_simpleitk_measures_the_same(grid):
    shape = (14, 20, 24)
    geometry = GRIDS[grid](shape)
    labels = np.zeros(shape, np.uint8)
    labels[2:9, 3:9, 4:15] = 1
    labels[6:8, 9:12, 4:6] = 1
    hu = np.random.default_rng(3).normal(40, 200, shape).astype(np.float32)
    image, values = itk.GetImageFromArray(labels), itk.GetImageFromArray(hu)
    for each in (image, values):
        each.SetSpacing(geometry.spacing_mm[::-1])
        each.SetOrigin(tuple(geometry.affine_mm[:3, 3]))
        each.SetDirection(geometry.directions[:, ::-1].ravel())
    statistics, shapes = itk.LabelIntensityStatisticsImageFilter(), itk.LabelShapeStatisticsImageFilter()
    shapes.ComputeFeretDiameterOn()
    statistics.Execute(image, values)
    shapes.Execute(image)
    (finding,) = measured_on(labels, geometry, hu=hu)[0].findings
    count = int(labels.sum())
    assert finding.volume_ml * 1000 == pytest.approx(shapes.GetPhysicalSize(1))
    assert finding.centroid_mm == pytest.approx(shapes.GetCentroid(1), abs=1e-6)
    assert finding.longest_diameter_mm == pytest.approx(shapes.GetFeretDiameter(1), rel=1e-6)
    assert finding.mean_hu == pytest.approx(statistics.GetMean(1), abs=1e-3)
    # ITK divides by n - 1.
    assert finding.sd_hu == pytest.approx(statistics.GetStandardDeviation(1) * np.sqrt((count - 1) / count), abs=1e-3)


def test_axes_are_those_of_the_slice_with_the_longest():
    mask = np.zeros((3, 30, 60), np.uint8)
    mask[0, 10:21, 5:16] = 1  # 11 x 11
    mask[1, 15, 5:55] = 1  # a line of 50
    (finding,) = measured_on(mask, oblique(mask.shape, (2.0, 0.7, 0.9)))[0].findings
    assert finding.long_axis_mm == pytest.approx(49 * 0.9)
    assert finding.short_axis_mm == pytest.approx(0.0, abs=1e-9)


def test_a_large_disc_has_the_axes_of_an_ellipse():
    shape, spacing = (1, 200, 220), (2.0, 0.5, 0.5)
    (finding,) = measured_on(ellipsoid(shape, spacing, (0, 100, 110), (9.0, 20.0, 45.0)), oblique(shape, spacing))[
        0
    ].findings
    assert finding.long_axis_mm == pytest.approx(90.0, abs=0.6)
    assert finding.short_axis_mm == pytest.approx(40.0, abs=0.6)


def test_labels_beside_the_volume_are_a_programming_mistake():
    volume = Volume(np.zeros((3, 4, 5), np.int16), oblique((3, 4, 5)))
    with pytest.raises(ValueError, match="do not lie on"):
        measure_segments(np.zeros((3, 4, 6), np.uint8), volume, [SEGMENT])


CYST = Segment(2, "cyst", SEGMENT.category, SEGMENT.type, colour=(1, 2, 3))


def test_split_findings_stand_in_the_order_in_which_they_are_measured():
    labels = np.zeros((12, 20, 20), np.uint8)
    labels[1, 1, 1:3] = 1
    labels[3:6, 3:6, 3:6] = 1
    labels[8, 8, 8] = labels[8, 8, 12] = 2
    geometry = oblique(labels.shape)
    split, parts = split_findings(labels, (SEGMENT, CYST))
    assert split.dtype == np.uint8
    assert np.array_equal(split > 0, labels > 0)
    assert [(part.number, part.label, part.part_of, part.rank) for part in parts] == [
        (1, "tumour 1", 1, 1),
        (2, "tumour 2", 1, 2),
        (3, "cyst 1", 2, 1),
        (4, "cyst 2", 2, 2),
    ]
    assert [part.colour for part in parts] == [None, None, (1, 2, 3), (1, 2, 3)]
    measured = measured_on(labels, geometry, (SEGMENT, CYST))
    findings = [finding for entry in measured for finding in entry.findings]
    for part, finding in zip(parts, findings, strict=True):
        assert (split == part.number).sum() * geometry.voxel_ml == pytest.approx(finding.volume_ml)
        centre = geometry.world_from_index(np.argwhere(split == part.number).mean(axis=0))
        assert finding.centroid_mm == pytest.approx(tuple(centre))


def test_a_class_without_a_mark_keeps_its_segment():
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[1, 1, 1] = 2
    split, parts = split_findings(labels, (SEGMENT, CYST))
    assert [(part.label, part.part_of) for part in parts] == [("tumour", None), ("cyst 1", 2)]
    assert np.array_equal(split, labels)


def test_more_than_the_listed_findings_share_a_segment_and_none_is_lost():
    labels = np.zeros((20, 20, 20), np.uint8)
    labels[:10:2, ::2, ::2] = 1
    labels[10::2, ::2, ::2] = 2
    labels[10, 18, 18:20] = 2
    long = Segment(3, "x" * 64, SEGMENT.category, SEGMENT.type)
    labels[19, 19, 0:2] = 3
    split, parts = split_findings(labels, (SEGMENT, CYST, long))
    assert len(parts) == 2 * (MOST_FINDINGS + 1) + 1
    assert np.array_equal(split > 0, labels > 0)
    others = [part for part in parts if part.rank is None]
    assert [part.label for part in others] == ["tumour other findings", "cyst other findings"]
    for part in others:
        assert (split == part.number).sum() == (500 - 1) + (1 if part.part_of == 1 else 0) - MOST_FINDINGS + (
            0 if part.part_of == 1 else 1
        )
    assert len(parts[-1].label) == 64
    assert parts[-1].label.endswith("x 1")


def test_more_segments_than_a_byte_holds_take_two():
    labels = np.zeros((20, 20, 60), np.uint8)
    segments = tuple(Segment(number, f"s{number}", SEGMENT.category, SEGMENT.type) for number in (1, 2, 3))
    for number in (1, 2, 3):
        labels[::2, ::2, 20 * (number - 1) : 20 * number : 2] = number
    split, parts = split_findings(labels, segments)
    assert len(parts) == 303
    assert split.dtype == np.uint16
    assert int(split.max()) == 303
    assert np.array_equal(split > 0, labels > 0)


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 10**6), density=st.floats(0.0, 0.6), shape=st.tuples(*[st.integers(1, 9)] * 3))
def test_components_are_those_of_26_neighbours_in_the_order_of_their_volume_and_place(seed, density, shape):
    from scipy import ndimage  # noqa: PLC0415

    random = np.random.default_rng(seed)
    labels = ((random.random(shape) < density) * random.integers(1, 3, shape)).astype(np.uint8)
    classes = (SEGMENT, replace(SEGMENT, number=2))
    geometry = oblique(shape)
    split, parts = split_findings(labels, classes)
    for number, measured in enumerate(measured_on(labels, geometry, classes), start=1):
        components, count = ndimage.label(labels == number, np.ones((3, 3, 3)))
        assert (measured.components, measured.voxels) == (count, int((labels == number).sum()))
        voxels = np.bincount(components.ravel(), minlength=count + 1)[1:]
        for rank, index in enumerate(np.argsort(-voxels, kind="stable")[:MOST_FINDINGS]):
            inside = components == index + 1
            finding = measured.findings[rank]
            assert finding.volume_ml == pytest.approx(int(voxels[index]) * geometry.voxel_ml)
            assert finding.centroid_mm == pytest.approx(
                tuple(geometry.world_from_index(np.argwhere(inside).mean(axis=0)))
            )
            (part,) = (part for part in parts if (part.part_of, part.rank) == (number, rank + 1))
            assert np.array_equal(split == part.number, inside)
