"""Every entry point says the same named error with the same exit code, and leaves nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from ctflow.core.volume import digest_of_uid
from ctflow.dicom.read.scan import name_without_patient

pytestmark = pytest.mark.e2e
REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
EXHAUSTIVE = pytest.mark.exhaustive
# What `ctflow run` does is shown without a process of its own by tests/unit/pipeline and tests/unit/cli.
RUN = pytest.param("run", marks=EXHAUSTIVE)


def said_alone(output: Path) -> dict:
    """The run's document, beside which nothing else lies in the output folder."""
    assert [path.name for path in output.rglob("*")] == ["result.json"]
    return json.loads((output / "result.json").read_text())


@pytest.mark.parametrize(
    "name", ["run", "app", *(pytest.param(name, marks=EXHAUSTIVE) for name in ("exec", "monai-deploy"))]
)
def test_an_empty_folder_is_exit_2_and_writes_only_the_run_s_document(entry_point, coarse_bundle, tmp_path, name):
    (tmp_path / "in").mkdir()
    done = entry_point(name, ["-i", tmp_path / "in", "-o", tmp_path / "out", "-m", coarse_bundle])
    assert done.returncode == 2, done.stderr
    assert "NoUsableSeries [no-dicom]" in done.stderr
    document = said_alone(tmp_path / "out")
    assert (document["status"], document["exit_code"], document["error"]["reason"]) == ("failed", 2, "no-dicom")


@pytest.fixture
def gapped(series, tmp_path) -> Path:
    folder = tmp_path / "gapped"
    shutil.copytree(series, folder)
    slices = sorted(folder.iterdir(), key=lambda path: pydicom.dcmread(path).ImagePositionPatient[2])
    slices[10].unlink()
    return folder


def write_earlier_result(output: Path, header: pydicom.Dataset) -> str:
    """A result folder of a series; its name."""
    key = f"{header.SeriesInstanceUID}-{digest_of_uid(header.StudyInstanceUID)}"
    (output / key).mkdir(parents=True)
    (output / key / "segmentation.dcm").write_text("of an earlier run")
    return key


@pytest.mark.exhaustive  # the next one also moves it aside, and an empty folder is exit 2
@pytest.mark.parametrize("name", ["run", "app"])
def test_a_missing_slice_is_exit_2_and_moves_an_earlier_result_aside(
    entry_point, coarse_bundle, tmp_path, gapped, name
):
    header = pydicom.dcmread(next(gapped.iterdir()), stop_before_pixels=True)
    key = write_earlier_result(tmp_path / "out", header)
    done = entry_point(name, ["-i", gapped, "-o", tmp_path / "out", "-m", coarse_bundle])
    assert done.returncode == 2, done.stderr
    assert "BrokenSeries [gap]" in done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".superseded", "result.json"]
    assert (tmp_path / "out" / ".superseded" / f"{key}-1" / "segmentation.dcm").read_text() == "of an earlier run"


@pytest.mark.parametrize("name", [RUN, "app"])
def test_a_refused_series_does_not_stop_another(entry_point, coarse_bundle, tmp_path, gapped, series, name):
    for file in gapped.iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SeriesInstanceUID += ".9"
        dataset.SOPInstanceUID += ".9"
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(file)
    shutil.copytree(series, gapped / "good")
    key = write_earlier_result(tmp_path / "out", dataset)
    (gapped / "cut.dcm").write_bytes(next(series.iterdir()).read_bytes()[:700])
    done = entry_point(name, ["-i", gapped, "-o", tmp_path / "out", "-m", coarse_bundle])
    assert done.returncode == 6, done.stderr
    document = json.loads((tmp_path / "out" / "result.json").read_text())
    assert sorted(entry["status"] for entry in document["series"]) == ["done", "refused"]
    (unreadable,) = document["unreadable"]
    assert unreadable["file"] == name_without_patient(Path("cut.dcm"))
    folders = {path.name: path for path in (tmp_path / "out").iterdir() if path.is_dir()}
    moved = folders.pop(".superseded") / f"{key}-1" / "segmentation.dcm"
    assert moved.read_text() == "of an earlier run"
    (folder,) = folders.values()
    assert (folder / "segmentation.dcm").read_bytes()[128:132] == b"DICM"


