"""RT Structure Sets, of ctflow and of others, become the masks that they say."""

from __future__ import annotations

import subprocess

import numpy as np
import pydicom
import pytest
import SimpleITK as itk
from pydicom.dataset import Dataset
from pydicom.tag import Tag
from pydicom.uid import ExplicitVRLittleEndian

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.dicom.read import filled as read_filled
from ctflow.dicom.read import structure_set
from ctflow.dicom.read.structure_set import read_structure_set
from ctflow.dicom.read.truth import read_truth
from ctflow.dicom.write.derived import write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.dicom.write.structure_set import structure_set_from_labels
from dicom_support import assembled
from reasons import raises_reason
from structure_support import (
    MADE_BY,
    MOVES,
    PLACEMENTS,
    SHAPE,
    SPACING,
    SPEC,
    dice,
    fractions_of,
    labels_of,
    needs_plastimatch,
    points_by_dcmrtstruct2nii,
    points_by_plastimatch,
    volume_on,
)
from tests_support import BIN

BOTH = ("Mass", "Shell")
MIDDLE = 10  # the slice in which contours are drawn by hand
_, BETWEEN_ROWS, BETWEEN_COLUMNS = SPACING


def headers_in(folder):
    return [instance.header for instance in assembled(folder).instances]


@pytest.fixture
def ct(write):
    return write(volume_on(PLACEMENTS["axial"]))


@pytest.fixture
def headers(ct):
    return headers_in(ct)


def overlap(a, b) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


@pytest.mark.parametrize("holes", ["keyhole", "separate", "xor"])
@pytest.mark.parametrize("place", [*PLACEMENTS, "tilted", "uneven", "both"])
def test_what_ctflow_wrote_is_read_again(write, tmp_path, place, holes):
    folder = write(volume_on(PLACEMENTS.get(place, PLACEMENTS["axial"])), adjust=MOVES.get(place))
    headers, labels = headers_in(folder), labels_of()
    write_dataset(structure_set_from_labels(labels, headers, SPEC, MADE_BY, holes=holes), tmp_path / "truth.dcm")
    found = read_structure_set(tmp_path / "truth.dcm", headers, BOTH)
    assert np.array_equal(found.labels, labels)
    assert found.warnings == ()


def test_contours_by_probabilities_mark_almost_the_same_pixels(headers, tmp_path):
    labels = labels_of()
    structures = structure_set_from_labels(labels, headers, SPEC, MADE_BY, fractions=fractions_of(labels))
    write_dataset(structures, tmp_path / "truth.dcm")
    found = read_structure_set(tmp_path / "truth.dcm", headers, BOTH).labels
    for number in (1, 2):
        assert overlap(found == number, labels == number) >= 0.99


@needs_plastimatch
@pytest.mark.parametrize("place", PLACEMENTS)
def test_what_plastimatch_wrote_is_read(write, tmp_path, place):
    """It draws contours of its own, with holes as separate ones. (It draws none along the volume's sides.)"""
    folder, labels = write(volume_on(PLACEMENTS[place])), (labels_of() == 2).astype(np.uint8)
    loaded = assembled(folder)
    geometry = loaded.volume.geometry
    image = itk.GetImageFromArray(labels)
    image.SetSpacing(geometry.spacing_mm[::-1])
    image.SetOrigin(geometry.affine_mm[:3, 3].tolist())
    image.SetDirection(geometry.directions[:, ::-1].ravel().tolist())
    itk.WriteImage(image, str(tmp_path / "labels.mha"))
    words = ["--input-ss-img", tmp_path / "labels.mha", "--referenced-ct", folder, "--output-dicom", tmp_path / "out"]
    subprocess.run([BIN / "plastimatch", "convert", *words], check=True, capture_output=True)
    (path,) = (tmp_path / "out").glob("rtss*.dcm")
    found = read_structure_set(path, [instance.header for instance in loaded.instances]).labels
    assert np.array_equal(found, labels)


def circle(row, column, radius, count=90):
    """(n, 2) row and column of points around a circle of pixels."""
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.column_stack([row + radius * np.sin(angle), column + radius * np.cos(angle)])


def box(top, left, bottom, right):
    return np.array([(top, left), (top, right), (bottom, right), (bottom, left)], float)


def inside(row, column, radius):
    rows, columns = np.indices(SHAPE[1:])
    return (rows - row) ** 2 + (columns - column) ** 2 < radius**2


