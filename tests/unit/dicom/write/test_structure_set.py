"""An RT Structure Set says the SEG's mask to readers of its own kind."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import reduce

import numpy as np
import pydicom
import pytest
from scipy import ndimage
from shapely import LinearRing, Polygon, make_valid, symmetric_difference

from ctflow.core.model import NOTHING_MARKED, RESEARCH_ONLY
from ctflow.core.volume import Geometry
from ctflow.dicom.write.derived import write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.structure_set import structure_set_from_labels
from dicom_support import NAMES, assembled, setter
from structure_support import (
    MADE_BY,
    MOVES,
    OBLIQUE,
    PLACEMENTS,
    SEGMENTS,
    SHAPE,
    SPEC,
    dice,
    fractions_of,
    labels_of,
    masks_by_slice,
    needs_plastimatch,
    points_by_dcmrtstruct2nii,
    points_by_plastimatch,
    points_of_contour,
    volume_on,
)
from tests_support import dciodvfy_errors


def headers_in(folder):
    return [instance.header for instance in assembled(folder).instances]


@pytest.fixture
def headers(write):
    return headers_in(write(volume_on(PLACEMENTS["axial"])))


def made(headers, labels=None, **given):
    spec = given.pop("spec", SPEC)
    return structure_set_from_labels(labels_of() if labels is None else labels, headers, spec, MADE_BY, **given)


def as_bytes(dataset) -> bytes:
    stream = io.BytesIO()
    dataset.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def read_again(dataset):
    return pydicom.dcmread(io.BytesIO(as_bytes(dataset)))


@needs_plastimatch
@pytest.mark.parametrize("form", ["keyhole", "of fractions"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_two_readers_find_the_mask_at_its_place(write, tmp_path, monkeypatch, placement, form):
    folder = write(volume_on(PLACEMENTS[placement]))
    loaded, labels = assembled(folder), labels_of()
    given = {"fractions": fractions_of(labels)} if form == "of fractions" else {}
    path = tmp_path / "structures.dcm"
    write_dataset(made([instance.header for instance in loaded.instances], labels, **given), path)
    assert dciodvfy_errors(path) == []
    for found in found_by_both(path, folder, tmp_path, monkeypatch):
        assert found.keys() == {"Mass", "Shell"}
        for segment in SEGMENTS:
            ours = loaded.volume.geometry.world_from_index(np.argwhere(labels == segment.number))
            assert len(ours) * loaded.volume.geometry.voxel_ml > 1
            assert dice(ours, found[segment.label]) >= 0.99


def found_by_both(path, folder, tmp_path, monkeypatch):
    by_plastimatch = points_by_plastimatch(path, folder, tmp_path / "plastimatch")
    return by_plastimatch, points_by_dcmrtstruct2nii(path, folder, tmp_path / "dcmrtstruct2nii", monkeypatch)


@needs_plastimatch
@pytest.mark.parametrize("holes", ["separate", "xor"])
def test_readers_differ_in_holes_that_are_contours_of_their_own(write, tmp_path, monkeypatch, holes):
    """docs/dicom.md says which: it is why keyholes are the default."""
    folder = write(volume_on(PLACEMENTS["axial"]))
    loaded, labels = assembled(folder), labels_of()
    path = tmp_path / "structures.dcm"
    write_dataset(made([instance.header for instance in loaded.instances], labels, holes=holes), path)
    assert dciodvfy_errors(path) == []
    by_plastimatch, by_the_other = found_by_both(path, folder, tmp_path, monkeypatch)
    shell = loaded.volume.geometry.world_from_index(np.argwhere(labels == 2))
    if holes == "xor":
        assert "Shell" not in by_plastimatch
        assert not len(by_the_other["Shell"])
    else:
        assert len(by_plastimatch["Shell"]) > 1.1 * len(shell), "it fills the hole"
        assert dice(shell, by_the_other["Shell"]) >= 0.99


@pytest.mark.parametrize("holes", ["keyhole", "separate", "xor"])
@pytest.mark.parametrize("move", MOVES)
def test_contours_lie_in_their_own_slices(write, holes, move):
    folder = write(volume_on(PLACEMENTS["oblique" if move == "oblique" else "axial"]), adjust=MOVES[move])
    headers, labels = headers_in(folder), labels_of()
    structures = read_again(made(headers, labels, holes=holes))
    for number, mask in masks_by_slice(structures, headers).items():
        assert np.array_equal(mask, labels == number)
    images = {header.SOPInstanceUID: header for header in headers}
    for roi in structures.ROIContourSequence:
        for contour in roi.ContourSequence:
            image = images[contour.ContourImageSequence[0].ReferencedSOPInstanceUID]
            normal = np.cross(*np.array(image.ImageOrientationPatient, float).reshape(2, 3))
            apart = (points_of_contour(contour) - np.array(image.ImagePositionPatient, float)) @ normal
            assert np.abs(apart).max() < 0.002, "the file has thousandths of a millimetre"


def test_contours_lie_on_the_grid_of_a_resampled_seg_and_refer_to_no_image(headers):
    grid = Geometry(SHAPE, OBLIQUE)
    structures = read_again(made(headers, grid=grid))
    back = np.linalg.inv(OBLIQUE)
    for roi in structures.ROIContourSequence:
        for contour in roi.ContourSequence:
            assert "ContourImageSequence" not in contour
            plane = points_of_contour(contour) @ back[0, :3] + back[0, 3]
            assert np.abs(plane - np.rint(plane[0])).max() < 0.002
    with pytest.raises(ValueError, match="do not lie on 24 planes"):
        made(headers, labels_of()[:5], grid=grid)


@pytest.mark.parametrize("fractional", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_contours_are_closed_and_do_not_cross_themselves(headers, seed, fractional):
    """Of random masks with many holes, corners that touch and marks along every side."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=SHAPE), (0, 1, 1))
    labels = (noise > noise.std() * (0.2 * seed - 0.3)).astype(np.uint8)
    labels[noise < -noise.std()] = 2
    labels[4:] = 0
    fractions = np.where([labels == 1, labels == 2], rng.integers(128, 256, SHAPE), 0) if fractional else None
    given = {} if fractions is None else {"fractions": fractions.astype(np.uint8)}
    separate = read_again(made(headers, labels, holes="separate", **given))
    joined = read_again(made(headers, labels, **given))
    regions: dict[tuple[int, str], list] = {}
    for number, image, points in lines_of(separate):
        assert len(points) >= 3
        assert LinearRing(points).is_simple
        regions.setdefault((number, image), []).append(Polygon(points))
    left = {key: reduce(symmetric_difference, polygons) for key, polygons in regions.items()}
    for number, image, points in lines_of(joined):
        assert not crossings(points)
        left[number, image] = symmetric_difference(left[number, image], make_valid(Polygon(points)))
    assert max(region.area for region in left.values()) < 0.05, "square millimetres: rounding along the lines"
    if not fractional:
        for structures in (separate, joined):
            for number, mask in masks_by_slice(structures, headers).items():
                assert np.array_equal(mask, labels == number)


