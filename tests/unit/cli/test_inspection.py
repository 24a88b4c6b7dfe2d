from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pydicom
import pytest

from ctflow.bundle import demonstration_bundle, read_body_parts
from ctflow.cli.inspection import inspect_folder
from ctflow.cli.main import main
from ctflow.core.errors import BundleInvalid
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.report.terminal import say_inspection
from dicom_support import setter, small_volume
from odd_series import ODD, outcome_of

JUDGED_BY_HEADERS = [
    "a localizer of another size",
    "SpacingBetweenSlices is 0",
    "tilted, in sections of different spacing, as tilted/ is",
    "two patients in a series",
    "wrong VRs: numbers and codes as LO, Rows as UL",
    "private junk",
    "one slice: another SliceThickness",
    "two energies, KVP",
    "two acquisitions, one after the other by AcquisitionTime",
    "a colour picture as CT image in the series",
    "Enhanced CT, two temporal positions",
    "Enhanced CT, a concatenation of two objects",
    "Enhanced CT, NumberOfFrames contradicts the frames",
]


@pytest.mark.parametrize("odd", [odd for odd in ODD if odd.name in JUDGED_BY_HEADERS], ids=lambda odd: odd.name)
def test_headers_without_what_is_large_are_judged_as_whole_ones(tmp_path, odd):
    odd.write(tmp_path)
    shown = inspect_folder(tmp_path)["series"]
    candidates = select_series(scan_folder(tmp_path)).candidates
    assert [(entry["reason"], entry["message"], entry["description"]) for entry in shown] == [
        (one.reason, one.message, dict(one.description)) for one in candidates
    ]
    said = " ".join(warning for entry in shown for warning in (*entry["warnings"], entry["message"]))
    assert odd.says in said
    assert any(entry["warnings"] for entry in shown) == outcome_of(tmp_path).text.endswith("warned")


def test_the_odd_series_are_there():
    assert {odd.name for odd in ODD} >= set(JUDGED_BY_HEADERS)


@pytest.fixture
def abdomen(tmp_path) -> Path:
    write_ct_series(small_volume(shape=(16, 8, 8)), tmp_path / "ct", adjust=setter(BodyPartExamined="ABDOMEN"))
    return tmp_path


def test_the_model_s_body_parts_take_part_by_default_as_they_do_in_run(abdomen, capsys, monkeypatch):
    monkeypatch.delenv("HOLOSCAN_MODEL_PATH", raising=False)
    assert main(["inspect", str(abdomen), "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["series"]
    parts = read_body_parts(demonstration_bundle())
    (candidate,) = select_series(scan_folder(abdomen), body_parts=parts).candidates
    assert (entry["selected"], entry["reason"], entry["message"]) == (False, "body-part", candidate.message)
    assert "(ABDOMEN) matches none of the bundle's (CHEST, THORAX, LUNG" in entry["message"]


@pytest.mark.parametrize("by", ["flag", "environment"])
def test_another_model_s_body_parts_take_its_place(abdomen, capsys, monkeypatch, tmp_path, by):
    bundle = tmp_path / "bundle"
    (bundle / "configs").mkdir(parents=True)
    metadata = json.loads((demonstration_bundle() / "configs" / "metadata.json").read_text())
    (bundle / "configs" / "metadata.json").write_text(
        json.dumps({**metadata, "body_parts": ["abdomenpelvis", "liver"]})
    )
    words = ["-m", str(bundle)] if by == "flag" else []
    monkeypatch.setenv("HOLOSCAN_MODEL_PATH", str(bundle if by == "environment" else demonstration_bundle()))
    assert main(["inspect", str(abdomen / "ct"), *words]) == 0
    assert "(ABDOMENPELVIS, LIVER)" in capsys.readouterr().out
    assert main(["inspect", str(abdomen), "-m", str(tmp_path / "no-bundle")]) == BundleInvalid.exit_code


def test_a_header_takes_little_memory(tmp_path):
    """10,000 files stay below 300 MB: 80 MB of libraries, and at most 20 kB a file."""

    def adjust(dataset, index):
        block = dataset.private_block(0x0029, "VENDOR", create=True)
        block.add_new(1, "OB", bytes(20_000))
        dataset.RequestAttributesSequence = [pydicom.Dataset() for _ in range(20)]

    (first, *_) = write_ct_series(small_volume(shape=(16, 8, 8)), tmp_path / "ct", adjust=adjust)
    inspect_folder(tmp_path)  # what is imported and remembered
    tracemalloc.start()
    try:
        inspect_folder(tmp_path)
        _, peak_of_few = tracemalloc.get_traced_memory()
        for number in range(400):
            shutil.copy(first, tmp_path / "ct" / f"{number + 100}.dcm")
        tracemalloc.reset_peak()
        inspect_folder(tmp_path)
        _, peak_of_many = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (peak_of_many - peak_of_few) / 400 < 12_000


def test_neither_torch_nor_monai_is_imported_to_inspect(abdomen):
    """They are 150 MB; the model's body parts are read without them."""
    code = (
        "import sys; from ctflow.cli.main import main; main(['inspect', sys.argv[1]]);"
        " sys.exit(bool({'torch', 'monai'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, abdomen], check=True, capture_output=True)


def test_what_cannot_be_read_is_summed_up(tmp_path, capsys):
    for number in range(30):
        (tmp_path / f"{number:05d}.dcm").write_bytes(b"")
    document = inspect_folder(tmp_path)
    assert document["unreadable_reasons"] == {"no-header": 30}
    assert len(document["unreadable"]) == 30
    say_inspection(document)
    shown = capsys.readouterr().out
    assert "00004.dcm and 25 more (--json lists all): empty or without a DICOM header" in shown
    assert "30 files could not be read" in shown