def contour_of(header, line, kind="CLOSED_PLANAR", image=True) -> Dataset:
    """A contour as other systems write it."""
    origin = np.array(header.ImagePositionPatient, float)
    across, down = np.array(header.ImageOrientationPatient, float).reshape(2, 3)
    points = origin + line[:, :1] * BETWEEN_ROWS * down + line[:, 1:] * BETWEEN_COLUMNS * across
    item = Dataset()
    if image:
        item.ContourImageSequence = [Dataset()]
        item.ContourImageSequence[0].ReferencedSOPClassUID = header.SOPClassUID
        item.ContourImageSequence[0].ReferencedSOPInstanceUID = header.SOPInstanceUID
    item.ContourGeometricType, item.NumberOfContourPoints = kind, len(points)
    item.ContourData = [f"{value:.4f}" for value in points.ravel()]
    return item


@pytest.fixture
def drawn(headers, tmp_path):
    """Writes a structure set of regions by name, each with contours; returns its path."""

    def make(regions, change=None):
        dataset = structure_set_from_labels(np.zeros(SHAPE, np.uint8), headers, SPEC, MADE_BY)
        frame = headers[0].FrameOfReferenceUID
        dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
        for number, (name, contours) in enumerate(regions.items(), start=7):
            roi, drawing = Dataset(), Dataset()
            roi.ROINumber = drawing.ReferencedROINumber = number
            roi.ROIName, roi.ReferencedFrameOfReferenceUID, roi.ROIGenerationAlgorithm = name, frame, "MANUAL"
            drawing.ContourSequence = contours
            dataset.StructureSetROISequence.append(roi)
            dataset.ROIContourSequence.append(drawing)
        del dataset.RTROIObservationsSequence
        if change:
            change(dataset)
        write_dataset(dataset, tmp_path / "drawn.dcm")
        return tmp_path / "drawn.dcm"

    return make


def mask_in(path, headers, rois=()):
    """The mask in the slice of contours drawn by hand; every other is empty."""
    labels = read_structure_set(path, headers, rois).labels
    assert not np.delete(labels, MIDDLE, axis=0).any()
    return labels[MIDDLE] > 0


@needs_plastimatch
def test_drawn_contours_are_the_masks_of_two_other_readers(ct, headers, drawn, tmp_path, monkeypatch):
    """Two circles a slice, of which one has a hole by keyhole; many slices, so that 1 ml is passed by far."""
    hole = circle(40, 25, 5)[::-1]
    outer = circle(40, 25, 12)
    joined = np.concatenate([outer, outer[:1], hole[-1:], hole])  # from the point furthest along the row, and back
    mass = [contour_of(header, circle(18.3, 20.6, 9.2)) for header in headers[4:16]]
    mass += [contour_of(header, circle(18.3, 40.1, 6.7)) for header in headers[4:16]]
    shell = [contour_of(header, joined) for header in headers[5:14]]
    path = drawn({"Mass": mass, "Shell": shell})
    ours = read_structure_set(path, headers, BOTH).labels
    geometry = assembled(ct).volume.geometry
    for found in (
        points_by_plastimatch(path, ct, tmp_path / "plastimatch"),
        points_by_dcmrtstruct2nii(path, ct, tmp_path / "other", monkeypatch),
    ):
        for number, name in enumerate(BOTH, start=1):
            assert dice(geometry.world_from_index(np.argwhere(ours == number)), found[name]) >= 0.99, name


def test_holes_are_of_three_kinds(headers, drawn, ct, tmp_path, monkeypatch):
    at = headers[MIDDLE]
    ring = inside(30, 25, 15) & ~inside(30, 25, 8) | inside(30, 25, 4)
    lines = [circle(30, 25, 4), circle(30, 25, 15), circle(30, 25, 8)]  # an island in a hole; in any order
    for kind in ("CLOSED_PLANAR", "CLOSEDPLANAR_XOR"):
        mask = mask_in(drawn({"A": [contour_of(at, line, kind) for line in lines]}), headers)
        assert overlap(mask, ring) > 0.98
    apart = [contour_of(header, line) for header in headers[8:13] for line in lines]
    path = drawn({"A": apart})
    ours = assembled(ct).volume.geometry.world_from_index(np.argwhere(read_structure_set(path, headers).labels))
    theirs = points_by_dcmrtstruct2nii(path, ct, tmp_path / "other", monkeypatch)["A"]
    assert dice(ours, theirs) >= 0.98, "scikit-image marks centres on the line, too"


