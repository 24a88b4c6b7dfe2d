"""What ctflow needs other libraries to do differently holds within its own calls, and nowhere else."""

from __future__ import annotations

import gc
import logging
import threading
import warnings
from contextlib import suppress

import highdicom as hd
import numpy as np
import pydicom
import pytest
from pydicom import config

from ctflow.compat.highdicom import frames_known_by_class
from ctflow.compat.pydicom import lenient, values_unchecked
from ctflow.compat.python import uncollected
from ctflow.compat.scope import SharedChange
from ctflow.core.model import Code, Segment
from ctflow.dicom.attributes import text
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.dicom.write.derived import Provenance, write_dataset
from ctflow.dicom.write.measurement_report import report_from_measurements
from ctflow.dicom.write.rendered.secondary_capture import secondary_capture_from_picture
from ctflow.dicom.write.segmentation import segmentation_from_labels
from ctflow.measurements.measure import measure_segments
from dicom_support import small_volume, spec_of

TISSUE = Code("85756007", "SCT", "Tissue")
SPEC = spec_of((Segment(1, "Lung tumour", TISSUE, TISSUE),))
MADE_BY = Provenance("0.1.0", "ab" * 32, {"backend": "eager"})


def test_a_change_lasts_from_the_first_call_to_the_last_one():
    said: list[str] = []

    def make():
        said.append("made")
        return lambda: said.append("undone")

    change = SharedChange(make)
    with change.held(), change.held():
        assert said == ["made"]
    assert said == ["made", "undone"]
    with pytest.raises(ValueError, match="within"), change.held():
        raise ValueError("within")
    assert said == ["made", "undone"] * 2


def test_calls_of_several_threads_overlap():
    state = {"value": "theirs"}

    def make():
        state["value"] = "ours"
        return lambda: state.update(value="theirs")

    change, inside, leave = SharedChange(make), threading.Event(), threading.Event()

    def other() -> None:
        with change.held():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with change.held():
        thread.start()
        assert inside.wait(10)
    assert state["value"] == "ours", "the other call is not over"
    leave.set()
    thread.join()
    assert state["value"] == "theirs"


@pytest.mark.parametrize("before", [None, config.WARN, config.RAISE, config.IGNORE])
def test_validation_is_off_within_and_as_before_afterwards(monkeypatch, before):
    monkeypatch.setattr(config.settings, "_reading_validation_mode", before)
    logging.getLogger("pydicom").setLevel(logging.ERROR)
    for scope in (lenient, values_unchecked):
        with scope():
            assert config.settings.reading_validation_mode == config.IGNORE
        assert config.settings._reading_validation_mode == before
    with lenient():
        assert not logging.getLogger("pydicom").isEnabledFor(logging.CRITICAL)
        assert not logging.getLogger("pylibjpeg.utils").isEnabledFor(logging.CRITICAL)
    assert logging.getLogger("pydicom").level == logging.ERROR


def test_what_somebody_chooses_meanwhile_stays(monkeypatch):
    monkeypatch.setattr(config.settings, "_reading_validation_mode", None)
    with lenient():
        config.settings.reading_validation_mode = config.RAISE
    assert config.settings.reading_validation_mode == config.RAISE


def test_highdicom_asks_once_for_a_class_and_has_its_own_function_back(monkeypatch):
    """Fails where highdicom asks in another way: then `compat/highdicom.py` is to be looked at, or is not needed."""
    asked: list[str] = []
    own = hd.utils.is_multiframe_image

    def counted(dataset: pydicom.Dataset) -> bool:
        asked.append(dataset.SOPClassUID)
        return bool(own(dataset))

    monkeypatch.setattr(hd.utils, "is_multiframe_image", counted)
    images = []
    for index in range(4):
        image = pydicom.Dataset()
        image.SOPClassUID, image.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", f"1.2.{index + 1}"
        image.FrameOfReferenceUID, image.ImageOrientationPatient = "1.2.9", [1, 0, 0, 0, 1, 0]
        image.ImagePositionPatient = [0, 0, index]
        images.append(image)
    hd.utils.get_plane_positions_of_series(images)
    assert len(asked) == 4, "highdicom asks of each image"
    with frames_known_by_class():
        hd.utils.get_plane_positions_of_series(images)
        hd.utils.get_plane_positions_of_series(images)
    assert len(asked) == 5
    assert hd.utils.is_multiframe_image is counted


MALFORMED = {
    "StudyDate": "20190229",
    "PatientBirthDate": "19500231",
    "AccessionNumber": "12345678901234567890",
    "PatientName": "Doe^Jane=" * 9,
    "SliceThickness": "2.50000000000000000000",
    "StudyID": "x" * 40,
    "SeriesNumber": "seven",
}


def write_malformed(folder):
    def adjust(dataset, _index):
        for keyword, value in MALFORMED.items():
            tag = pydicom.datadict.tag_for_keyword(keyword)
            vr = pydicom.datadict.dictionary_VR(tag)
            raw = value.encode() + b" " * (len(value) % 2)
            dataset[tag] = pydicom.dataelem.RawDataElement(pydicom.tag.BaseTag(tag), vr, len(raw), raw, 0, False, True)

    write_ct_series(small_volume(), folder, adjust=adjust)


def test_a_process_that_asks_pydicom_to_raise_gets_results_and_no_value_in_its_log(monkeypatch, tmp_path, caplog):
    with monkeypatch.context() as patch:
        patch.setattr(config.settings, "_writing_validation_mode", config.IGNORE)
        write_malformed(tmp_path / "ct")
    monkeypatch.setattr(config.settings, "_reading_validation_mode", config.RAISE)
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan = scan_folder(tmp_path / "ct")
        (candidate,) = select_series(scan).selected
        loaded = assemble_series(candidate.series)
        headers = [instance.header for instance in loaded.instances]
        assert text(headers[0], "SeriesNumber") == MALFORMED["SeriesNumber"]
        labels = np.zeros(loaded.volume.array.shape, np.uint8)
        labels[3:7, 2:5, 1:7] = 1
        segmentation = segmentation_from_labels(labels, headers, SPEC, MADE_BY)
        measured = measure_segments(labels, loaded.volume, SPEC.segments)
        report = report_from_measurements(measured, segmentation, headers, SPEC, MADE_BY)
        picture = np.zeros((8, 8, 3), np.uint8)
        capture = secondary_capture_from_picture(picture, segmentation, headers, SPEC, MADE_BY)
        for number, dataset in enumerate((segmentation, report, capture)):
            write_dataset(dataset, tmp_path / f"{number}.dcm")
    assert np.array_equal(loaded.volume.array, small_volume().array)
    assert config.settings._reading_validation_mode == config.RAISE
    assert not [record for record in caplog.records if record.name.partition(".")[0] in ("pydicom", "highdicom")]


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_looked_for_again_as_before(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with suppress(ZeroDivisionError), uncollected():
            assert not gc.isenabled()
            _ = 1 / 0
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
