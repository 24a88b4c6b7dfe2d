"""Cases in processes: the same results and messages as one after another, and nothing left of a process that dies."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import resource
import shutil
import signal
import time
from contextlib import closing
from dataclasses import replace
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydicom import dcmread
from pydicom.dataset import Dataset

from ctflow.compat.python import bare_start
from ctflow.core.errors import BackendUnavailable
from ctflow.core.processes import begin_child
from ctflow.core.shared_memory import SharedMemory
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.pipeline import segmenter
from ctflow.pipeline.overlap import cases, process, processes
from ctflow.pipeline.overlap.messages import InOrder
from ctflow.pipeline.overlap.process import Write
from ctflow.pipeline.run import run_folder
from ctflow.settings.run import Settings
from ctflow.transforms import upload
from dicom_support import small_volume
from marking_support import MarkingSegmenter, marking_model

IN_TURN = Settings(device="cpu", cache=None, cases_in_flight=1, force=True)  # the series are small
TOGETHER = replace(IN_TURN, cases_in_flight=2)
COUNT = 3


@pytest.fixture(autouse=True)
def _marks(monkeypatch):
    monkeypatch.setattr(segmenter, "Segmenter", MarkingSegmenter)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Series of different sizes, so that memory is used again for smaller and larger ones; the second is damaged."""
    place = tmp_path_factory.mktemp("in")
    for seed, shape in enumerate([(9, 40, 48), (8, 32, 32), (12, 48, 64), (7, 24, 40)]):
        write_ct_series(small_volume(seed=seed, shape=shape), place / str(seed), seed=seed)
    path = place / "1" / "00003.dcm"
    path.write_bytes(path.read_bytes()[:-40])
    return place


def files(output: Path) -> dict[str, bytes]:
    """Every file's content; of documents without what a clock says."""
    found = {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith(("result.json", "report.html"))]:
        found[name] = re.sub(rb'("stage_seconds": ?\{[^}]*\}|\d+\.\d+ s\b|"(finished|started)[^,]*,)', b"", found[name])
    return found


def lines(caplog) -> list[tuple[str, str]]:
    found = [(record.name, re.sub(r"\d+\.\d s", "s", record.getMessage())) for record in caplog.records]
    caplog.clear()
    return found


def left_over(output: Path) -> list[str]:
    return [path.name for path in output.glob(".*") if path.name != ".superseded"]


def seen_while_segmenting(monkeypatch, look) -> list[int]:
    """What `look` returns at the start of each segmentation from now on."""
    seen: list[int] = []

    class Looking(MarkingSegmenter):
        def segment(self, *arguments, **options):
            seen.append(look())
            return super().segment(*arguments, **options)

    monkeypatch.setattr(segmenter, "Segmenter", Looking)
    return seen