def test_a_keyhole_on_pixel_centres_marks_neither_row(headers, drawn):
    line = np.array(
        [(5, 5), (5, 20), (20, 20), (20, 5), (12, 5), (12, 9), (15, 9), (15, 14), (9, 14), (9, 9), (12, 9), (12, 5)]
    )
    expected = np.zeros(SHAPE[1:], bool)
    expected[5:20, 5:20] = True
    expected[9:15, 9:14] = False
    assert np.array_equal(mask_in(drawn({"A": [contour_of(headers[MIDDLE], line.astype(float))]}), headers), expected)


def test_contours_that_overlap_or_repeat_add_up(headers, drawn):
    at = headers[MIDDLE]
    first, second = circle(25, 20, 8), circle(25, 28, 8)
    mask = mask_in(drawn({"A": [contour_of(at, line) for line in (first, second, first, first[::-1])]}), headers)
    assert overlap(mask, inside(25, 20, 8) | inside(25, 28, 8)) > 0.98


def test_a_contour_may_lead_out_of_the_image(headers, drawn):
    mask = mask_in(drawn({"A": [contour_of(headers[MIDDLE], circle(2, 3, 12))]}), headers)
    assert overlap(mask, inside(2, 3, 12)) > 0.98
    mask = mask_in(drawn({"A": [contour_of(headers[MIDDLE], box(-1e7, -1e7, 1e7, 24.5))]}), headers)
    assert np.array_equal(mask, np.indices(SHAPE[1:])[1] < 25)


def test_numbers_may_have_blanks(headers, drawn):
    def spaced(dataset):
        for item in dataset.ROIContourSequence[0].ContourSequence:
            text = " \\ ".join(f" {value} " for value in item.ContourData) + "\\"
            item._dict[Tag("ContourData")] = pydicom.DataElement("ContourData", "LO", text, already_converted=True)
        dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian

    lines = {"A": [contour_of(headers[MIDDLE], circle(25, 20, 8))]}
    assert np.array_equal(mask_in(drawn(lines, spaced), headers), mask_in(drawn(lines), headers))


def test_without_a_reference_to_an_image_the_place_decides(headers, drawn):
    path = drawn({"A": [contour_of(headers[MIDDLE], circle(25, 20, 8), image=False)]})
    assert overlap(mask_in(path, headers), inside(25, 20, 8)) > 0.98


def test_what_encloses_nothing_is_left_out_with_a_warning(headers, drawn):
    at, line = headers[MIDDLE], circle(25, 20, 8)
    open_ones = [contour_of(at, line[:1], "POINT"), contour_of(at, line, "OPEN_PLANAR"), contour_of(at, line[:2])]
    found = read_structure_set(
        drawn({"A": [*open_ones, contour_of(at, line[:2], "OPEN_PLANAR"), contour_of(at, line, "MARKER")]}), headers
    )
    assert not found.labels.any()
    kinds = {"fewer than three points": 1, "type OPEN_PLANAR": 2, "type POINT": 1, "type unknown": 1}
    assert list(found.warnings) == [
        f"contours of {kind}, which enclose nothing, are left out: {count}" for kind, count in kinds.items()
    ]


def test_regions_are_chosen_by_name(headers, drawn):
    at = headers[MIDDLE]
    path = drawn(
        {
            "BODY": [contour_of(at, circle(30, 25, 22))],
            "GTV-1": [contour_of(at, circle(20, 20, 5))],
            "gtv-2 ": [contour_of(at, circle(40, 30, 4))],
            "PTV": [contour_of(at, circle(20, 20, 8))],
            "empty": [],
        }
    )
    gtvs = inside(20, 20, 5) | inside(40, 30, 4)
    assert overlap(mask_in(path, headers, ["GTV*"]), gtvs) > 0.97
    labels = read_structure_set(path, headers, ["gtv-2", "GTV-?"]).labels[MIDDLE]
    assert overlap(labels == 1, inside(40, 30, 4)) > 0.97
    assert overlap(labels == 2, inside(20, 20, 5)) > 0.97
    assert overlap(mask_in(path, headers, ["ptv", "gtv-2"]), inside(20, 20, 8) | inside(40, 30, 4)) > 0.97
    with raises_reason(UnsupportedPixels, "several-regions", names=("drawn.dcm", "4", "--truth-roi")):
        read_structure_set(path, headers)
    with raises_reason(UnsupportedPixels, "no-region", names=("drawn.dcm", "CTV")):
        read_structure_set(path, headers, ["CTV"])
    with raises_reason(UnsupportedPixels, "no-region", names="empty"):
        read_structure_set(path, headers, ["empty"])
    with raises_reason(UnsupportedPixels, "regions-overlap", names="drawn.dcm"):
        read_structure_set(path, headers, ["PTV", "GTV-1"])


