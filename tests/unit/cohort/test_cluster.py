"""What a cluster's driver decides before and between its calls of Ray."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cluster_proof import NONE, broken_promises, steady_rate
from ctflow import __version__
from ctflow.cli.cohort import _has_several_gpus, cohort
from ctflow.cohort.cluster import connection, driver, pool
from ctflow.cohort.cluster.driver import Cluster
from ctflow.cohort.cluster.pool import ClusterPool, RowAnswered, StartedWorker, WorkerEnded
from ctflow.cohort.cluster.tasks import RowCommitted, RowTask, WorkerReady
from ctflow.cohort.manifest.rows import CohortRow
from ctflow.cohort.outcome import RowOutcome
from ctflow.cohort.shares.attempt import RowAttempt
from ctflow.cohort.watch import UNWATCHED, NodeState
from ctflow.core.errors import (
    BackendUnavailable,
    NotWritten,
    OutputError,
    RequirementUnmet,
    SettingsInvalid,
    StorageFull,
    StoreFailed,
)
from ctflow.settings.run import Settings

SETTINGS = Settings()


def node(name: str, *, cpus: int = 0, gpus: int = 0, alive: bool = True) -> dict:
    return {"NodeID": name, "Alive": alive, "NodeManagerHostname": name, "Resources": {"CPU": cpus, "GPU": gpus}}


def ray_of(*nodes: dict) -> SimpleNamespace:
    there = sum(each["Resources"]["GPU"] for each in nodes)
    return SimpleNamespace(
        nodes=lambda: list(nodes), remote=lambda kind: kind, cluster_resources=lambda: {"GPU": there}
    )


def wanted(gpus: int | None, *nodes: dict) -> dict[str, int]:
    return ClusterPool(ray_of(*nodes), None, gpus)._wanted()


def test_a_worker_a_gpu_or_a_worker_a_machine():
    nodes = [node("head"), node("a", cpus=16, gpus=2), node("b", cpus=8, gpus=4), node("gone", gpus=9, alive=False)]
    assert wanted(None, *nodes) == {"a": 2, "b": 4}
    assert wanted(5, *nodes) == {"b": 4, "a": 1}
    assert wanted(0, *nodes) == {"a": 1, "b": 1}


def test_how_many_gpus_are_used():
    def used(gpus: int | None, there: int, address: str | None = "auto", settings: Settings = SETTINGS) -> int | None:
        return Cluster("/out", None, address, gpus)._gpus_of(ray_of(node("a", cpus=1, gpus=there)), settings)

    assert (used(None, 2), used(None, 0), used(2, 2), used(0, 2)) == (None, 0, 2, 0)
    assert used(None, 2, settings=replace(SETTINGS, device="cpu")) == 0
    with pytest.raises(BackendUnavailable, match="this machine has 1") as raised:
        used(2, 1, address=None)
    assert raised.value.reason == "no-such-device"


class Actor:
    """What Ray's handle of a worker is to the pool; `calls` are the futures of its calls, in their order."""

    def __init__(self) -> None:
        self.calls: list[Future] = []
        self.ready = self.row = SimpleNamespace(remote=self._called)

    def _called(self, *_: object) -> SimpleNamespace:
        self.calls.append(Future())
        return SimpleNamespace(future=lambda: self.calls[-1])

    def answer(self) -> None:
        self.calls[0].set_result(WorkerReady(2, __version__))

    def break_off(self) -> None:
        for call in self.calls:
            if not call.done():
                call.set_exception(ConnectionError("the actor died"))


class ActorClass:
    """What `ray.remote(CohortWorker)` is to the pool."""

    def __init__(self) -> None:
        self.started: list[Actor] = []

    def options(self, **_: object) -> ActorClass:
        return self

    def remote(self, *_: object) -> Actor:
        self.started.append(Actor())
        return self.started[-1]


