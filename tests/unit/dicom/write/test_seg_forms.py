"""Every form of a SEG says the same mask to every reader."""

from __future__ import annotations

import io
from dataclasses import replace

import highdicom as hd
import numpy as np
import pydicom
import pytest

from ctflow.core.model import Code, Segment
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.write import segmentation
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.measurement_report import report_from_measurements
from ctflow.dicom.write.segmentation import SegForm, segmentation_from_labels
from ctflow.dicom.write.source import sources_from_headers
from ctflow.measurements.measure import measure_segments, split_findings
from dicom_support import assembled, axes, small_volume, spec_of
from tests_support import (
    assert_same_points,
    dciodvfy_errors,
    report_by_dcmqi,
    segment_points_by_dcmqi,
    segments_by_dcmqi,
)

ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
ORGAN = Code("123037004", "SCT", "Anatomical Structure")
LUNG = Code("39607008", "SCT", "Lung")
MASS = Code("4147007", "SCT", "Mass")
SEGMENTS = (
    Segment(
        1, "Mass", Code("49755003", "SCT", "Morphologically Abnormal Structure"), MASS, (LUNG,), colour=(214, 39, 40)
    ),
    Segment(2, "Lung", ORGAN, LUNG, colour=(31, 119, 180)),
)
SPEC = spec_of(SEGMENTS, name="m", version="1")
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager"})
KINDS = ("binary", "labelmap", "fractional")