@pytest.mark.parametrize("name", [RUN, "app"])
@pytest.mark.parametrize(
    ("words", "code", "error", "reason"),
    [
        (["--engine", "warp"], 64, "SettingsInvalid", "invalid-value"),
        (["--overlap", "2"], 64, "SettingsInvalid", "invalid-value"),
        (["--no-such-flag"], 64, "SettingsInvalid", "usage"),
        (["--device", "cuda:7"], 4, "BackendUnavailable", "no-such-device"),
        (["-m", "no-such-bundle"], 3, "BundleInvalid", "no-bundle"),
        (["-o", "/proc/nowhere"], 5, "NotWritten", "unwritable"),
    ],
)
def test_a_failure_has_its_exit_code_at_every_entry_point(
    entry_point, coarse_bundle, series, tmp_path, name, words, code, error, reason
):
    done = entry_point(name, ["-i", series, "-o", tmp_path / "out", "-m", coarse_bundle, *words])
    assert done.returncode == code, done.stderr
    assert f"{error} [{reason}]: " in done.stderr
    if words[0] in ("--engine", "--device", "-m"):  # the others are known before the run begins
        document = said_alone(tmp_path / "out")
        assert (document["status"], document["exit_code"], document["error"]["reason"]) == ("failed", code, reason)
    else:
        assert not (tmp_path / "out").exists()


def test_no_input_is_a_usage_error(entry_point):
    for name in ("run", "app"):
        done = entry_point(name, [])
        assert done.returncode == 64
        assert "HOLOSCAN_INPUT_PATH" in done.stderr


@pytest.fixture(scope="module")
def many_windows(coarse_bundle, tmp_path_factory) -> Path:
    """A bundle whose windows, one by one, take long enough to be interrupted."""
    folder = tmp_path_factory.mktemp("many-windows") / "bundle"
    shutil.copytree(coarse_bundle, folder)
    path = folder / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["inferer"] |= {"roi_size": [16] * 3, "overlap": 0.9, "sw_batch_size": 1}
    path.write_text(json.dumps(config))
    return folder


def threads_that_take(process: subprocess.Popen, sent: int) -> int:
    """How many threads of a process the system may choose for a signal."""
    blocked = []
    for status in Path(f"/proc/{process.pid}/task").glob("*/status"):
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
        blocked.append(int(line.split()[1], 16) >> (sent - 1) & 1)
    return blocked.count(0)


@pytest.mark.parametrize(("name", "sent"), [("run", signal.SIGTERM), ("app", signal.SIGINT)])
def test_an_interrupt_is_130_and_leaves_only_a_document_that_says_so(many_windows, series, tmp_path, name, sent):
    command = {"run": [BIN / "ctflow", "run"], "app": [sys.executable, "app"]}[name]
    # A shell that starts the tests in the background ignores SIGINT, and every child inherits that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            [*command, "-i", series, "-o", tmp_path / "out", "-m", many_windows],
            cwd=REPOSITORY, stderr=subprocess.PIPE, text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "2"},
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)
    for line in process.stderr:
        if line.startswith("segmenting windows"):
            break
    takers = threads_that_take(process, sent)
    process.send_signal(sent)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "interrupted" in rest
    assert name == "run" or takers == 1, "in a thread of OpenBLAS's, Holoscan's handler would run"
    document = said_alone(tmp_path / "out")
    assert (document["status"], document["exit_code"]) == ("interrupted", 130)
    assert [entry["error"]["reason"] for entry in document["series"]] == ["interrupted"]