class Machine:
    """A pool on one machine whose worker has two rows; Ray lists the machine as alive, whatever becomes of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pool, "_DECIDE_S", 0.0)
        self.now_s, self.node, self.actors = 1000.0, node("ab" * 28, cpus=4), ActorClass()
        monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=self._time))
        ray = SimpleNamespace(nodes=lambda: [self.node], remote=lambda kind: self.actors, kill=lambda actor: None)
        self.pool = ClusterPool(ray, None, 0)
        self.pool.keep_up()
        self.actors.started[0].answer()
        assert self.events() == []
        (worker,) = self.pool.ready
        self.tasks = {RowTask(CohortRow(name, name), 1, is_alone=False) for name in "ab"}
        for task in self.tasks:
            self.pool.give(worker, task)

    def _time(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def events(self) -> list[WorkerEnded]:
        """What the pool knows by now."""
        return list(self._events())

    def _events(self) -> Iterator[WorkerEnded]:
        for _ in range(6):
            self.pool.keep_up()
            event = self.pool.wait(0.0)
            if event is not None:
                yield event

    def lose_contact(self) -> None:
        self.actors.started[-1].break_off()
        assert self.events() == [], "nothing tells a lost machine from a killed worker yet"


@pytest.fixture
def machine(monkeypatch) -> Machine:
    return Machine(monkeypatch)


def test_a_worker_whose_machine_ray_gives_up_seconds_later_was_lost_with_it(machine):
    machine.lose_contact()
    machine.now_s += 15
    assert machine.events() == []
    machine.node["Alive"] = False
    (event,) = machine.events()
    assert (event.is_lost, event.error, event.tasks) == (True, None, machine.tasks)


def test_a_worker_was_killed_if_another_one_starts_on_its_machine(machine):
    machine.lose_contact()
    assert len(machine.actors.started) == 2
    machine.actors.started[1].answer()
    (event,) = machine.events()
    assert (event.is_lost, event.error, event.tasks) == (False, None, machine.tasks)


def test_a_worker_was_killed_if_its_machine_is_there_long_after(machine):
    machine.lose_contact()
    machine.now_s += 31
    (event,) = machine.events()
    assert (event.is_lost, event.tasks) == (False, machine.tasks)


def test_a_machine_that_was_lost_while_a_worker_started_there_has_no_fault(machine):
    machine.lose_contact()
    machine.lose_contact()
    assert len(machine.actors.started) == 2, "no third one before it is known why the second one did not start"
    machine.node["Alive"] = False
    assert [(event.is_lost, len(event.tasks)) for event in machine.events()] == [(True, 2), (True, 0)]
    assert not machine.pool._faults


def test_a_machine_on_which_no_worker_starts_is_given_up_by_name(machine):
    machine.lose_contact()
    for number in range(2, 5):
        assert len(machine.actors.started) == number
        machine.lose_contact()
        machine.now_s += 31
        if number < 4:
            assert machine.events()[-1].error.reason == "worker-not-started"
    with pytest.raises(BackendUnavailable, match="did not start"):
        machine.events()


class FailingOnce:
    """A pool whose first worker ends with an error when it gets a row; the second one commits each."""

    def __init__(self, error: OutputError) -> None:
        self._error, self._event, self._number = error, None, 1

    @property
    def ready(self) -> tuple[StartedWorker, ...]:
        return (StartedWorker(f"worker-{self._number}", str(self._number), "host", None, limit=1),)

    def give(self, worker: StartedWorker, task: RowTask) -> None:
        worker.tasks.add(task)
        if self._number == 1:
            self._event = WorkerEnded(worker, frozenset({task}), is_lost=False, error=self._error)
        else:
            outcome = RowOutcome(*task.name, "done", "done", "", 0, task.number, 0.1)
            self._event = RowAnswered(worker, task, RowCommitted(outcome, NodeState("host", 0, 1)))
        self._number = 2

    def wait(self, timeout_s: float) -> WorkerEnded | RowAnswered | None:
        event, self._event = self._event, None
        return event

    def keep_up(self) -> None:
        pass

    def note_success(self, worker: StartedWorker) -> None:
        pass


def committed_after(error: OutputError, destination: str) -> list[str]:
    there = SimpleNamespace(end=lambda name: None, read=lambda name: None)
    todo = SimpleNamespace(
        attempts=[RowAttempt(CohortRow("a", "a"), 1, is_alone=False)],
        count=1,
        destination=there,
        setup=SimpleNamespace(watcher=UNWATCHED),
        progress=lambda *_: None,
    )
    local = driver._is_work_local(destination)
    return [name.id for name in driver._Driver(FailingOnce(error), todo, is_work_local=local).run()]


@pytest.mark.parametrize("destination", ["s3://bucket/out", "gs://bucket", "dicomweb+https://pacs#journal=s3://b/j"])
@pytest.mark.parametrize("error", [StorageFull("no space left"), NotWritten("unwritable", reason="unwritable")])
def test_a_disk_of_one_machine_that_is_full_is_a_fault_of_that_machine(destination, error):
    assert committed_after(error, destination) == ["a"]


@pytest.mark.parametrize(
    ("destination", "error"),
    [
        ("/data/out", StorageFull("no space left")),
        ("dicomweb+https://pacs#journal=/data/out", StorageFull("no space left")),
        ("s3://bucket/out", StoreFailed("access denied", reason="store-denied")),
    ],
)
def test_a_destination_that_cannot_be_written_ends_the_run(destination, error):
    with pytest.raises(type(error)):
        committed_after(error, destination)


def test_the_rate_of_a_proof_is_that_of_waits_even_if_the_first_rows_are_late():
    late_s = {1: 5.0, 2: 3.5, 3: 2.0}  # two workers that each take a row in two seconds, and start slowly
    times = [(late_s.get(number, 0.0) + number * 1.0, number) for number in range(1, 41)]
    assert (40 - 3) / (times[-1][0] - times[2][0]) > 1.05, "what a window from the third row on would say"
    assert steady_rate(times, 40, 2) == 1.0
    with pytest.raises(AssertionError, match="too few rows"):
        steady_rate(times[:17], 17, 2)


FOUND = {
    **dict.fromkeys(NONE, 0),
    "other_than_expected": {},
    "kills": {"actor": 1, "raylet": 1, "driver": 1, "given up by Ray": 1},
    "kinds": {"good": 9, "gap": 1},
    "exit_code": 6,
    "restarts_s": [30.0],
}


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({}, []),
        ({"lost": 1}, ["lost"]),
        ({"other_than_expected": {"good: failed": 2}}, ["good: failed"]),
        ({"kills": {"actor": 1, "driver": 1}}, ["2 kills of 3"]),
        ({"exit_code": 1}, ["exit code 1"]),
        ({"exit_code": 0, "kinds": {"good": 10}}, []),
        ({"restarts_s": []}, ["no restart was measured"]),
        ({"restarts_s": [61.0]}, ["a restart took too long"]),
    ],
)
def test_a_proof_fails_whatever_promise_is_broken_or_untested(change, broken):
    assert broken_promises({**FOUND, **change}, 3) == broken


@pytest.fixture
def no_ray(monkeypatch):
    def missing(extra: str) -> None:
        raise RequirementUnmet("the package ray is not installed: python -m pip install 'ray>=2.60'")

    monkeypatch.setattr(connection, "check_requirements", missing)


def test_without_ray_the_message_says_what_to_install_and_how_to_do_without(no_ray):
    with pytest.raises(RequirementUnmet, match=r"pip install 'ray>=2.60'; without it, this process computes with"):
        connection.check_ray()


def test_several_gpus_need_ray_unless_one_is_named(no_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert not _has_several_gpus(replace(SETTINGS, device="cuda:0"))
    (tmp_path / "m.csv").write_text("id,location\na,absent\n", encoding="utf-8")
    with pytest.raises(RequirementUnmet, match="several GPUs"):
        cohort.main(["run", str(tmp_path / "m.csv"), "-o", str(tmp_path / "out")], standalone_mode=False)


@pytest.mark.parametrize("words", [["--address", "auto"], ["--gpus", "0"]])
def test_a_share_is_computed_without_ray(words, tmp_path):
    arguments = ["run", str(tmp_path / "m.csv"), "-o", str(tmp_path / "out"), "--part", "1/2", *words]
    with pytest.raises(SettingsInvalid) as raised:
        cohort.main(arguments, standalone_mode=False)
    assert raised.value.reason == "conflict"


def test_a_folder_of_a_killed_ray_is_removed_and_that_of_a_running_one_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(connection.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(connection, "_LONGEST", 400)
    killed = tmp_path / "ctflow-ray-killed"
    killed.mkdir()
    (killed / "lock").touch()
    with connection._temporary_folder() as first:
        assert not killed.exists()
        with connection._temporary_folder() as second:
            assert first.is_dir()
            assert second.is_dir()
    assert not list(tmp_path.iterdir())


def test_a_ray_that_does_not_start_is_started_again_and_ends_by_name():
    calls = []

    def init(**options) -> None:
        calls.append(options)
        if len(calls) < ends_at:
            raise Exception("The current node timed out during startup.\nand more")

    ray = SimpleNamespace(init=init, shutdown=lambda: None)
    ends_at = 3
    connection._initialize(ray, {"address": "local"}, 3)
    assert len(calls) == 3
    ends_at = 99
    with pytest.raises(
        BackendUnavailable, match="does not start here: The current node timed out during startup.$"
    ) as raised:
        connection._initialize(ray, {"address": "local"}, 3)
    assert (raised.value.reason, len(calls)) == ("no-cluster", 6)
    with pytest.raises(BackendUnavailable, match="no Ray cluster answers"):
        connection._initialize(ray, {"address": "auto"}, 1)
    assert len(calls) == 7
