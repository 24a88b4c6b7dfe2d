"""Tasks that overlap in a worker: the answers and files of one after another, and nothing left of what ends early."""

from __future__ import annotations

import gc
import multiprocessing
import os
import re
import shutil
import signal
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.node.journal.records import InstanceRecord, Job
from ctflow.node.journal.writes import digest_of_set
from ctflow.node.rules import Rule
from ctflow.node.work.messages import Setup, Task
from ctflow.node.work.overlapping import OverlappingTasks, tasks_at_a_time
from ctflow.node.work.worker import run_task
from ctflow.pipeline.overlap import processes
from ctflow.pipeline.overlap.process import Write
from ctflow.settings.run import Settings
from dicom_support import small_volume, write_volumes
from marking_support import MarkingSegmenter, OnlyModel, marking_model
from service_support import PATIENCE_S, wait_until

SETUP = Setup(None, Settings(device="cpu", cache=None), (Rule("run", force=True),))  # the series are small
SHAPES = ((9, 40, 48), (12, 48, 64), (7, 24, 40))


class Worker:
    """Overlapping tasks in a thread, the pipe's other end, and their answers by key."""

    def __init__(self, segmenter=None) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        self.answers = {}
        model = marking_model()
        segmenter = segmenter or MarkingSegmenter(model, SETUP.settings)
        self.tasks = OverlappingTasks(theirs, self.take, SETUP, OnlyModel(model, segmenter), 2)
        self.thread = threading.Thread(target=self.tasks.run)
        self.thread.start()

    def take(self, answer) -> None:
        assert answer.key not in self.answers, "a task has one answer"
        self.answers[answer.key] = answer.outcome

    def run(self, *tasks) -> dict[str, str]:
        for task in tasks:
            self.answers.pop(task.job.key, None)
            self.pipe.send(task)
        wait_until(lambda: {task.job.key for task in tasks} <= set(self.answers), "all are answered")
        return {task.job.key: self.answers[task.job.key].kind for task in tasks}

    def end(self) -> None:
        self.pipe.close()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        assert not multiprocessing.active_children()


@pytest.fixture
def started():
    workers = []

    def start(segmenter=None) -> Worker:
        workers.append(Worker(segmenter))
        return workers[-1]

    yield start
    for worker in workers:
        worker.end()


@pytest.fixture(scope="module")
def inboxes(tmp_path_factory):
    place = tmp_path_factory.mktemp("in")
    for seed, shape in enumerate(SHAPES):
        write_ct_series(small_volume(seed=seed, shape=shape), place / str(seed), seed=seed)
    write_volumes(place / "phases", *({"NominalPercentageOfCardiacPhase": percent} for percent in (40, 75)))
    shutil.copytree(place / "0", place / "damaged")
    (place / "damaged" / "00003.dcm").write_bytes(b"damaged")
    return place


def task_of(inbox: Path, place: Path) -> Task:
    instances = tuple(
        InstanceRecord(f"{inbox.name}.{n}", "1.2", "1.2.1", path.name, 1, "s", 0.0)
        for n, path in enumerate(sorted(inbox.iterdir()))
    )
    set_digest = digest_of_set([each.sop_instance_uid for each in instances])
    job = Job(f"key{inbox.name}", f"1.2.{inbox.name}", set_digest, instances, 1, None)
    return Task(job, inbox, place / "results", place / "running" / job.key, "ROUTER")


def tasks_in(inboxes: Path, place: Path) -> list[Task]:
    return [task_of(inbox, place) for inbox in sorted(inboxes.iterdir())]


def files(place: Path) -> dict[str, bytes]:
    """Every file's content; of documents without what a clock says."""
    found = {str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith(("result.json", "report.html"))]:
        found[name] = re.sub(rb'("stage_seconds": ?\{[^}]*\}|\d+\.\d+ s\b|"(finished|started)[^,]*,)', b"", found[name])
    return found


