from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pydicom
import pytest
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian

from ctflow.core.errors import NoUsableSeries
from ctflow.dicom.read.scan import name_without_patient, scan_folder
from reasons import raises_reason


def only(folder: Path) -> Path:
    return sorted(folder.iterdir())[0]


def test_headers_are_read_without_pixels(write):
    folder = write()
    steps = []
    scan = scan_folder(folder, lambda *step: steps.append(step))
    assert len(scan.instances) == 16
    assert scan.unreadable == ()
    assert scan.ignored == 0
    instance = scan.instances[3]
    assert instance.name == "00003.dcm"
    assert instance.path == folder / "00003.dcm"
    assert instance.has_pixels
    assert "PixelData" not in instance.header
    assert steps[0] == ("scan", 0, 16)
    assert steps[-1] == ("scan", 16, 16)


def test_the_offset_points_at_the_pixels(write):
    folder = write()
    for instance in scan_folder(folder).instances:
        expected = pydicom.dcmread(instance.path).PixelData
        assert instance.path.read_bytes()[instance.pixel_offset :][: instance.pixel_length] == expected


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRBigEndian])
def test_the_offset_is_right_in_other_encodings(write, syntax):
    path = only(write())
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = syntax
    options = {"implicit_vr": syntax.is_implicit_VR, "little_endian": syntax.is_little_endian}
    pydicom.dcmwrite(path, dataset, **options, force_encoding=True)
    (instance, *_) = scan_folder(path.parent).instances
    assert instance.transfer_syntax == syntax
    assert path.read_bytes()[instance.pixel_offset :] == dataset.PixelData
    assert instance.pixel_length == len(dataset.PixelData)


def test_a_deflated_file_must_be_decoded(write):
    path = only(write())
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    (instance, *_) = scan_folder(path.parent).instances
    assert instance.has_pixels
    assert instance.pixel_offset is None


def test_a_file_without_preamble_is_read(write):
    path = only(write())
    dataset = pydicom.dcmread(path)
    del dataset.file_meta
    dataset.preamble = None
    dataset.save_as(path, implicit_vr=True, little_endian=True, enforce_file_format=False)
    (instance, *_) = scan_folder(path.parent).instances
    assert path.read_bytes()[128:132] != b"DICM"
    assert instance.transfer_syntax == ImplicitVRLittleEndian
    assert path.read_bytes()[instance.pixel_offset :] == dataset.PixelData


def test_other_files_are_ignored_and_counted(write):
    folder = write()
    (folder / "notes.txt").write_text("not DICOM")
    (folder / "empty").touch()
    (folder / "starts_like_one").write_bytes(b"\x08\x00" + bytes(300))
    scan = scan_folder(folder)
    assert len(scan.instances) == 16
    assert scan.ignored + len(scan.unreadable) == 3
    assert scan.ignored >= 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "no-header"), (b"rubbish", "no-header"), (b"\0" * 128 + b"DICM" + b"\xff" * 40, "damaged")],
)
def test_a_damaged_dicom_file_is_named(write, content, reason):
    folder = write()
    (folder / "sub").mkdir()
    (folder / "sub" / "bad.dcm").write_bytes(content)
    (unreadable,) = scan_folder(folder).unreadable
    assert unreadable.name == name_without_patient(Path("sub/bad.dcm"))
    assert unreadable.reason == reason
    (unreadable,) = scan_folder(folder, name_of=Path.as_posix).unreadable
    assert unreadable.name == "sub/bad.dcm"


@pytest.mark.parametrize(
    "name", ["00003.dcm", "12", "IM-0001.dcm", "IM00012", "I7.ima", "slice_004.DCM", "12/IMG00001", "1.dicom"]
)
def test_short_numbers_are_shown_as_they_are(name):
    assert name_without_patient(Path(name)) == name


@pytest.mark.parametrize("part", ["Doe_John", "123456", "19370213.dcm", "0001_Doe.dcm", "CTDoe", "1.2.840.1.dcm", "ct"])
def test_a_part_that_may_hold_a_patients_name_is_a_digest(part):
    shown = name_without_patient(Path(part) / part / "00001.dcm").split("/")
    assert shown[0] == shown[1] != part
    assert shown[2] == "00001.dcm"
    assert re.fullmatch(r"[0-9a-f]{12}(\.dcm)?", shown[0])
    assert name_without_patient(Path(f"x{part}")) != shown[0]


@pytest.mark.parametrize("length", [140, 300, 700, 1000])
def test_a_file_cut_in_its_header_is_named(write, length):
    path = only(write())
    path.write_bytes(path.read_bytes()[:length])
    scan = scan_folder(path.parent)
    # A cut at an element's end leaves a valid header without pixels; select then names it.
    named = [file.name for file in scan.unreadable] + [i.name for i in scan.instances if not i.has_pixels]
    assert named == [path.name]


def test_damage_is_described_without_quoting_the_file(write):
    path = only(write())
    content = bytearray(path.read_bytes())
    content[200:260] = b"Doe^John" * 7 + b"\0\0\0\0"
    path.write_bytes(content)
    scan = scan_folder(path.parent)
    assert all("Doe" not in file.message for file in scan.unreadable)


def test_symbolic_links_are_followed_once(write, tmp_path):
    folder = write()
    (folder / "loop").symlink_to(folder)
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(only(folder), outside / "more.dcm")
    (folder / "linked").symlink_to(outside)
    (folder / "broken.dcm").symlink_to(folder / "nowhere")
    scan = scan_folder(folder)
    assert folder / "linked" / "more.dcm" in [instance.path for instance in scan.instances]
    assert len(scan.instances) == 17
    assert [file.name for file in scan.unreadable] == [name_without_patient(Path("broken.dcm"))]


def test_a_pipe_does_not_block(write):
    folder = write()
    os.mkfifo(folder / "pipe.dcm")
    os.mkfifo(folder / "pipe")
    scan = scan_folder(folder)
    assert [file.reason for file in scan.unreadable] == ["no-regular-file"]


def test_a_dicomdir_is_ignored(write):
    folder = write()
    dataset = pydicom.dcmread(only(folder), stop_before_pixels=True)
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    dataset.save_as(folder / "DICOMDIR")
    scan = scan_folder(folder)
    assert scan.ignored == 1
    assert len(scan.instances) == 16


@pytest.mark.parametrize(("name", "said"), [("missing", "does not exist"), ("file", "is not a folder")])
def test_what_is_no_folder_is_refused(tmp_path, name, said):
    (tmp_path / "file").touch()
    with raises_reason(NoUsableSeries, "not-a-folder", names=said):
        scan_folder(tmp_path / name)
