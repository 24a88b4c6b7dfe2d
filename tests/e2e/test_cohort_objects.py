"""A cohort whose results go to an object store loses no row and makes none twice, whenever its process is killed."""

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

from cohort_support import run_marking, write_cohort
from object_store_support import BUCKET, ENVIRONMENT, object_store

pytestmark = [pytest.mark.e2e, pytest.mark.exhaustive]
PROGRAM = Path(__file__).parents[1] / "cohort_support.py"
ROWS, KILLS = 10, 5


def digests_of_folder(output: Path) -> dict[str, str]:
    found = [json.loads(path.read_text()) for path in (output / "rows").glob("*.json")]
    return {mark["id"]: mark["digest"] for mark in found}


def test_kill_9_at_random_moments_loses_no_row_and_makes_none_twice(tmp_path):
    manifest = write_cohort(tmp_path / "in", ROWS)
    assert run_marking(manifest, tmp_path / "expected").exit_code == 0
    (tmp_path / "tmp").mkdir()
    draws, kills = random.Random(7), 0
    with object_store() as store:
        environment = {**os.environ, **ENVIRONMENT, "AWS_ENDPOINT_URL_S3": store.url, "TMPDIR": str(tmp_path / "tmp")}
        command = [sys.executable, PROGRAM, manifest, f"s3://{BUCKET}/out", "1/1"]

        def marks() -> dict[str, str]:
            found = [json.loads(store.content(key)) for key in store.keys("out/rows/")]
            assert len({mark["id"] for mark in found}) == len(found), "a row is there twice"
            return {mark["id"]: mark["digest"] for mark in found}

        # Slow enough that a kill meets a result between its first object and its marker.
        store.fault = lambda method, _path: 0.05 if method == "PUT" else None
        while kills < KILLS:
            before = marks()
            process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            deadline = time.monotonic() + 240
            while len(store.keys("out/begun/")) == 0 and process.poll() is None:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            time.sleep(draws.uniform(0.5, 3))
            if process.poll() is not None:
                break  # all rows were done faster than that
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            after = marks()
            assert before.items() <= after.items(), "a committed row was computed again"
            for row in after:
                names = {key.rpartition("/")[2] for key in store.keys(f"out/results/{row}/")}
                assert {"result.json", "segmentation.dcm"} <= names, "a marker came before its result"
        assert kills >= 2
        store.fault = lambda _method, _path: None
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)
        assert done.returncode == 0, done.stderr
        assert marks() == digests_of_folder(tmp_path / "expected")
        assert store.keys("out/begun/") == []
    assert not [each for each in (tmp_path / "tmp").glob("ctflow-*/work/*") if each.is_dir()]