def labels_of() -> np.ndarray:
    """Lopsided; two masses and a lung; slices without a mark before, between and behind."""
    labels = np.zeros((16, 12, 10), np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    labels[12, 10, 7:9] = 1
    labels[9:12, 7:9, 3:5] = 2
    return labels


def fractions_of(labels: np.ndarray) -> np.ndarray:
    """Of each segment 200/255 inside, 50 in the rest of its slices."""
    fractions = np.stack([np.where(labels == number, 200, 0) for number in (1, 2)]).astype(np.uint8)
    for fraction in fractions:
        fraction[(fraction == 0) & fraction.any(axis=(1, 2))[:, None, None] & (labels == 0)] = 50
    return fractions


@pytest.fixture
def headers(write):
    return [instance.header for instance in assembled(write()).instances]


def made(headers, form: SegForm, labels=None, spec=SPEC):
    labels = labels_of() if labels is None else labels
    fractions = fractions_of(labels) if form.kind == "fractional" else None
    return segmentation_from_labels(labels, headers, spec, MADE_BY, form=form, fractions=fractions)


@pytest.mark.parametrize("omit", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ctflow_and_highdicom_read_the_mask(headers, tmp_path, kind, omit):
    path = tmp_path / "seg.dcm"
    write_dataset(made(headers, SegForm(kind, omit_empty_frames=omit)), path)
    assert dciodvfy_errors(path) == []
    seg = hd.seg.segread(path)
    assert seg.SegmentationType == kind.upper()
    assert np.array_equal(read_segmentation(path, headers), labels_of())
    uids = [header.SOPInstanceUID for header in headers]
    pixels = seg.get_pixels_by_source_instance(uids, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0] > 0.5, labels_of() == 1)
    assert np.array_equal(pixels[..., 1] > 0.5, labels_of() == 2)
    marked = np.flatnonzero(labels_of().any(axis=(1, 2)))
    whole = len(headers) * (1 if kind == "labelmap" else 2)
    assert int(seg.NumberOfFrames) == (whole if not omit else len(marked))


@pytest.mark.parametrize("omit", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_dcmqi_reads_the_mask(write, tmp_path, kind, omit):
    loaded = assembled(write())
    path = tmp_path / "seg.dcm"
    write_dataset(made([instance.header for instance in loaded.instances], SegForm(kind, omit_empty_frames=omit)), path)
    meta, _ = segments_by_dcmqi(path)
    found = {segment["SegmentLabel"] for group in meta["segmentAttributes"] for segment in group}
    assert found == {"Mass", "Lung"}
    ours = loaded.volume.geometry.world_from_index(np.argwhere(labels_of()))
    assert_same_points(ours, segment_points_by_dcmqi(path, least=128 if kind == "fractional" else 1))


def test_a_fraction_is_stored_to_the_255th(headers, tmp_path):
    labels = labels_of()
    fractions = np.random.default_rng(0).integers(0, 256, (2, *labels.shape)).astype(np.uint8)
    seg = segmentation_from_labels(labels, headers, SPEC, MADE_BY, form=SegForm("fractional"), fractions=fractions)
    write_dataset(seg, tmp_path / "seg.dcm")
    read = hd.seg.segread(tmp_path / "seg.dcm")
    assert (read.SegmentationFractionalType, read.MaximumFractionalValue) == ("PROBABILITY", 255)
    uids = [header.SOPInstanceUID for header in headers]
    pixels = read.get_pixels_by_source_instance(uids, rescale_fractional=False)
    assert np.array_equal(np.moveaxis(pixels, -1, 0), fractions)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_mask_is_valid_in_every_form(headers, tmp_path, kind):
    seg = made(headers, SegForm(kind), np.zeros((16, 12, 10), np.uint8))
    write_dataset(seg, tmp_path / "seg.dcm")
    assert dciodvfy_errors(tmp_path / "seg.dcm") == []
    assert "not excluded" in seg.ContentDescription
    assert not read_segmentation(tmp_path / "seg.dcm", headers).any()


def test_codes_and_colours_are_the_bundles(headers, tmp_path):
    for kind in KINDS:
        write_dataset(made(headers, SegForm(kind)), tmp_path / "seg.dcm")
        for item, segment in zip(pydicom.dcmread(tmp_path / "seg.dcm").SegmentSequence[-2:], SEGMENTS, strict=True):
            assert item.SegmentedPropertyTypeCodeSequence[0].CodeValue == segment.type.value
            assert item.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == segment.category.meaning
            colour = hd.color.CIELabColor.from_dicom_value(item.RecommendedDisplayCIELabValue)
            assert np.abs(np.array(colour.to_rgb()) - segment.colour).max() <= 1
    plain = made(headers, SegForm(), spec=replace(SPEC, segments=tuple(replace(s, colour=None) for s in SEGMENTS)))
    assert all("RecommendedDisplayCIELabValue" not in item for item in plain.SegmentSequence)


def test_another_form_is_another_object_of_another_series(headers):
    forms = [SegForm(kind, omit_empty_frames=omit) for kind in KINDS for omit in (True, False)]
    split, parts = split_findings(labels_of(), SEGMENTS)
    bare = replace(SPEC, segments=tuple(replace(segment, colour=None) for segment in SEGMENTS))
    segs = [made(headers, form) for form in forms]
    segs += [made(headers, SegForm(), split, replace(SPEC, segments=parts)), made(headers, SegForm(), spec=bare)]
    assert len({seg.SOPInstanceUID for seg in segs}) == len(segs)
    assert len({seg.SeriesInstanceUID for seg in segs}) == len(segs)
    assert made(headers, forms[3]).to_json() == segs[3].to_json()


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_a_finding_has_its_segment_and_the_report_names_it(write, tmp_path, kind):
    loaded = assembled(write(small_volume()))
    headers = [instance.header for instance in loaded.instances]
    split, parts = split_findings(labels_of(), SEGMENTS)
    seg = made(headers, SegForm(kind), split, replace(SPEC, segments=parts))
    measured = measure_segments(labels_of(), loaded.volume, SEGMENTS)
    report = report_from_measurements(measured, seg, headers, SPEC, MADE_BY, marked_as=parts)
    for name, dataset in (("seg.dcm", seg), ("sr.dcm", report)):
        write_dataset(dataset, tmp_path / name)
    assert dciodvfy_errors(tmp_path / "seg.dcm") == []
    # This dciodvfy knows Label Map Segmentation as an object, and not yet as what a report refers to.
    unknown = "Shall not be present for Referenced SOP Class that is not segmentation" if kind == "labelmap" else "none"
    assert [line for line in dciodvfy_errors(tmp_path / "sr.dcm") if unknown not in line] == []
    assert np.array_equal(read_segmentation(tmp_path / "seg.dcm", headers), split)
    items = [item for item in seg.SegmentSequence if item.SegmentNumber > 0]  # a label map describes its background
    assert [item.SegmentLabel for item in items] == ["Mass 1", "Mass 2", "Lung 1"]
    groups = report_by_dcmqi(tmp_path / "sr.dcm")["Measurements"]
    assert [group["ReferencedSegment"] for group in groups] == [1, 2, 3]
    for group, item in zip(groups, items, strict=True):
        assert group["TrackingUniqueIdentifier"] == item.TrackingUID
        assert group["TrackingIdentifier"] == item.TrackingID
        volume = int((split == item.SegmentNumber).sum()) * loaded.volume.geometry.voxel_ml * 1000
        assert float(group["measurementItems"][0]["value"]) == pytest.approx(volume, abs=1e-3)
    assert len({item.TrackingUID for item in items}) == 3


@pytest.mark.parametrize(
    ("kind", "fractions"),
    [
        ("fractional", None),
        ("binary", np.zeros((2, 16, 12, 10), np.uint8)),
        ("fractional", np.zeros((1, 16, 12, 10), np.uint8)),
        ("fractional", np.zeros((2, 16, 12, 10), np.float32)),
    ],
)
def test_fractions_that_do_not_suit_are_a_programming_mistake(headers, kind, fractions):
    with pytest.raises(ValueError, match="fractions"):
        segmentation_from_labels(labels_of(), headers, SPEC, MADE_BY, form=SegForm(kind), fractions=fractions)


@pytest.mark.parametrize("spacing", ["given", "absent", "uneven"])
@pytest.mark.parametrize("kind", KINDS)
def test_slices_without_frames_are_not_needed_to_make_them(write, monkeypatch, kind, spacing):
    """highdicom is given the images that get frames; the SEG is the one that it makes when it is given all."""

    def adjust(dataset, index):
        if spacing != "given":
            del dataset.SpacingBetweenSlices
        if spacing == "uneven":
            x, y, z = dataset.ImagePositionPatient
            dataset.ImagePositionPatient = [x, y, z + 0.001 * (index % 2)]
        if index == 0:
            dataset.PositionReferenceIndicator = "XY"

    headers = [instance.header for instance in assembled(write(adjust=adjust)).instances]
    some = made(headers, SegForm(kind))
    assert int(some.NumberOfFrames) < len(headers)
    monkeypatch.setattr("ctflow.dicom.write.segmentation._slices_with_frames", lambda marks, form: None)
    files = []
    for seg in (some, made(headers, SegForm(kind)), made(sources_from_headers(headers), SegForm(kind))):
        stream = io.BytesIO()
        seg.save_as(stream, enforce_file_format=True)
        files.append(stream.getvalue())
    assert files[0] == files[1]
    assert files[0] == files[2]


def files_of_both(monkeypatch, folder, labels, headers, spec, **given):
    """The SEG with our frames and with highdicom's, as bytes."""
    files = []
    for name, own in (("ours", True), ("highdicom", False)):
        monkeypatch.setattr(segmentation, "_is_made_of_planes", lambda *_, own=own: own)
        write_dataset(segmentation_from_labels(labels, headers, spec, MADE_BY, **given), folder / name)
        files.append((folder / name).read_bytes())
    return files


@pytest.mark.parametrize("omit", [True, False])
@pytest.mark.parametrize("on_a_grid", [False, True])
@pytest.mark.parametrize(("shape", "count"), [((7, 3, 3), 1), ((7, 3, 3), 5), ((5, 9, 7), 104), ((4, 8, 8), 300)])
def test_the_frames_of_a_binary_seg_are_those_of_highdicom(write, monkeypatch, tmp_path, shape, count, omit, on_a_grid):
    """Byte for byte: of pixels that do not fill bytes, of slices and segments without marks."""
    rng = np.random.default_rng(count)
    segments = tuple(Segment(n, f"structure {n}", ORGAN, LUNG, (MASS,) if n % 2 else ()) for n in range(1, count + 1))
    labels = np.where(rng.random(shape) < 0.3, rng.integers(0, count + 1, shape), 0).astype(np.uint16)
    labels[shape[0] // 2] = 0
    labels[-1, -1, -1] = count
    loaded = assembled(write(small_volume(shape=shape)))
    headers = [instance.header for instance in loaded.instances]
    given = {"form": SegForm("binary", omit_empty_frames=omit)}
    if on_a_grid:
        given["grid"] = loaded.volume.geometry
    ours, theirs = files_of_both(monkeypatch, tmp_path, labels, headers, spec_of(segments), **given)
    assert ours == theirs


@pytest.mark.parametrize("marked", [(), (3,), (1, 3, 5), (1, 2, 3), (1, 2, 4)])
@pytest.mark.parametrize("uneven_mm", [0, 0.001, 0.4])
def test_the_frames_of_one_segment_are_those_of_highdicom(write, monkeypatch, tmp_path, marked, uneven_mm):
    """Also whether they are called a stack: at equal distances, whichever slices are marked."""

    def adjust(dataset, index):
        x, y, z = dataset.ImagePositionPatient
        dataset.ImagePositionPatient = [x, y, z + uneven_mm * (index % 2)]

    headers = [instance.header for instance in assembled(write(small_volume(shape=(8, 9, 7)), adjust=adjust)).instances]
    labels = np.zeros((8, 9, 7), np.uint8)
    labels[list(marked), 2:4, 3] = 1
    ours, theirs = files_of_both(monkeypatch, tmp_path, labels, headers, spec_of((Segment(1, "mass", MASS, MASS),)))
    assert ours == theirs


@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (1, -1, -1)])
def test_frames_keep_their_slices_in_whichever_order_these_are(write, monkeypatch, tmp_path, signs):
    loaded = assembled(write(small_volume(affine=axes((2, 1, 0), signs))))
    headers = [instance.header for instance in loaded.instances]
    ours, theirs = files_of_both(monkeypatch, tmp_path, labels_of(), headers, SPEC)
    assert ours == theirs


def test_104_segments_are_read_by_highdicom_and_dcmqi(write, tmp_path):
    """Of 512 x 512 x 300 voxels: benchmarks/whole_body.py."""
    shape = (26, 24, 20)
    d, h, w = np.indices(shape)
    labels = (d // 2 * 8 + h // 12 * 4 + w // 5 + 1).astype(np.uint8)  # 13 x 2 x 4 blocks
    labels[:, ::3] = 0
    segments = tuple(Segment(n, f"structure {n}", ORGAN, LUNG) for n in range(1, 105))
    loaded = assembled(write(small_volume(shape=shape)))
    sources = sources_from_headers([instance.header for instance in loaded.instances])
    path = tmp_path / "seg.dcm"
    write_dataset(segmentation_from_labels(labels, sources, spec_of(segments), MADE_BY), path)
    read = hd.seg.segread(path)
    assert read.number_of_segments == 104
    assert np.array_equal(read.get_pixels_by_source_instance(list(sources.uids), combine_segments=True), labels)
    meta, images = segments_by_dcmqi(path)
    found = {segment["SegmentLabel"] for group in meta["segmentAttributes"] for segment in group}
    assert found == {segment.label for segment in segments}
    assert len(images) == 104
    world = loaded.volume.geometry.world_from_index(np.argwhere(labels))
    assert_same_points(world, segment_points_by_dcmqi(path))
