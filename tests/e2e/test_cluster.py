"""A cohort on Ray loses no row and makes none twice, whichever process is killed, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster_proof import PROGRAM, Trial, killed, write_series
from ctflow.cohort.manifest.rows import CohortRow, write_manifest

pytestmark = pytest.mark.e2e
ROWS = 40
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def left_over() -> list[Path]:
    return [*Path(tempfile.gettempdir()).glob("ctflow-ray-*"), *Path("/dev/shm").glob("*plasma*")]


def descendants(pid: int) -> Iterator[int]:
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in path.read_text().split():
            yield int(child)
            yield from descendants(int(child))


def listening(pids: set[int]) -> set[str]:
    """Addresses at which these processes listen, in hexadecimal digits as /proc has them."""
    sockets = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = str(path.readlink())
            except FileNotFoundError:
                continue
            if target.startswith("socket:["):
                sockets.add(target[len("socket:[") : -1])
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and words[9] in sockets:
                found.add(words[1].split(":")[0])
    return found


def wait_for_end(pids: set[int]) -> set[int]:
    """Those that are still there after a while; a process that only waits to be reaped has ended."""
    deadline, running = time.monotonic() + 90, set(pids)
    while running and time.monotonic() < deadline:
        time.sleep(0.2)
        running = {pid for pid in running if is_running(pid)}
    return running


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_local_ray_listens_on_loopback_and_ends_with_its_driver_however_that_ends(tmp_path):
    (tmp_path / "in").mkdir()
    write_series(tmp_path / "in", 2)
    lines = [CohortRow(f"row-{number}", f"s{number % 2}") for number in range(ROWS)]
    write_manifest(lines, tmp_path / "in" / "manifest.csv")
    trial = Trial(tmp_path, "", {})
    before = set(left_over())
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9), (None, 0)):
        command = [sys.executable, PROGRAM, tmp_path / "in" / "manifest.csv", trial.output, "", "0.2"]
        with (tmp_path / "driver.log").open("wb") as log:
            trial.driver = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        if number is not None:
            assert trial.wait_for_more(1, 120)
            started = set(descendants(trial.driver.pid))
            assert len(started) >= 4, "Ray's processes, a worker and its own"
            assert listening(started) <= LOOPBACK
            # Ctrl-C reaches all processes of the terminal.
            os.killpg(trial.driver.pid, number) if number == signal.SIGINT else trial.driver.send_signal(number)
        assert trial.driver.wait(120) == code, (tmp_path / "driver.log").read_text()
        assert not wait_for_end(started)
        told = (tmp_path / "driver.log").read_text()
        assert "Traceback" not in told
        assert "(raylet)" not in told
        if number != signal.SIGKILL:  # what that leaves, the next start removes
            assert set(left_over()) <= before
    assert (trial.look(), trial.changed) == (ROWS, 0)
    assert not [each for each in (trial.output / ".work").iterdir() if each.is_dir()]
    assert not list((trial.output / "begun").iterdir())


def test_kill_9_of_workers_raylets_and_the_driver_loses_no_row_and_makes_none_twice(tmp_path):
    found = killed(tmp_path, ROWS, 2, 3, 1, seed=0)
    assert found["kills"] == {"actor": 1, "raylet": 1, "driver": 1}
    assert found["kinds"]["killer"] == 1
    assert (found["lost"], found["double"], found["committed_again"], found["results_that_differ"]) == (0, 0, 0, 0)
    assert (found["without_result"], found["results_too_many"], found["other_than_expected"]) == (0, 0, {})
    assert (found["notes_left"], found["work_left"], found["processes_left"]) == (0, 0, 0)
    assert found["exit_code"] == 6
    told = (tmp_path / "driver.log").read_text()
    assert "its machine was lost" in told
    assert "it was killed" in told
