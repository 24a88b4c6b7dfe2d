"""Nothing of a patient in any line, message, traceback, file name or file that is not DICOM."""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from pathlib import Path

import pydicom
import pytest

from bundle_support import small_unet_bundle
from ctflow.cli.main import main
from ctflow.core.volume import Volume
from ctflow.dicom.write.ct_series import write_ct_series
from phantom_support import phantom_drawn_once
from report_support import text_of_pdf

pytestmark = pytest.mark.e2e

FAMILY, GIVEN, ID, BORN, ACCESSION = "Zyxwvut", "Quirina", "QX77310ZZ", "19370213", "ACC5599117"
MARKERS = (FAMILY, GIVEN, ID, BORN, ACCESSION)
PATIENT = {
    "PatientName": f"{FAMILY}^{GIVEN}",
    "PatientID": ID,
    "PatientBirthDate": BORN,
    "AccessionNumber": ACCESSION,
    "OtherPatientNames": f"{FAMILY}^{GIVEN}",
    "PatientComments": f"{FAMILY} {ID}",
    "StudyDescription": f"for {FAMILY}",
    "SeriesDescription": f"of {GIVEN}",
    "ProtocolName": f"{FAMILY} {BORN}",
    "StationName": ID,
    "BodyPartExamined": "CHEST",
}


def given(**more):
    def adjust(dataset, _index):
        for keyword, value in {**PATIENT, **more}.items():
            setattr(dataset, keyword, value)

    return adjust


@functools.cache
def chest() -> Volume:
    return phantom_drawn_once(1, (18, 80, 80)).volume


def write_series(folder: Path, seed: int, adjust=None) -> list[Path]:
    """A series of the patient in files that are named after them."""
    paths = write_ct_series(chest(), folder, seed=seed, adjust=adjust or given())
    return [path.rename(folder / f"{FAMILY}_{GIVEN}_{ID}_{path.name}") for path in paths]


def change(path: Path, **values) -> None:
    dataset = pydicom.dcmread(path)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path)


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    assert len(old) == len(new)
    path.write_bytes(content.replace(old, new))


def odd_series(root: Path) -> int:
    """One series a kind of trouble, each with the patient's values in it; returns how many are there."""
    write_series(root / "good", 1)
    write_series(root / "gap", 2)[7].unlink()
    pixels_cut = write_series(root / "pixels cut", 3)[5]
    pixels_cut.write_bytes(pixels_cut.read_bytes()[:-500])
    header_cut = write_series(root / "header cut", 4)[0]
    header_cut.write_bytes(header_cut.read_bytes()[:420])
    copies = write_series(root / "doubled", 5)
    uid = pydicom.dcmread(copies[0]).SOPInstanceUID
    change(copies[3], SOPInstanceUID=uid)
    change(write_series(root / "no position", 6)[2], ImagePositionPatient=["", "", ""])
    change(write_series(root / "iodine", 7)[4], RescaleType=FAMILY)
    change(write_series(root / "no rescale", 8)[4], RescaleSlope="")
    change(write_series(root / "two patients", 9)[4], PatientID=f"{ID}-2", PatientName=f"{FAMILY}^{GIVEN}2")
    write_series(root / "no frame of reference", 10, given(FrameOfReferenceUID=""))
    write_series(root / "another body part", 11, given(BodyPartExamined=ID))
    write_series(root / "localizer", 12, given(ImageType=["DERIVED", FAMILY.upper(), "LOCALIZER"]))
    for path in write_series(root / "bad values", 13):  # where numbers, dates and UIDs should be
        replace_bytes(path, b"CTFLOW", FAMILY[:6].encode()) if b"CTFLOW" in path.read_bytes() else None
        replace_bytes(path, BORN.encode(), b"19Zyxwvu")
        replace_bytes(path, b"120000", GIVEN[:6].encode())
    compressed = write_series(root / "damaged frame", 14)
    for path in compressed:
        dataset = pydicom.dcmread(path)
        dataset.compress("1.2.840.10008.1.2.4.90", generate_instance_uid=False)
        dataset.save_as(path)
    content = compressed[3].read_bytes()
    at = content.index(b"\xff\x4f\xff\x51")
    compressed[3].write_bytes(content[: at + 40] + bytes(60) + content[at + 100 :])
    (root / f"{FAMILY}.dcm").touch()
    (root / f"{ID}.dcm").symlink_to(root / "nowhere")
    (root / f"{BORN}.txt").write_text(f"{FAMILY} {ACCESSION}")
    return 14


