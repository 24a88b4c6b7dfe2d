"""A long compressed series is decoded in processes: the same values, and a name for what goes wrong there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path

import numpy as np
import pytest
from pydicom.uid import JPEGLSLossless

import decoder_support
from ctflow.core.errors import BrokenSeries, UnsupportedPixels
from ctflow.core.shared_memory import SharedMemory
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.pixels import decode
from ctflow.dicom.read.pixels.stored import pixel_format_of, read_stored
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
from decoder_support import SPECIAL
from dicom_support import assembled, small_volume
from odd_series import transcode
from reasons import raises_reason, reasons_of_log

SHAPE = (20, 32, 40)


@pytest.fixture
def folder(write, monkeypatch):
    monkeypatch.setattr(decode, "LEAST_SLICES", 20)
    monkeypatch.setattr(decode, "usable_cpus", lambda: 2)
    folder = write(small_volume(shape=SHAPE))
    for path in folder.iterdir():
        transcode(path, JPEGLSLossless)
    return folder


def decoders(monkeypatch) -> list[list[int]]:
    """The process numbers of every reader that starts some from here on."""
    started = []
    real = decode.SliceReader._start

    def start(self, count):
        real(self, count)
        started.append([decoder.process.pid for decoder in self._decoders])

    monkeypatch.setattr(decode.SliceReader, "_start", start)
    return started


def have_ended(pids) -> bool:
    return len(pids) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in pids)


def is_right(folder) -> bool:
    return np.array_equal(assembled(folder).volume.array, small_volume(shape=SHAPE).array)


def test_two_processes_give_the_same_volume_and_end(folder, monkeypatch):
    started = decoders(monkeypatch)
    assert is_right(folder)  # Python starts a helper beside the first process, which stays
    open_files = len(os.listdir("/proc/self/fd"))
    assert is_right(folder)
    assert [have_ended(pids) for pids in started] == [True, True]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_they_hold_no_more_slices_than_there_is_room_for(folder, monkeypatch):
    (candidate,) = select_series(scan_folder(folder), force=True).selected
    instances = candidate.series.instances
    forms = [pixel_format_of(instance) for instance in instances]
    with closing(decode.SliceReader(instances)) as reader:
        for d, values in enumerate(reader.read(instances, forms, *SHAPE[1:])):
            given = [number for decoder in reader._decoders for number in decoder.given]
            assert len(given) <= 4
            assert max(given, default=0) < d + 6
            assert np.array_equal(values, read_stored(instances[d], forms[d], *SHAPE[1:]))


@pytest.mark.parametrize(("name", "value"), [("LEAST_SLICES", 21), ("usable_cpus", lambda: 1)])
def test_a_short_series_or_a_single_core_needs_none(folder, monkeypatch, name, value):
    monkeypatch.setattr(decode, name, value)
    started = decoders(monkeypatch)
    assert is_right(folder)
    assert started == []


def test_a_broken_series_leaves_no_process(folder, monkeypatch):
    (folder / "00010.dcm").unlink()
    monkeypatch.setattr(decode, "LEAST_SLICES", 19)
    started = decoders(monkeypatch)
    with raises_reason(BrokenSeries, "gap"):
        assembled(folder)
    assert have_ended(*started)


def test_a_damaged_frame_is_named_from_there_too(folder):
    path = folder / "00011.dcm"
    content = path.read_bytes()
    at = content.rindex(b"\xff\xd8\xff")
    path.write_bytes(content[:at] + bytes(20) + content[at + 20 :])
    with raises_reason(UnsupportedPixels, "damaged-frame", names="00011.dcm"):
        assembled(folder)


def test_a_slice_that_ends_its_decoder_is_named(folder, monkeypatch):
    monkeypatch.setattr(decode, "run_decoder", decoder_support.dies_of_a_slice)
    with raises_reason(UnsupportedPixels, "decoder-ended", names=SPECIAL):
        assembled(folder)


def test_an_unexpected_error_arrives_as_what_it_is(folder, monkeypatch):
    monkeypatch.setattr(decode, "run_decoder", decoder_support.fails_unexpectedly)
    with pytest.raises(ZeroDivisionError):
        assembled(folder)


def test_an_interruption_does_not_wait_for_a_decoder_that_hangs(folder, monkeypatch):
    monkeypatch.setattr(decode, "run_decoder", decoder_support.hangs_in_a_slice)
    started = decoders(monkeypatch)
    (candidate,) = select_series(scan_folder(folder), force=True).selected

    def interrupting(_stage, done, _total):
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        assemble_series(candidate.series, interrupting)
    assert have_ended(*started)


def test_an_interruption_while_they_start_leaves_none(folder, monkeypatch):
    started = []
    real = SpawnProcess.start

    def start(self):
        if started:
            raise KeyboardInterrupt
        real(self)
        started.append(self.pid)

    monkeypatch.setattr(SpawnProcess, "start", start)
    with pytest.raises(KeyboardInterrupt):
        assembled(folder)
    assert not Path(f"/proc/{started[0]}").exists()


def test_processes_that_never_begin_are_done_without(folder, monkeypatch, caplog):
    monkeypatch.setattr(decode, "run_decoder", decoder_support.never_begins)
    assert is_right(folder)
    assert reasons_of_log(caplog) == ["decoders-ended"]


@pytest.mark.parametrize(("module", "name"), [(decode, "SharedMemory"), (os, "ftruncate"), (SpawnProcess, "start")])
def test_without_processes_or_memory_for_them_one_does_it(folder, monkeypatch, caplog, module, name):
    def none(*_arguments, **_options):
        raise OSError(28, "no space")

    monkeypatch.setattr(module, name, none)
    assert is_right(folder)
    assert reasons_of_log(caplog) == ["no-decoder"]


def test_a_system_without_memory_files_has_a_temporary_one(folder, monkeypatch):
    def forbidden(*_arguments):
        raise PermissionError(1, "not here")

    monkeypatch.setattr(os, "memfd_create", forbidden)
    started = decoders(monkeypatch)
    assert is_right(folder)
    assert len(started) == 1


def test_a_decoder_answers_until_its_pipe_is_closed(folder, monkeypatch):
    monkeypatch.setattr(decode, "begin_child", lambda: None)  # this process is nobody's child
    (candidate,) = select_series(scan_folder(folder), force=True).selected
    instance = candidate.series.instances[0]
    form, shape = pixel_format_of(instance), (2, *SHAPE[1:])
    ours, theirs = multiprocessing.Pipe()
    with closing(SharedMemory()) as room, closing(theirs):
        slots = room.allocate(shape, np.uint16)
        thread = threading.Thread(target=decode.run_decoder, args=(theirs, room))
        thread.start()
        with closing(ours):
            assert ours.recv() is None
            ours.send((instance, form, 1, shape))
            assert ours.recv() is None
            ours.send((replace(instance, transfer_syntax="1.2.3"), form, 0, shape))
            assert isinstance(ours.recv(), UnsupportedPixels)
        thread.join()
    assert np.array_equal(slots[1], read_stored(instance, form, *SHAPE[1:]))
    assert not slots[0].any()


def test_a_slice_that_is_cut_short_is_named_from_there_too():
    error = BrokenSeries("00040.dcm has 2038 bytes", reason="unreadable")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.reason, type(again)) == (str(error), "unreadable", BrokenSeries)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from ctflow.dicom.read.pixels import decode
from ctflow.dicom.read.assemble import assemble_series
from ctflow.dicom.read.scan import scan_folder
from ctflow.dicom.read.select.selection import select_series
decode.LEAST_SLICES, decode.usable_cpus = 20, lambda: 2
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
print("begun")
if sys.argv[2] == "killed":
    real = decode.SliceReader.read
    def interrupted(self, *arguments):
        slices = real(self, *arguments)
        yield next(slices)
        print(*[decoder.process.pid for decoder in self._decoders])
        sys.stdout.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    decode.SliceReader.read = interrupted
(chosen,) = select_series(scan_folder(Path(sys.argv[1])), force=True).selected
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