def lines_of(structures):
    for roi in structures.ROIContourSequence:
        for contour in roi.ContourSequence:
            image = contour.ContourImageSequence[0].ReferencedSOPInstanceUID
            yield int(roi.ReferencedROINumber), image, points_of_contour(contour)[:, :2]


def crossings(points: np.ndarray) -> int:
    """Pairs of sides that cross in a point inside both by more than the file's precision."""
    first, second = points, np.roll(points, -1, axis=0)

    def side_of(a, b, c):
        length = np.linalg.norm(b - a, axis=-1)
        cross = (b - a)[..., 0] * (c - a)[..., 1] - (b - a)[..., 1] * (c - a)[..., 0]
        apart = cross / length
        return np.sign(np.where(np.abs(apart) < 0.003, 0, apart))

    a, b, c, d = first[:, None], second[:, None], first[None], second[None]
    crossed = (side_of(a, b, c) * side_of(a, b, d) < 0) & (side_of(c, d, a) * side_of(c, d, b) < 0)
    return int(crossed.sum())


def test_a_hole_is_a_channel_or_a_contour_of_its_own(headers):
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 10:30, 10:30] = 1
    labels[3, 15:20, 14:18] = labels[3, 15:20, 20:24] = 0
    areas = {}
    for holes in ("keyhole", "separate", "xor"):
        structures = read_again(made(headers, labels, holes=holes))
        contours = structures.ROIContourSequence[0].ContourSequence
        areas[holes] = [abs(area_of(points_of_contour(contour))) for contour in contours]
        kind = "CLOSEDPLANAR_XOR" if holes == "xor" else "CLOSED_PLANAR"
        assert {contour.ContourGeometricType for contour in contours} == {kind}
        assert [int(contour.ContourNumber) for contour in contours] == list(range(1, len(contours) + 1))
    assert len(areas["keyhole"]) == 1
    assert len(areas["separate"]) == len(areas["xor"]) == 3
    outer, *inner = areas["separate"]
    assert areas["keyhole"][0] == pytest.approx(outer - sum(inner), abs=0.01)
    plain = read_again(made(headers, np.where(np.arange(60)[:, None] < 14, labels, 0).astype(np.uint8), holes="xor"))
    assert plain.ROIContourSequence[0].ContourSequence[0].ContourGeometricType == "CLOSED_PLANAR"


