from __future__ import annotations

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.model import Code, Segment
from ctflow.dicom.read.segmentation import read_segmentation
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.segmentation import segmentation_from_labels
from dicom_support import assembled, small_volume, spec_of
from reasons import raises_reason

LUNG = Code("39607008", "SCT", "Lung")
SEGMENTS = tuple(
    Segment(number, f"Part {number}", Code("123037004", "SCT", "Anatomical Structure"), LUNG) for number in (1, 2)
)
SPEC = spec_of(SEGMENTS, name="m", version="1")
TURN = 0.3


def labels_of(shape=(16, 12, 10)):
    """Lopsided, so that any flip or swap of axes shows; slices without a mark lie between."""
    labels = np.zeros(shape, np.uint8)
    labels[3:7, 2:5, 1:7] = 1
    labels[7, 2, 1] = 1
    labels[11:13, 7:9, 3:5] = 2
    return labels


@pytest.fixture
def marked(write, tmp_path):
    """Writes a series and a SEG on it; gives the SEG's path and the series' headers in array order."""

    def make(labels=None, volume=None, change=None):
        headers = [instance.header for instance in assembled(write(volume)).instances]
        provenance = Provenance(ctflow_version="0", weights_digest="0" * 64, settings={})
        dataset = segmentation_from_labels(labels_of() if labels is None else labels, headers, SPEC, provenance)
        if change:
            change(dataset)
        write_dataset(dataset, tmp_path / "truth.dcm")
        return tmp_path / "truth.dcm", headers

    return make


GRIDS = {
    "head first": [(0, 0, 2.5), (0, 0.8, 0), (0.8, 0, 0)],
    "feet first": [(0, 0, -2.5), (0, 0.8, 0), (-0.8, 0, 0)],
    "oblique": [(0, -2 * np.sin(TURN), 2 * np.cos(TURN)), (0, 0.7 * np.cos(TURN), 0.7 * np.sin(TURN)), (0.9, 0, 0)],
}


@pytest.mark.parametrize("grid", GRIDS)
def test_what_was_written_is_read(marked, grid):
    affine = np.eye(4)
    affine[:3, :3] = np.transpose(GRIDS[grid])
    path, headers = marked(volume=small_volume(affine))
    found = read_segmentation(path, headers)
    assert found.dtype == np.uint8
    assert np.array_equal(found, labels_of())


def test_the_order_of_the_sources_is_the_order_of_the_slices(marked):
    path, headers = marked()
    assert np.array_equal(read_segmentation(path, headers[::-1]), labels_of()[::-1])


def test_an_empty_segmentation_is_read(marked):
    path, headers = marked(np.zeros((16, 12, 10), np.uint8))
    found = read_segmentation(path, headers)
    assert found.shape == (16, 12, 10)
    assert not found.any()


def test_a_full_segmentation_is_read(marked):
    path, headers = marked(np.full((16, 12, 10), 2, np.uint8))
    assert (read_segmentation(path, headers) == 2).all()


def test_another_series_is_refused(marked, write):
    path, _ = marked()
    other = [instance.header for instance in assembled(write(small_volume(seed=1))).instances]
    with raises_reason(UnsupportedPixels, "other-series", names="truth.dcm"):
        read_segmentation(path, other)


def test_another_series_of_the_same_frame_is_refused(marked, write):
    path, headers = marked()

    def adjust(dataset, _):
        dataset.FrameOfReferenceUID = headers[0].FrameOfReferenceUID

    other = [instance.header for instance in assembled(write(small_volume(seed=1), adjust)).instances]
    with raises_reason(UnsupportedPixels, "other-series", names="truth.dcm"):
        read_segmentation(path, other)


def test_a_series_without_some_marked_images_is_refused(marked):
    path, headers = marked()
    with raises_reason(UnsupportedPixels, "other-series", names="truth.dcm"):
        read_segmentation(path, headers[:5])


def test_another_frame_size_is_refused(marked):
    path, headers = marked()
    headers[0].Columns = 11
    with raises_reason(UnsupportedPixels, "other-grid", names="Columns"):
        read_segmentation(path, headers)


def test_no_seg_is_refused(marked, write):
    _, headers = marked()
    with raises_reason(UnsupportedPixels, "not-seg", names="00005.dcm"):
        read_segmentation(next(write().iterdir()), headers)


@pytest.mark.parametrize("content", [None, b"", b"no DICOM at all", "cut"])
def test_a_damaged_or_absent_file_is_named(marked, content):
    path, headers = marked()
    whole = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(whole[:3000] if content == "cut" else content)
    with pytest.raises((BrokenSeries, UnsupportedPixels), match=r"truth\.dcm") as caught:
        read_segmentation(path, headers)
    assert str(path.parent) not in str(caught.value)


def test_lost_pixels_are_refused(marked):
    def change(dataset):
        dataset.PixelData = dataset.PixelData[:20]

    path, headers = marked(change=change)
    with raises_reason(UnsupportedPixels, "seg-layout", names="truth.dcm"):
        read_segmentation(path, headers)


def test_frames_that_name_no_image_are_refused(marked):
    def change(dataset):
        for frame in dataset.PerFrameFunctionalGroupsSequence:
            del frame.DerivationImageSequence

    path, headers = marked(change=change)
    with raises_reason(UnsupportedPixels, "seg-layout", names="truth.dcm"):
        read_segmentation(path, headers)


def foreign(path, headers, pixels, kind):
    """A SEG by highdicom alone."""
    for header in headers:
        header.PatientName = "A^B"
    description = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=f"s{number}",
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.Lung,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number in range(1, (pixels.shape[3] if pixels.ndim == 4 else 1) + 1)
    ]
    hd.seg.Segmentation(
        source_images=headers,
        pixel_array=pixels,
        segmentation_type=kind,
        segment_descriptions=description,
        series_instance_uid=hd.UID(),
        series_number=2,
        sop_instance_uid=hd.UID(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
    ).save_as(path)


def test_overlapping_segments_are_refused(marked, tmp_path):
    _, headers = marked()
    pixels = np.zeros((16, 12, 10, 2), np.uint8)
    pixels[4, 2:6, 2:6] = 1
    foreign(tmp_path / "other.dcm", headers, pixels, "BINARY")
    with raises_reason(UnsupportedPixels, "seg-layout", names="other.dcm"):
        read_segmentation(tmp_path / "other.dcm", headers)


def test_of_fractions_the_largest_counts_unless_the_background_has_more(marked, tmp_path):
    _, headers = marked()
    pixels = np.zeros((16, 12, 10, 2), np.float32)
    pixels[4, 2:6, 2:6] = (0.3, 0.6)
    pixels[5, 2:6, 2:6] = (0.4, 0.3)
    pixels[6, 2:6, 2:6] = (0.2, 0.3)
    foreign(tmp_path / "other.dcm", headers, pixels, "FRACTIONAL")
    expected = np.zeros((16, 12, 10), np.uint8)
    expected[4, 2:6, 2:6] = 2
    expected[5, 2:6, 2:6] = 1
    assert np.array_equal(read_segmentation(tmp_path / "other.dcm", headers), expected)


def test_a_label_map_is_read(marked, tmp_path):
    _, headers = marked()
    pixels = (labels_of() == 1).astype(np.uint8)
    foreign(tmp_path / "other.dcm", headers, pixels, "LABELMAP")
    assert pydicom.dcmread(tmp_path / "other.dcm").SegmentationType == "LABELMAP"
    assert np.array_equal(read_segmentation(tmp_path / "other.dcm", headers), pixels)
