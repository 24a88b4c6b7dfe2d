from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from ctflow.cli import inspection
from ctflow.cli.main import main
from ctflow.core.errors import NoUsableSeries
from ctflow.dicom.read.scan import name_without_patient
from ctflow.engines.registry import BACKENDS


def test_version_and_help(capsys):
    assert main(["--version"]) == 0
    assert main(["--help"]) == 0
    assert main(["run", "-h"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "ctflow, version",
        "inspect",
        "phantom",
        "engines",
        "evaluate",
        "export",
        "exec",
        "--overlap",
        "HOLOSCAN_INPUT_PATH",
    ):
        assert word in shown


@pytest.mark.parametrize(
    "words",
    [
        ["brew"],
        ["run", "--no-such-flag"],
        ["run", "--overlap"],
        ["run", "-i", "x", "-o", "y", "--overlap", "3"],
        ["run", "-i", "x", "-o", "y", "--roi", "lung"],
        ["run", "-o", "y"],
        ["phantom", "x", "--shape", "1,2"],
        ["phantom", "x", "--shape", "1,2,x"],
        ["phantom", "x", "--shape", "2,2,2"],
        ["phantom", "x", "--seed", "-1"],
        ["exec"],
        ["serve", "--no-such-flag"],
        ["serve", "-c", "missing.yaml"],
    ],
)
def test_wrong_usage_is_64(words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 64
    assert "SettingsInvalid" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_run_writes_results_and_tells_them(series, coarse_bundle, tmp_path, capsys):
    assert main(["run", "-i", str(series), "-o", str(tmp_path), "-m", str(coarse_bundle), "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert "RESEARCH ONLY" in captured.out
    assert "segmentation.dcm" in captured.out
    assert "segmenting windows" in captured.err
    assert json.loads((tmp_path / "result.json").read_text())["exit_code"] == 0


def test_run_without_a_series_is_2(tmp_path, coarse_bundle, capsys):
    assert main(["run", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "-m", str(coarse_bundle)]) == 2
    assert "NoUsableSeries [no-dicom]" in capsys.readouterr().err


def test_a_bundle_that_cannot_be_read_is_said_in_the_run_s_document(tmp_path):
    assert main(["run", "-i", str(tmp_path), "-o", str(tmp_path / "out"), "-m", str(tmp_path / "no-bundle")]) == 3
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (document["status"], document["exit_code"]) == ("failed", 3)
    assert document["error"]["reason"] == "no-bundle"


def test_inspect_shows_what_run_would_do(series, tmp_path, capsys):
    assert main(["inspect", str(series)]) == 0
    assert "selected" in capsys.readouterr().out
    assert main(["inspect", str(series), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    (entry,) = document["series"]
    assert entry["selected"]
    assert entry["geometry"]["shape"] == [24, 96, 96]
    assert len(entry["geometry"]["affine_lps_mm"]) == 4


def test_inspect_names_the_broken_series_and_the_unreadable_file(series, tmp_path, capsys):
    for number, path in enumerate(sorted(series.iterdir())):
        if number != 9:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "bad.dcm").write_bytes(b"")
    other = pydicom.dcmread(next(series.iterdir()))
    other.Modality, other.SeriesInstanceUID = "MR", "1.2.3"
    other.save_as(tmp_path / "mr.dcm")
    assert main(["inspect", str(tmp_path), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    verdicts = {entry["reason"]: entry for entry in document["series"]}
    assert set(verdicts) == {"gap", "modality"}
    assert not verdicts["gap"]["selected"]
    assert verdicts["gap"]["geometry"] is None
    assert document["unreadable"][0]["file"] == name_without_patient(Path("bad.dcm"))
    assert main(["inspect", str(tmp_path)]) == 0
    assert "rejected (gap)" in capsys.readouterr().out


def test_inspect_of_no_folder_is_2(tmp_path):
    assert main(["inspect", str(tmp_path / "nowhere")]) == NoUsableSeries.exit_code


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_inspect_of_a_folder_without_dicom_shows_what_is_there_and_is_2(tmp_path, capsys, words):
    (tmp_path / "notes.txt").write_text("no header")
    (tmp_path / "bad.dcm").write_bytes(b"")
    assert main(["inspect", str(tmp_path), *words]) == NoUsableSeries.exit_code
    shown = capsys.readouterr()
    assert "empty or without a DICOM header" in shown.out
    assert "NoUsableSeries [no-dicom]" in shown.err
    assert shown.err.rstrip().endswith("1 file is not DICOM, 1 unreadable")
    assert words or shown.out.rstrip().endswith("0 series, 1 file that is not DICOM, 1 unreadable")


def test_run_says_how_to_see_the_name_of_an_unreadable_file(tmp_path, capsys):
    (tmp_path / "notes.dcm").write_text("no header")
    assert main(["run", "-i", str(tmp_path), "-o", str(tmp_path / "out")]) == NoUsableSeries.exit_code
    assert "`ctflow inspect DIR --names`" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path), "--names"]) == NoUsableSeries.exit_code
    assert "unreadable: notes.dcm: " in capsys.readouterr().out


def test_python_m_ctflow_is_the_command():
    command = [sys.executable, "-m", "ctflow"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ctflow, version")
    done = subprocess.run([*command, "run", "-o", "y"], capture_output=True, text=True, check=False)
    assert done.returncode == 64
    assert "SettingsInvalid [missing-folder]" in done.stderr


def test_phantom_writes_series_and_truth_once(tmp_path, capsys):
    words = ["phantom", str(tmp_path / "p"), "--seed", "3", "--shape", "16,48,48", "--tumours", "1"]
    assert main(words) == 0
    assert "truth with 1 tumour in" in capsys.readouterr().out
    assert len(list((tmp_path / "p" / "ct").iterdir())) == 16
    truth = pydicom.dcmread(tmp_path / "p" / "truth.dcm")
    assert truth.Modality == "SEG"
    assert len(truth.ReferencedSeriesSequence[0].ReferencedInstanceSequence) == 16
    assert main(words) == 5
    assert "NotWritten [already-there]" in capsys.readouterr().err


def test_several_phantoms_become_cases(tmp_path, capsys):
    words = ["phantom", str(tmp_path), "--seed", "5", "--count", "2", "--shape", "16,48,48", "--tumours", "0"]
    assert main(words) == 0
    assert "2 phantoms with 0 tumours" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["5", "6"]
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == ["ct", "truth.dcm"]


def test_engines_tells_backends_and_the_script(capsys):
    assert main(["engines"]) == 0
    assert "eager" in capsys.readouterr().out
    assert main(["engines", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [backend["name"] for backend in document["backends"]] == list(BACKENDS)
    assert document["monai_deploy"]["has_exec"] is True


def test_exec_passes_every_option_and_the_exit_code_on(tmp_path):
    (tmp_path / "__main__.py").write_text("import sys; sys.exit(6 if sys.argv[1:] == ['-i', 'in', '--force'] else 1)")
    assert main(["exec", str(tmp_path), "-i", "in", "--force"]) == 6


def test_an_interrupt_is_130(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_folder", interrupt)
    assert main(["inspect", str(tmp_path)]) == 130


def test_an_unexpected_error_is_70(monkeypatch, tmp_path, capsys):
    def fail(*_, **__):
        raise RuntimeError("Doe^John")

    monkeypatch.setattr(inspection, "inspect_folder", fail)
    assert main(["inspect", str(tmp_path)]) == 70
    assert "Doe" not in capsys.readouterr().err
    assert main(["--debug", "inspect", str(tmp_path)]) == 70
    assert "Traceback" in capsys.readouterr().err