@pytest.fixture
def hospital(tmp_path) -> Path:
    """An input folder whose path also names the patient."""
    root = tmp_path / f"{FAMILY}_{GIVEN}" / ID / f"{BORN}_{ACCESSION}"
    root.mkdir(parents=True)
    return root


def assert_silent(text: str | bytes, where: str) -> None:
    content = text.encode() if isinstance(text, str) else text
    for marker in (*MARKERS, GIVEN[:6], FAMILY[:6]):
        assert marker.lower().encode() not in content.lower(), f"{marker} in {where}"


@pytest.mark.parametrize("name", [pytest.param("debug", marks=pytest.mark.exhaustive), "app-debug"])
def test_nothing_of_the_patient_leaves_a_run_but_in_dicom(entry_point, hospital, tmp_path, name):
    count = odd_series(hospital)
    bundle = small_unet_bundle(tmp_path / "bundle")
    output = tmp_path / "out"
    done = entry_point(name, ["-i", hospital, "-o", output, "-m", bundle, "--nifti", "--segments", "finding", "--pdf"])
    assert done.returncode == 6, done.stderr
    document = json.loads((output / "result.json").read_text())
    assert len(document["series"]) + len(document["set_aside"]) == count
    refused = [entry["error"]["type"] for entry in document["series"] if entry["error"]]
    assert {"BrokenSeries", "UnsupportedPixels"} <= set(refused)
    assert len(document["unreadable"]) >= 3
    assert "DEBUG" in done.stderr or "INFO" in done.stderr
    assert_silent(done.stdout, "what the run says")
    assert_silent(done.stderr, "what the run logs")
    written = [path for path in output.rglob("*") if path.is_file()]
    assert any(path.suffix == ".png" for path in written)
    for path in output.rglob("*"):
        assert_silent(path.relative_to(output).as_posix(), "a file's name")
    for path in written:
        if path.suffix != ".dcm":
            content = path.read_bytes()
            assert_silent(gzip.decompress(content) if path.suffix == ".gz" else content, path.name)
        if path.name == "report.dcm":
            assert_silent(" ".join(text_of_pdf(pydicom.dcmread(path))), "the PDF")
    seg = pydicom.dcmread(next(path for path in written if path.name == "segmentation.dcm"))
    assert FAMILY in str(seg.PatientName), "the markers were in the input"


def test_a_run_that_can_do_nothing_says_nothing_of_the_patient(entry_point, hospital, tmp_path):
    odd_series(hospital)
    shutil.rmtree(hospital / "good")
    for folder in ("bad values", "gap", "pixels cut", "header cut", "doubled", "no position", "iodine"):
        shutil.rmtree(hospital / folder)
    for folder in ("no rescale", "damaged frame"):
        shutil.rmtree(hospital / folder)
    done = entry_point("debug", ["-i", hospital, "-o", tmp_path / "out", "-m", small_unet_bundle(tmp_path / "bundle")])
    assert done.returncode == 2, done.stderr
    assert "NoUsableSeries [none-eligible]" in done.stderr
    assert_silent(done.stdout + done.stderr, "what the run says")


@pytest.mark.parametrize("words", [["--json"], []])
def test_inspect_shows_names_of_files_only_when_asked(hospital, capsys, words):
    odd_series(hospital)
    assert main(["inspect", str(hospital), *words]) == 0
    shown = capsys.readouterr()
    assert_silent(shown.out + shown.err, "what inspect shows")
    assert main(["inspect", str(hospital), *words, "--names"]) == 0
    assert f"{FAMILY}.dcm" in capsys.readouterr().out


def test_an_unexpected_error_is_placed_and_not_quoted(series, tmp_path, capsys, monkeypatch):
    def fail(*_, **__):
        raise ValueError(f"invalid date {BORN} of {FAMILY}")

    monkeypatch.setattr("ctflow.pipeline.case.scan_folder", fail)
    words = ["-i", str(series), "-o", str(tmp_path / "out"), "-m", str(small_unet_bundle(tmp_path / "bundle"))]
    assert main(["--debug", "run", *words]) == 70
    shown = capsys.readouterr()
    assert "ValueError" in shown.err
    assert "look_for_cases" in shown.err
    assert_silent(shown.out + shown.err, "the traceback")