def test_results_and_messages_are_those_of_one_after_another(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    expected = run_folder(folder, tmp_path / "1", marking_model(), IN_TURN)
    told = lines(caplog)
    report = run_folder(folder, tmp_path / "2", marking_model(), TOGETHER)
    assert (report.exit_code, [case.key for case in report.cases]) == (6, [case.key for case in expected.cases])
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert lines(caplog) == told
    assert len(told) > COUNT
    assert not multiprocessing.active_children()


def test_structure_sets_are_those_of_one_after_another(folder, tmp_path):
    for name, settings in (("1", IN_TURN), ("2", TOGETHER)):
        run_folder(folder, tmp_path / name, marking_model(), replace(settings, rtstruct=True))
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert len(list((tmp_path / "2").glob("*/structures.dcm"))) == COUNT


def test_volumes_are_pinned_for_gpus_once_a_view_and_unpinned(folder, tmp_path, monkeypatch):
    pinned: list[tuple[int, int]] = []
    unpinned: list[int] = []

    def pin(address: int, size: int):
        pinned.append((address, size))
        return lambda: unpinned.append(address)

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(upload, "pin_for_gpus", pin)
    run_folder(folder, tmp_path, marking_model(), TOGETHER)
    assert 2 <= len(pinned) <= COUNT
    assert unpinned
    assert sorted(unpinned) == sorted(address for address, _ in pinned)


def test_memory_is_unpinned_also_if_the_device_has_failed(monkeypatch):
    """Else the processes that come after it would not be ended."""
    unpinned: list[int] = []

    def failed(_device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runtime = SimpleNamespace(cudaHostRegister=lambda *_: 0, cudaHostUnregister=unpinned.append)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    with closing(SharedMemory()) as memory:
        memory.allocate((5000,), "u1")
        memory.pin(upload.pin_for_gpus)
    assert len(unpinned) == 1


def test_beside_a_gpu_torch_uses_the_share_of_one_process(folder, tmp_path, monkeypatch):
    seen = seen_while_segmenting(monkeypatch, torch.get_num_threads)
    monkeypatch.setattr(processes, "usable_cpus", lambda: 6)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        run_folder(folder, tmp_path / "cpu", marking_model(), TOGETHER)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(upload, "pin_for_gpus", lambda *_: None)
        run_folder(folder, tmp_path / "gpu", marking_model(), TOGETHER)
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert seen == [4] * COUNT + [3] * COUNT


def test_a_line_of_a_case_whose_lines_have_all_been_shown_is_shown_at_once(caplog):
    """The application asks for no further case after the last one, and then says what it left out."""
    messages = InOrder(1)
    messages.open()
    messages.current = 0
    messages.finish(0)
    logging.getLogger("ctflow").warning("afterwards")
    assert "afterwards" in caplog.text
    messages.close()


def test_progress_is_that_of_one_after_another_for_each_case(folder, tmp_path):
    stages: dict[int, list[str]] = {}
    for count in (1, 2):
        steps = stages[count] = []
        settings = replace(IN_TURN, cases_in_flight=count)
        run_folder(
            folder,
            tmp_path / str(count),
            marking_model(),
            settings,
            lambda stage, done, total, to=steps: to.append(stage),
        )
    assert set(stages[1]) == set(stages[2])
    assert stages[1].count("write") == stages[2].count("write")


def test_no_more_cases_are_in_memory_than_asked_for(folder, tmp_path, monkeypatch):
    alive = seen_while_segmenting(monkeypatch, lambda: len(multiprocessing.active_children()))
    run_folder(folder, tmp_path, marking_model(), TOGETHER)
    assert len(alive) == COUNT
    assert 1 <= max(alive) <= 2


@pytest.mark.parametrize("when", ["segmented", "written"])
def test_a_process_that_dies_fails_its_case_alone(folder, tmp_path, monkeypatch, when, caplog):
    expected = run_folder(folder, tmp_path / "1", marking_model(), IN_TURN)
    place = max(place for place, case in enumerate(expected.cases) if case.error is None)
    victim = expected.cases[place]
    real = processes.CasesInProcesses._send

    def killing(self, process, word):
        is_it = process.place is not None and process.place.case.key == victim.key
        if is_it and when == "written" and isinstance(word, Write):
            real(self, process, word)
        if is_it and isinstance(word, Write):
            os.kill(process.process.pid, signal.SIGKILL)
            return False
        return real(self, process, word)

    monkeypatch.setattr(processes.CasesInProcesses, "_send", killing)
    caplog.clear()
    report = run_folder(folder, tmp_path / "2", marking_model(), TOGETHER)
    if report.cases[place].error is None:  # it had written before it was killed
        assert when == "written"
        return
    assert isinstance(report.cases[place].error, BackendUnavailable)
    assert report.cases[place].error.reason == "worker-ended"
    assert report.exit_code == 6
    others = [number for number in range(len(expected.cases)) if number != place]
    for number in others:
        assert (report.cases[number].error is None) == (expected.cases[number].error is None)
    assert not (tmp_path / "2" / victim.key).exists()
    assert not left_over(tmp_path / "2")
    assert "SIGKILL" in caplog.text
    document = json.loads((tmp_path / "2" / "result.json").read_text())
    assert [series["status"] for series in document["series"]].count("done") == COUNT - 1
    assert document["series"][place]["error"]["reason"] == "worker-ended"


def test_a_process_that_dies_without_a_case_fails_none(folder, tmp_path, monkeypatch):
    killed: list[int] = []

    def killing(self, real=processes.CasesInProcesses._give):
        ready = [each.process for each in self._processes if each.is_ready]
        if ready and not killed:
            killed.append(ready[0].pid)
            ready[0].kill()
            ready[0].join()
        real(self)

    monkeypatch.setattr(processes.CasesInProcesses, "_give", killing)
    report = run_folder(folder, tmp_path, marking_model(), TOGETHER)
    assert killed
    assert sum(case.error is None for case in report.cases) == COUNT


def test_an_interruption_leaves_no_process_and_nothing_half_written(folder, tmp_path, monkeypatch):
    class Interrupted(MarkingSegmenter):
        calls = 0

        def segment(self, *arguments, **options):
            Interrupted.calls += 1
            if Interrupted.calls == 2:
                raise KeyboardInterrupt
            return super().segment(*arguments, **options)

    monkeypatch.setattr(segmenter, "Segmenter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_folder(folder, tmp_path, marking_model(), TOGETHER)
    assert not multiprocessing.active_children()
    assert not left_over(tmp_path)
    document = json.loads((tmp_path / "result.json").read_text())
    assert (document["status"], document["exit_code"]) == ("interrupted", 130)
    shown = {path.name for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")}
    assert shown == {series["folder"] for series in document["series"] if series["status"] == "done"}


def test_without_processes_this_one_does_it(folder, tmp_path, monkeypatch, caplog):
    def none(*_arguments, **_options):
        raise OSError(11, "no more processes")

    run_folder(folder, tmp_path / "1", marking_model(), IN_TURN)
    monkeypatch.setattr(SpawnProcess, "start", none)
    run_folder(folder, tmp_path / "2", marking_model(), TOGETHER)
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert caplog.text.count("no process starts for a case") == 1


def test_headers_that_pickle_refuses_stay_here(folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "in")
    path = tmp_path / "in" / "0" / "00001.dcm"
    nested = Dataset()
    for _ in range(120):
        nested, inner = Dataset(), nested
        nested.ConceptCodeSequence = [inner]
        nested["ConceptCodeSequence"].is_undefined_length = True  # pydicom parses it at once
    dataset = dcmread(path)
    dataset.RequestAttributesSequence = [nested]
    dataset["RequestAttributesSequence"].is_undefined_length = True
    dataset.save_as(path)
    reports = [
        run_folder(tmp_path / "in", tmp_path / str(settings.cases_in_flight), marking_model(), settings)
        for settings in (IN_TURN, TOGETHER)
    ]
    assert [report.exit_code for report in reports] == [6, 6]
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert caplog.text.count("RecursionError") == 1


def test_processes_that_never_begin_are_done_without(folder, tmp_path, monkeypatch, caplog):
    run_folder(folder, tmp_path / "1", marking_model(), IN_TURN)
    monkeypatch.setattr("ctflow.pipeline.overlap.place.run_case_process", never_begins)
    run_folder(folder, tmp_path / "2", marking_model(), TOGETHER)
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert caplog.text.count("no process starts for a case") == 1


def test_failing_starts_leave_no_file_open(folder, tmp_path, monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    for failing in ("none", "some"):
        made = []

        class Limited(SharedMemory):
            def __init__(self, *arguments, made=made, failing=failing):
                made.append(self)
                if failing == "some" and len(made) % 3 == 0:
                    raise OSError(24, "too many open files")
                super().__init__(*arguments)

        def none(*_arguments, **_options):
            raise OSError(11, "no more processes")

        monkeypatch.setattr(process, "SharedMemory", Limited)
        monkeypatch.setattr(SpawnProcess, "start", none)
        run_folder(folder, tmp_path, marking_model(), TOGETHER)
        assert len(made) > COUNT
    assert len(os.listdir("/proc/self/fd")) <= before + 1  # that of Python's resource tracker


def test_a_limit_of_open_files_limits_the_processes(folder, tmp_path, monkeypatch):
    alive = seen_while_segmenting(monkeypatch, lambda: len(multiprocessing.active_children()))
    most, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, limit))
    try:
        run_folder(folder, tmp_path, marking_model(), replace(TOGETHER, cases_in_flight=12))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limit))
    assert 1 <= max(alive) <= 2


def test_a_volume_that_this_process_cannot_map_fails_its_case_alone(folder, tmp_path, monkeypatch):
    def short(case, told, memory, real=processes.loaded_case):
        if case.candidate.series.instances[0].header.Rows == 48:
            raise MemoryError
        return real(case, told, memory)

    monkeypatch.setattr(processes, "loaded_case", short)
    report = run_folder(folder, tmp_path, marking_model(), TOGETHER)
    reasons = [case.error and case.error.reason for case in report.cases]
    assert sorted(map(str, reasons)) == ["None"] * (COUNT - 1) + ["out-of-memory", "unreadable"]


def test_a_second_interruption_still_ends_the_processes(folder, tmp_path, monkeypatch):
    class Interrupted(MarkingSegmenter):
        def segment(self, *arguments, **options):
            monkeypatch.setattr(SpawnProcess, "terminate", interrupt)
            raise KeyboardInterrupt

    def interrupt(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(segmenter, "Segmenter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_folder(folder, tmp_path, marking_model(), TOGETHER)
    assert not multiprocessing.active_children()
    assert not left_over(tmp_path)


def test_what_a_terminal_sends_does_not_reach_a_process_that_starts(capfd):
    process = multiprocessing.get_context("spawn").Process(target=begins_late)
    with bare_start():
        process.start()
    for sent in (signal.SIGINT, signal.SIGHUP):
        os.kill(process.pid, sent)
    process.join()
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGHUP}


def begins_late() -> None:
    """A process that its start keeps busy for a while."""
    time.sleep(0.2)
    begin_child()


def test_a_daemonic_process_has_none(tmp_path, monkeypatch):
    write_ct_series(small_volume(), tmp_path / "in", seed=0)
    monkeypatch.setattr(multiprocessing.process._current_process, "_config", {"daemon": True, "authkey": b""})
    with cases.CasesOfRun(TOGETHER, tmp_path, lambda *_: None) as found:
        found.begin(cases_of(tmp_path / "in"), early=True)
        assert isinstance(found._cases, cases.CasesInTurn)


def never_begins(*_arguments, **_options) -> None:
    """In place of a case's process: it ends at once."""


def test_one_case_needs_no_process_unless_it_begins_early(tmp_path):
    write_ct_series(small_volume(), tmp_path / "in", seed=0)
    kinds = []
    for early in (False, True):
        with cases.CasesOfRun(replace(IN_TURN, cases_in_flight=None), tmp_path, lambda *_: None) as found:
            (case,) = cases_of(tmp_path / "in")
            found.begin([case], early=early)
            kinds.append(type(found._cases))
    assert kinds == [cases.CasesInTurn, processes.CasesInProcesses]


def cases_of(folder: Path):
    from ctflow.pipeline.case import find_cases  # noqa: PLC0415

    return find_cases(folder, marking_model().spec, IN_TURN).cases
