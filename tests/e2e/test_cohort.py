"""A cohort loses no row and makes none twice, whenever its process is killed; the command line from tree to results."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from pyarrow import parquet

from bundle_support import small_unet_bundle
from cohort_support import run_marking, write_cohort
from ctflow.dicom.write.ct_series import write_ct_series
from phantom_support import phantom_drawn_once

pytestmark = pytest.mark.e2e
PROGRAM = Path(__file__).parents[1] / "cohort_support.py"
ROWS, KILLS = 12, 4
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(manifest: Path, output: Path, part: str) -> subprocess.Popen[str]:
    command = [sys.executable, PROGRAM, manifest, output, part]
    return subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def marks(output: Path) -> dict[str, dict]:
    """The markers by row; one a row."""
    paths = list((output / "rows").glob("*.json")) if output.is_dir() else []
    found = [json.loads(path.read_text()) for path in paths if not path.name.startswith(".")]
    assert len({each["id"] for each in found}) == len(found), "a row is there twice"
    return {each["id"]: each for each in found}


def wait_for_more(process: subprocess.Popen[str], output: Path, before: int) -> None:
    deadline = time.monotonic() + 240
    while len(marks(output)) <= before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_kill_9_at_random_moments_loses_no_row_and_makes_none_twice(tmp_path):
    manifest = write_cohort(tmp_path / "in", ROWS)
    expected = tmp_path / "expected"
    assert run_marking(manifest, expected).exit_code == 0
    draws, output, kills, done_before = random.Random(3), tmp_path / "out", 0, 0
    while kills < KILLS:
        before = marks(output)
        process = started(manifest, output, "1/1")
        wait_for_more(process, output, len(before))
        time.sleep(draws.uniform(0, 0.3))
        if process.poll() is not None:
            break  # all rows were done faster than that
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        after = marks(output)
        assert before.items() <= after.items(), "a committed row was computed again"
        for row, mark in after.items():  # a marker never comes before its result
            assert list((output / "results" / row).rglob("segmentation.dcm")), row
            assert mark["status"] == "done"
        done_before = len(after)
    assert kills >= 3
    assert 0 < done_before <= ROWS
    process = started(manifest, output, "1/1")
    told = process.communicate(timeout=240)[1]
    assert process.returncode == 0, told
    digests = [{row: mark["digest"] for row, mark in marks(folder).items()} for folder in (output, expected)]
    assert digests[0] == digests[1]
    assert len(digests[0]) == ROWS
    assert sorted(path.name for path in (output / "results").iterdir()) == sorted(digests[0])
    assert not [each for each in (output / ".work").iterdir() if each.is_dir()]
    assert not list((output / "begun").iterdir())


def test_ctrl_c_ends_a_run_with_130_and_nothing_half_written(tmp_path):
    manifest, output = write_cohort(tmp_path / "in", ROWS), tmp_path / "out"
    process = started(manifest, output, "1/1")
    wait_for_more(process, output, 0)
    process.send_signal(signal.SIGINT)
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told
    found = marks(output)
    assert 0 < len(found) < ROWS
    assert sorted(path.name for path in (output / "results").iterdir()) == sorted(found)
    assert not [each for each in (output / ".work").iterdir() if each.is_dir()]
    assert not list((output / "begun").iterdir())


def test_the_command_line_from_a_folder_tree_to_results(tmp_path):
    bundle = small_unet_bundle(tmp_path / "bundle")
    for seed in range(2):
        write_ct_series(phantom_drawn_once(seed, (24, 96, 96)).volume, tmp_path / "in" / str(seed), seed=seed)

    def ctflow(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ctflow", *map(str, words)]
        environment = {**ENVIRONMENT, "CTFLOW_ENGINE": "eager", "CTFLOW_CACHE": ""}
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)

    done = ctflow("cohort", "manifest", tmp_path / "in", "-o", tmp_path / "m.csv", "--digests")
    assert (done.returncode, done.stdout.startswith("2 series in ")) == (0, True), done.stderr
    done = ctflow("cohort", "run", tmp_path / "m.csv", "-o", tmp_path / "out", "-m", bundle)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "2 rows: 2 done"), done.stderr
    assert {"cohort.html", "cohort.parquet", "findings.parquet"} <= {each.name for each in (tmp_path / "out").iterdir()}
    assert parquet.read_table(tmp_path / "out" / "cohort.parquet")["status"].to_pylist() == ["done", "done"]
    assert len(list((tmp_path / "out" / "results").rglob("segmentation.dcm"))) == 2
    done = ctflow("cohort", "run", tmp_path / "m.csv", "-o", tmp_path / "out", "-m", bundle)
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, "2 rows: 2 done (2 before this run)"), done.stderr
    done = ctflow("cohort", "run", tmp_path / "m.csv", "-o", tmp_path / "out", "-m", bundle, "--part", "3/2")
    assert (done.returncode, "[invalid-value]" in done.stderr) == (64, True)
    done = ctflow("cohort", "run", tmp_path / "m.csv", "-o", "ftp://host/x", "-m", bundle)
    assert (done.returncode, "[invalid-value]" in done.stderr) == (64, True)