def shifted(contour, offset_mm):
    points = np.array(contour.ContourData, float).reshape(-1, 3) + offset_mm
    contour.ContourData = [f"{value:.4f}" for value in points.ravel()]
    return contour


def test_a_contour_belongs_to_the_slice_that_it_lies_in(headers, drawn):
    at = headers[MIDDLE]
    near = shifted(contour_of(at, circle(25, 20, 8)), (0, 0, 0.2))
    assert overlap(mask_in(drawn({"A": [near]}), headers), inside(25, 20, 8)) > 0.98
    tipped = contour_of(at, circle(25, 20, 8))
    points = np.array(tipped.ContourData, float).reshape(-1, 3)
    points[:, 2] += 0.3 * (points[:, 0] - points[:, 0].mean())
    tipped.ContourData = [f"{value:.4f}" for value in points.ravel()]
    beyond = shifted(contour_of(headers[-1], circle(25, 20, 8)), (0, 0, 2.5))
    for wrong in (shifted(contour_of(at, circle(25, 20, 8)), (0, 0, 1.2)), tipped, beyond):
        with raises_reason(UnsupportedPixels, "between-slices", names="drawn.dcm"):
            read_structure_set(drawn({"A": [wrong]}), headers)


def test_contours_of_a_coarser_series_would_leave_slices_out(headers, drawn):
    path = drawn({"A": [contour_of(header, circle(25, 20, 8)) for header in headers[2:12:2]]})
    with raises_reason(UnsupportedPixels, "between-slices", names=("drawn.dcm", "one of 2 slices")):
        read_structure_set(path, headers)
    some = drawn({"A": [contour_of(headers[index], circle(25, 20, 8)) for index in (2, 3, 7, 11)]})
    assert read_structure_set(some, headers).labels.any(axis=(1, 2)).sum() == 4, "several lesions"


def test_the_place_of_a_contour_counts_and_a_reference_that_contradicts_it_is_told(headers, drawn):
    contour = contour_of(headers[MIDDLE], circle(25, 20, 8))
    contour.ContourImageSequence[0].ReferencedSOPInstanceUID = headers[3].SOPInstanceUID
    found = read_structure_set(drawn({"A": [contour]}), headers)
    assert found.labels.any(axis=(1, 2)).tolist() == [index == MIDDLE for index in range(len(headers))]
    assert found.warnings == ("contours that refer to an image of another slice; their place counts: 1",)


def test_it_must_be_of_the_series_or_at_least_of_its_frame_of_reference(headers, drawn):
    def frames(uid):
        def change(dataset):
            dataset.StructureSetROISequence[0].ReferencedFrameOfReferenceUID = uid
            if not uid:
                del dataset.FrameOfReferenceUID
                dataset.ReferencedFrameOfReferenceSequence = []

        return change

    own = contour_of(headers[MIDDLE], circle(25, 20, 8))
    with raises_reason(UnsupportedPixels, "other-series", names="drawn.dcm"):
        read_structure_set(drawn({"A": [own]}, frames("1.2.3")), headers)
    assert mask_in(drawn({"A": [own]}, frames("")), headers).any()
    nowhere = contour_of(headers[MIDDLE], circle(25, 20, 8), image=False)
    foreign = contour_of(headers[MIDDLE], circle(25, 20, 8))
    foreign.ContourImageSequence[0].ReferencedSOPInstanceUID = "1.2.3.4"
    for contour in (nowhere, foreign):
        with raises_reason(UnsupportedPixels, "other-series", names="drawn.dcm"):
            read_structure_set(drawn({"A": [contour]}, frames("")), headers)
    found = read_structure_set(drawn({"A": [foreign]}), headers)
    assert overlap(found.labels[MIDDLE] > 0, inside(25, 20, 8)) > 0.98
    assert found.warnings == ("contours that refer to an image of another series; their place counts: 1",)