def area_of(points: np.ndarray) -> float:
    x, y = points[:, 0], points[:, 1]
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def test_probabilities_place_contours_between_pixels(headers):
    """A side at 0.75 of the way from a marked pixel of 255 to an unmarked one of 85: half lies there."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[5, 10:20, 10:20] = 1
    fractions = np.where(labels == 1, 255, 0)[None].astype(np.uint8)
    fractions[0, 5, 10:20, 20] = 85
    one = replace(SPEC, segments=SEGMENTS[:1])
    on_mask, on_fractions = (
        points_of_contour(read_again(made(headers, labels, spec=one, **given)).ROIContourSequence[0].ContourSequence[0])
        for given in ({}, {"fractions": fractions})
    )
    right = PLACEMENTS["axial"][0, 3] + 0.9 * np.array([19.5, 19.75])
    assert on_mask[:, 0].max() == pytest.approx(right[0], abs=0.001)
    assert on_fractions[:, 0].max() == pytest.approx(right[1], abs=0.001)


def test_names_codes_and_colours_are_the_bundles(headers):
    structures = read_again(made(headers))
    rois = structures.StructureSetROISequence
    assert [(int(roi.ROINumber), roi.ROIName) for roi in rois] == [(1, "Mass"), (2, "Shell")]
    assert {roi.ROIGenerationAlgorithm for roi in rois} == {"AUTOMATIC"}
    assert {roi.ReferencedFrameOfReferenceUID for roi in rois} == {headers[0].FrameOfReferenceUID}
    for item, segment in zip(structures.RTROIObservationsSequence, SEGMENTS, strict=True):
        kind = item.RTROIIdentificationCodeSequence[0]
        assert kind.CodeValue == segment.type.value
        assert item.SegmentedPropertyCategoryCodeSequence[0].CodeValue == segment.category.value
        codes = [each.CodeValue for each in kind.get("SegmentedPropertyTypeModifierCodeSequence", [])]
        assert codes == [code.value for code in (segment.side, *segment.anatomy) if code]
    assert [item.RTROIInterpretedType for item in structures.RTROIObservationsSequence] == ["", "ORGAN"]
    assert list(structures.ROIContourSequence[0].ROIDisplayColor) == [214, 39, 40]
    assert "ROIDisplayColor" not in structures.ROIContourSequence[1]


def test_it_says_what_it_is_and_what_it_comes_from(headers):
    structures = read_again(made(headers, remark="3 findings below 0.05 ml have no contours."))
    assert structures.StructureSetLabel == "RESEARCH ONLY"
    assert structures.StructureSetDescription.startswith(RESEARCH_ONLY)
    assert structures.StructureSetDescription.endswith("3 findings below 0.05 ml have no contours.")
    assert structures.ApprovalStatus == "UNAPPROVED"
    clinical = read_again(made(headers, spec=replace(SPEC, demonstration=False)))
    assert clinical.StructureSetLabel == "lung_tumour"
    said = clinical.StructureSetLabel + clinical.StructureSetDescription + clinical.SeriesDescription
    assert "RESEARCH ONLY" not in said
    (frame,) = structures.ReferencedFrameOfReferenceSequence
    (study,) = frame.RTReferencedStudySequence
    (series,) = study.RTReferencedSeriesSequence
    assert frame.FrameOfReferenceUID == headers[0].FrameOfReferenceUID
    assert study.ReferencedSOPInstanceUID == structures.StudyInstanceUID == headers[0].StudyInstanceUID
    assert series.SeriesInstanceUID == headers[0].SeriesInstanceUID
    references = [item.ReferencedSOPInstanceUID for item in series.ContourImageSequence]
    assert references == [header.SOPInstanceUID for header in headers]


def test_an_empty_mask_is_valid_and_says_so(headers, tmp_path):
    path = tmp_path / "structures.dcm"
    write_dataset(made(headers, np.zeros(SHAPE, np.uint8)), path)
    assert dciodvfy_errors(path) == []
    structures = pydicom.dcmread(path)
    assert NOTHING_MARKED in structures.StructureSetDescription
    assert [roi.ROIName for roi in structures.StructureSetROISequence] == ["Mass", "Shell"]
    assert not any("ContourSequence" in roi for roi in structures.ROIContourSequence)


def test_the_same_mask_is_the_same_file_and_other_content_another_uid(headers):
    assert as_bytes(made(headers)) == as_bytes(made(headers))
    labels = labels_of()
    smaller = np.where(np.arange(len(labels))[:, None, None] == 8, 0, labels)
    renamed = replace(SPEC, segments=(replace(SEGMENTS[0], label="Tumour"), SEGMENTS[1]))
    others = [
        made(headers),
        made(headers, smaller),
        made(headers, spec=renamed),
        made(headers, fractions=fractions_of(labels)),
        made(headers, holes="xor"),
        made(headers, holes="separate"),
        made(headers, remark="other"),
    ]
    assert len({each.SOPInstanceUID for each in others}) == len(others)
    assert len({each.SeriesInstanceUID for each in others}) == len(others)
    seg = segmentation_from_labels(labels, headers, SPEC, MADE_BY)
    assert others[0].SeriesInstanceUID != seg.SeriesInstanceUID
    assert others[0].SeriesNumber == seg.SeriesNumber + 3
    assert (others[0].StructureSetDate, others[0].StructureSetTime) == (seg.ContentDate, seg.ContentTime)
    for keyword in ("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyID", "AccessionNumber"):
        assert others[0][keyword].value == seg[keyword].value
    assert not [element for element in others[0] if "InstanceCreation" in element.keyword], "of the clock"


@pytest.mark.parametrize(("charset", "name"), NAMES)
def test_names_in_other_scripts_keep_their_bytes(write, tmp_path, charset, name):
    folder = write(volume_on(PLACEMENTS["axial"]), adjust=setter(SpecificCharacterSet=charset, PatientName=name))
    write_dataset(made(headers_in(folder)), tmp_path / "structures.dcm")
    result = pydicom.dcmread(tmp_path / "structures.dcm")
    source = pydicom.dcmread(next(folder.glob("*.dcm")))
    assert result.get_item("PatientName").value.strip() == source.get_item("PatientName").value.strip()


def test_points_of_any_number_fit(headers, tmp_path):
    """A comb whose outline has more text than an element of Explicit VR holds."""
    labels = np.zeros((24, 60, 50), np.uint8)
    labels[4] = np.indices((60, 50)).sum(axis=0) % 2
    labels[4, ::2] = 1
    write_dataset(made(headers, labels), tmp_path / "structures.dcm")
    structures = pydicom.dcmread(tmp_path / "structures.dcm")
    longest = max(len(contour.ContourData) for contour in structures.ROIContourSequence[0].ContourSequence)
    assert longest * len("-10.123\\") > 2**16, "the test draws too little"
    assert np.array_equal(masks_by_slice(structures, headers)[1], labels == 1)


def test_labels_that_do_not_suit_are_a_programming_mistake(headers):
    with pytest.raises(ValueError, match="do not lie on 24 planes"):
        made(headers, labels_of()[:5])
    with pytest.raises(ValueError, match="have no segment"):
        made(headers, labels_of(), spec=replace(SPEC, segments=SEGMENTS[:1]))
    with pytest.raises(ValueError, match="in order"):
        made(headers[::-1])
