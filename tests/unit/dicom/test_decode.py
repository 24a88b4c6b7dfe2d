"""A long compressed series is decoded in processes: the same values, and a name for what goes wrong there."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless

from ctflow.dicom import decode
from ctflow.errors import BrokenSeries, UnsupportedPixels
from dicom_support import assembled, small_volume
from odd_series import transcode

SHAPE = (20, 32, 40)


@pytest.fixture
def folder(write, monkeypatch):
    monkeypatch.setattr(decode, "LEAST_SLICES", 20)
    monkeypatch.setattr(decode, "_cores", lambda: 2)
    folder = write(small_volume(shape=SHAPE))
    for path in folder.iterdir():
        transcode(path, JPEGLSLossless)
    return folder


def processes_of(folder, monkeypatch) -> list[int]:
    """Read the series, and how many processes took part."""
    pools = []
    real = decode.ProcessPoolExecutor

    def pool(workers, *arguments, **options):
        pools.append(workers)
        return real(workers, *arguments, **options)

    monkeypatch.setattr(decode, "ProcessPoolExecutor", pool)
    assert np.array_equal(assembled(folder).volume.array, small_volume(shape=SHAPE).array)
    return pools


def test_two_processes_give_the_same_volume(folder, monkeypatch):
    assert processes_of(folder, monkeypatch) == [2]


@pytest.mark.parametrize(("name", "value"), [("LEAST_SLICES", 21), ("_cores", lambda: 1)])
def test_a_short_series_or_a_single_core_needs_none(folder, monkeypatch, name, value):
    monkeypatch.setattr(decode, name, value)
    assert processes_of(folder, monkeypatch) == []


def test_a_damaged_frame_is_named_from_there_too(folder):
    path = folder / "00011.dcm"
    content = path.read_bytes()
    at = content.rindex(b"\xff\xd8\xff")
    path.write_bytes(content[:at] + bytes(20) + content[at + 20 :])
    with pytest.raises(UnsupportedPixels, match=r"00011\.dcm"):
        assembled(folder)


def test_a_decoder_that_dies_is_a_refusal(folder, monkeypatch):
    class Dying(decode.ProcessPoolExecutor):
        def submit(self, function, *_arguments):
            return super().submit(function) if function is int else super().submit(os._exit, 1)

    monkeypatch.setattr(decode, "ProcessPoolExecutor", Dying)
    with pytest.raises(UnsupportedPixels, match=r"00000\.dcm: .*ended its decoder"):
        assembled(folder)


def test_without_processes_one_does_it(folder, monkeypatch, caplog):
    def none(*_arguments, **_options):
        raise OSError(28, "no semaphores")

    monkeypatch.setattr(decode, "ProcessPoolExecutor", none)
    assert np.array_equal(assembled(folder).volume.array, small_volume(shape=SHAPE).array)
    assert "decoded in one process" in caplog.text


def test_a_slice_that_is_cut_short_is_named_from_there_too():
    error = BrokenSeries("00040.dcm has 2038 bytes", reason="unreadable")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, type(again)) == (str(error), "unreadable", BrokenSeries)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from ctflow.dicom import decode
from ctflow.dicom.assemble import assemble_series
from ctflow.dicom.scan import scan_folder
from ctflow.dicom.select import select_series
decode.LEAST_SLICES, decode._cores = 20, lambda: 2
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("begun")
if sys.argv[2] == "killed":
    real = decode._in_processes
    def interrupted(pool, *arguments):
        slices = real(pool, *arguments)
        yield next(slices)
        print(*pool._processes)
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    decode._in_processes = interrupted
(chosen,) = select_series(scan_folder(Path(sys.argv[1])), force=True).chosen
print(assemble_series(chosen.series).volume.array.shape, signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def run_script(folder, how):
    command = (sys.executable, "-", str(folder), how)
    return subprocess.run(command, check=False, input=SCRIPT, capture_output=True, text=True, timeout=60)


def test_a_script_from_standard_input_needs_no_guard_and_keeps_its_signals(folder):
    done = run_script(folder, "whole")
    assert done.stdout.splitlines() == ["begun", f"{SHAPE} True"], done.stderr


def test_processes_end_with_one_that_is_killed(folder):
    done = run_script(folder, "killed")
    workers = [int(pid) for pid in done.stdout.split()[1:]]
    assert workers, done.stderr
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in workers):
        assert time.monotonic() < until, "a worker outlived its parent"
        time.sleep(0.1)