@pytest.mark.parametrize("data", ["1 2", "1 x 3", "1 inf 3", "1 nan 3", "1 1e307 3"])
def test_damaged_points_are_rejected(headers, drawn, data):
    contour = contour_of(headers[MIDDLE], circle(25, 20, 8))
    text = "\\".join(data.split())
    contour._dict[Tag("ContourData")] = pydicom.DataElement("ContourData", "DS", text, already_converted=True)
    with raises_reason(BrokenSeries, "unreadable", names="drawn.dcm"):
        read_structure_set(drawn({"A": [contour]}), headers)


def test_contours_that_are_no_items_are_damage(headers, drawn):
    path = drawn({"A": [contour_of(headers[MIDDLE], circle(25, 20, 8))]})
    dataset = pydicom.dcmread(path)
    text = pydicom.DataElement("ContourSequence", "LO", "text", already_converted=True)
    dataset.ROIContourSequence[0]._dict[Tag("ContourSequence")] = text
    dataset.save_as(path)
    with raises_reason(BrokenSeries, "unreadable", names="drawn.dcm"):
        read_structure_set(path, headers)


def test_more_contours_than_anybody_draws_are_rejected_before_they_take_the_memory(headers, drawn, monkeypatch):
    monkeypatch.setattr(structure_set, "_MOST_LINES", 3)
    path = drawn({"A": [contour_of(headers[MIDDLE], circle(25, 20, radius)) for radius in (3, 5, 7, 9)]})
    with raises_reason(BrokenSeries, "unreadable", names="drawn.dcm: more than 3 contours on one slice"):
        read_structure_set(path, headers)


def test_a_file_is_read_by_what_it_is(headers, drawn, tmp_path):
    path = drawn({"A": [contour_of(headers[MIDDLE], circle(25, 20, 8))]})
    assert read_truth(path, headers).labels.any()
    labels = labels_of()
    write_dataset(segmentation_from_labels(labels, headers, SPEC, MADE_BY), tmp_path / "seg.dcm")
    assert np.array_equal(read_truth(tmp_path / "seg.dcm", headers, ["of no SEG"]).labels, labels)
    (tmp_path / "other.dcm").write_bytes(b"")
    for name in ("other.dcm", "absent.dcm"):
        with raises_reason(BrokenSeries, "unreadable", names=name):
            read_truth(tmp_path / name, headers)
        with raises_reason(BrokenSeries, "unreadable", names=name):
            read_structure_set(tmp_path / name, headers)


def test_nothing_drawn_is_an_empty_truth(headers, drawn):
    assert not read_structure_set(drawn({"A": []}), headers).labels.any()
    assert not read_structure_set(drawn({}), headers).labels.any()


def test_damage_anywhere_is_a_named_error_or_harmless(headers, tmp_path):
    write_dataset(structure_set_from_labels(labels_of(), headers, SPEC, MADE_BY), tmp_path / "truth.dcm")
    whole, random = (tmp_path / "truth.dcm").read_bytes(), np.random.default_rng(0)
    reasons = set()
    for number in range(60):
        content, at = bytearray(whole), int(random.integers(300, len(whole)))
        if number % 3 == 0:
            del content[at:]
        elif number % 3 == 1:
            content[at : at + 4] = random.bytes(4)
        else:
            content[at:at] = random.bytes(10)
        (tmp_path / "damaged.dcm").write_bytes(content)
        try:
            found = read_structure_set(tmp_path / "damaged.dcm", headers, BOTH).labels
            assert found.shape == SHAPE
        except (BrokenSeries, UnsupportedPixels) as error:
            reasons.add(error.reason)
    assert {"unreadable", "no-region"} <= reasons


def test_a_line_of_any_number_of_points_crosses_rows_a_few_at_a_time(monkeypatch):
    line, shape = circle(30, 25, 20, count=1000), SHAPE[1:]
    at_once = read_filled.filled(line, shape)
    monkeypatch.setattr(read_filled, "_SIDES_AT_ONCE", 7)
    assert np.array_equal(read_filled.filled(line, shape), at_once)
    assert overlap(at_once, inside(30, 25, 20)) > 0.99
    assert not read_filled.filled(line + 1000, shape).any(), "beyond the image"