def test_answers_and_files_are_those_of_one_after_another(inboxes, tmp_path, started):
    model = marking_model()
    segmenter = MarkingSegmenter(model, SETUP.settings)
    expected = [run_task(task, SETUP, OnlyModel(model, segmenter)) for task in tasks_in(inboxes, tmp_path / "1")]
    tasks, worker = tasks_in(inboxes, tmp_path / "2"), started()
    kinds = worker.run(*tasks)
    assert [*kinds.values()] == [each.kind for each in expected] == ["done", "done", "done", "aside", "done"]
    for task, outcome in zip(tasks, expected, strict=True):
        found = worker.answers[task.job.key]
        assert found.why == outcome.why
        assert (found.result and replace(found.result, elapsed_s=0)) == (
            outcome.result and replace(outcome.result, elapsed_s=0)
        )
        assert not task.scratch.exists()
    assert files(tmp_path / "2") == files(tmp_path / "1")
    assert len(files(tmp_path / "2")) == len(SHAPES) * 5 + 2 * 5 + 1
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("segmentation.dcm")}
    assert worker.run(*tasks) == kinds, "the node ended before the journal knew: the same answers"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("segmentation.dcm")} == written
    wait_until(lambda: worker.tasks._cases.done == (), "no case is kept")


def test_the_next_series_is_read_while_one_is_segmented(inboxes, tmp_path, started):
    cases, both, segmented = [], threading.Event(), []

    class Waiting(MarkingSegmenter):
        def segment(self, volume, *arguments, **options):
            segmented.append(volume.geometry.shape)
            wait_until(lambda: sum("loaded" in times for times in cases[0].times_s) > 1 or both.is_set(), "two")
            both.set()
            return super().segment(volume, *arguments, **options)

    worker = started(Waiting(marking_model(), SETUP.settings))
    cases.append(worker.tasks._cases)
    tasks = tasks_in(inboxes, tmp_path)[: len(SHAPES)]
    assert set(worker.run(*tasks).values()) == {"done"}
    assert segmented == [*SHAPES], "in the order of the tasks"


def test_a_process_that_is_killed_fails_its_series_alone_which_is_then_tried_again(
    inboxes, tmp_path, started, monkeypatch
):
    real, tasks = processes.CasesInProcesses._send, tasks_in(inboxes, tmp_path)[: len(SHAPES)]
    victims = [tasks[1].job]

    def killing(self, process, word):
        is_it = victims and process.place is not None and process.place.output.name == victims[0].key
        if is_it and isinstance(word, Write):
            victims.clear()
            os.kill(process.process.pid, signal.SIGKILL)
            return True
        return real(self, process, word)

    monkeypatch.setattr(processes.CasesInProcesses, "_send", killing)
    worker = started()
    assert [*worker.run(*tasks).values()] == ["done", "again", "done"]
    outcome = worker.answers[tasks[1].job.key]
    assert (outcome.why.reason, outcome.is_sound) == ("worker-ended", True)
    assert "SIGKILL" in outcome.why.message
    assert not list((tmp_path / "results" / tasks[1].job.key).rglob("*"))
    assert [*worker.run(tasks[1]).values()] == ["done"]


def test_a_pipe_that_closes_in_the_middle_leaves_no_process_no_memory_and_nothing_half_written(inboxes, tmp_path):
    reached, go_on = threading.Event(), threading.Event()

    class Slow(MarkingSegmenter):
        def segment(self, *arguments, **options):
            reached.set()
            assert go_on.wait(PATIENCE_S)
            return super().segment(*arguments, **options)

    before = memories()
    worker = Worker(Slow(marking_model(), SETUP.settings))
    for task in tasks_in(inboxes, tmp_path):
        worker.pipe.send(task)
    assert reached.wait(PATIENCE_S)
    worker.pipe.close()
    wait_until(partial(was_ended, worker.tasks._cases), "it is seen")
    go_on.set()
    worker.end()
    del worker
    assert memories() <= before
    results = tmp_path / "results"
    assert [path for path in results.rglob("*") if path.is_file() and path.parent.name.startswith(".")] == []
    whole = [folder for folder in results.glob("*/*") if folder.is_dir()]
    assert all((folder / "result.json").is_file() for folder in whole)


def was_ended(cases) -> bool:
    return cases._is_over


def memories() -> int:
    gc.collect()  # an array in shared memory lives as long as whoever holds it
    return sum("memfd:ctflow" in str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink())


def test_tasks_at_a_time_are_the_settings_or_the_workers_share(monkeypatch):
    from ctflow.pipeline.overlap import cases  # noqa: PLC0415

    monkeypatch.setattr(cases, "usable_cpus", lambda: 32)
    monkeypatch.setattr(cases, "available_memory", lambda: 2**40)
    assert tasks_at_a_time(Settings(cases_in_flight=5), 1) == 5
    assert [tasks_at_a_time(Settings(), workers) for workers in (1, 4, 8)] == [12, 6, 3]
    monkeypatch.setattr(cases, "available_memory", lambda: 2**32)
    assert tasks_at_a_time(Settings(), 1) == 1
