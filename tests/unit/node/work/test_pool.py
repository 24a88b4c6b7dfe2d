"""Series are run by a process that may die, hang or never open, and the queue survives all of it."""

from __future__ import annotations

import logging
import sqlite3
from multiprocessing.context import SpawnProcess

import pytest

import service_support
from ctflow.core.errors import NotWritten
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival
from ctflow.node.metrics import Metrics
from ctflow.node.work import pool
from ctflow.node.work import supervisor as supervision
from ctflow.node.work.messages import Ready, Setup
from ctflow.node.work.pool import Places, WorkerPool
from ctflow.settings.run import Settings
from service_support import PATIENCE_S, wait_until


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


@pytest.fixture
def worker_pool(journal, tmp_path, monkeypatch):
    """Starts pools whose workers do what the test wants, and stops them."""
    started = []

    def start(worker, devices=("cpu",), deliveries=lambda _answer: [("pacs", "segmentation.dcm")]) -> WorkerPool:
        monkeypatch.setattr(supervision, "run_worker", worker)
        places = Places(tmp_path / "inbox", tmp_path / "results", tmp_path / "running")
        setup, metrics = Setup(None, Settings(cache=None)), Metrics(journal, tmp_path)
        started.append(WorkerPool(journal, places, setup, devices, deliveries, metrics))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop(0)


def complete(journal, *numbers) -> list[str]:
    keys = []
    for number in numbers:
        arrival = Arrival(
            f"1.2.{number}", "1.2", f"1.2.{number}.1", "1.4", "1.5", "CT", "AE", "127.0.0.1", f"{number}", 1, "s"
        )
        keys.append(journal.receive(arrival, most_instances=9, most_bytes=999).key)
    journal.complete_quiet(0)
    return keys


def test_what_a_worker_answers_becomes_the_state_of_the_series(journal, worker_pool, caplog):
    keys = complete(journal, 1, 2, 3)
    with caplog.at_level(logging.WARNING):
        found = worker_pool(service_support.worker_that_answers)
        wait_until(lambda: journal.find(keys[2]).reason, "all three ran")
    assert [journal.find(key).state for key in keys] == ["done", "aside", "complete"]
    assert journal.find(keys[1]).message == "because aside"
    assert (journal.find(keys[2]).reason, journal.find(keys[2]).message) == ("gap", "because again")
    assert journal.find(keys[2]).next_at > journal.find(keys[2]).last_at + 5
    assert journal.backlog() == {"pacs": {"waiting": 1}}
    assert "a line of the log" in caplog.text
    assert found.problems() == []
    (later,) = complete(journal, 2)  # a duplicate changes nothing
    assert journal.find(later).state == "aside"


def test_a_fault_of_the_node_itself_ends_one_series_and_no_worker(journal, worker_pool):
    (key,) = complete(journal, 1)

    def deliveries(_answer):
        raise KeyError("Doe^John")

    found = worker_pool(service_support.worker_that_answers, deliveries=deliveries)
    wait_until(lambda: journal.find(key).state == "dead", "it is given up")
    assert journal.find(key).reason == "unexpected"
    assert "KeyError" in journal.find(key).message
    assert "Doe" not in journal.find(key).message
    (other,) = complete(journal, 2)
    wait_until(lambda: journal.find(other).state == "aside", "the next one ran")
    assert found.problems() == []


def test_a_worker_that_met_a_fault_is_replaced(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    (key,) = complete(journal, 1)
    worker_pool(service_support.worker_that_meets_a_fault)
    wait_until(lambda: journal.find(key).state == "aside", "it is set aside")
    first, second = journal.find(key).message.split()
    assert first != second, "another process tried it again"


def test_a_series_that_is_tried_too_often_is_a_dead_letter(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    (key,) = complete(journal, 3)
    worker_pool(service_support.worker_that_answers)
    wait_until(lambda: journal.find(key).state == "dead", "it is given up")
    assert journal.find(key).attempts == supervision.MOST_ATTEMPTS
    assert journal.find(key).reason == "gap"
    assert "5 attempts" in journal.find(key).message


def test_a_case_that_kills_its_worker_is_tried_once_more_and_set_aside_and_the_next_one_runs(journal, worker_pool):
    keys = complete(journal, 1)
    worker_pool(service_support.worker_that_dies)
    wait_until(lambda: journal.find(keys[0]).state == "aside", "it is set aside")
    assert journal.find(keys[0]).reason == "worker-died"
    assert journal.find(keys[0]).message == "the worker ended with signal SIGKILL, twice"
    assert [event.kind for event in journal.events(key=keys[0])].count("running") == 2


def test_a_worker_that_takes_two_gets_two_and_answers_in_any_order(journal, worker_pool):
    keys = complete(journal, 1, 2)
    worker_pool(service_support.worker_that_takes_two)
    wait_until(lambda: all(journal.find(key).state == "aside" for key in keys), "both are answered")
    assert {journal.find(key).message for key in keys} == {"attempt 1 of 2"}


def test_of_two_series_that_a_worker_died_of_each_is_tried_alone_and_only_the_one_at_fault_is_set_aside_for_it(
    journal, worker_pool
):
    innocent, guilty = complete(journal, 1, 9)
    worker_pool(service_support.worker_that_takes_two)
    wait_until(lambda: {journal.find(key).state for key in (innocent, guilty)} == {"aside"}, "both are through")
    assert journal.find(innocent).message == "attempt 2 of 1"
    assert journal.find(guilty).message == "the worker ended with signal SIGKILL, twice"


def test_all_that_run_when_the_node_stops_wait_for_the_next_start(journal, worker_pool):
    keys = complete(journal, 1, 2)
    found = worker_pool(service_support.worker_that_takes_two_and_hangs)
    wait_until(lambda: all(journal.find(key).state == "running" for key in keys), "both run")
    found.stop(0)
    assert set(journal.recover()) == set(keys)


def test_a_worker_that_cannot_open_says_why_and_keeps_the_series(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    (key,) = complete(journal, 1)
    found = worker_pool(service_support.worker_that_cannot_open)
    assert found.opened.wait(60)
    assert found.first_word.error.described == "BundleInvalid [argument]: the bundle lacks a key"
    assert found.problems() == ["no worker is open: the bundle lacks a key"]
    assert journal.find(key).state == "complete"


def test_a_worker_that_hangs_is_ended(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "MOST_CASE_S", 0.3)
    (key,) = complete(journal, 1)
    worker_pool(service_support.worker_that_hangs)
    wait_until(lambda: journal.find(key).state == "aside", "it is set aside")
    reasons = [event.text for event in journal.events(key=key) if event.kind in ("retry", "aside")]
    assert reasons == ["the worker did not answer for 0.3 s, twice", "the worker did not answer for 0.3 s"]


def test_what_runs_when_the_node_stops_waits_for_the_next_start(journal, worker_pool):
    (key,) = complete(journal, 1)
    found = worker_pool(service_support.worker_that_hangs)
    wait_until(lambda: journal.find(key).state == "running", "it runs")
    found.stop(0)
    assert journal.find(key).state == "running"
    assert journal.recover() == (key,)
    assert journal.find(key).state == "complete"


def test_a_result_whose_instances_changed_is_not_kept(journal, worker_pool, tmp_path):
    (key,) = complete(journal, 1)
    folder = tmp_path / "results" / key

    def deliveries(answer):
        (tmp_path / "results" / answer.folder).mkdir(parents=True)
        journal.discard(key)
        return []

    worker_pool(service_support.worker_that_answers, deliveries=deliveries)
    wait_until(lambda: folder.is_dir() and not any(folder.iterdir()), "its folder is removed")
    assert journal.results(key) == ()
    assert journal.find(key).state == "discarded"


def test_a_journal_that_cannot_be_written_is_told_again(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    failures, real = [NotWritten("no", reason="unwritable"), NotWritten("no", reason="unwritable")], journal.commit

    def commit(*given):
        if failures:
            raise failures.pop()
        return real(*given)

    monkeypatch.setattr(journal, "commit", commit)
    (key,) = complete(journal, 1)
    worker_pool(service_support.worker_that_answers)
    wait_until(lambda: journal.find(key).state == "done", "it is done")


def fails_first(real, *errors):
    """A function that raises each of these errors once, and then does what the real one does."""
    left = list(errors)

    def call(*given):
        if left:
            raise left.pop(0)
        return real(*given)

    return call


@pytest.mark.parametrize(
    "error", [sqlite3.OperationalError("unable to open database file"), OSError(24, "Too many open files")]
)
def test_a_passing_fault_of_the_node_puts_the_series_back(journal, worker_pool, monkeypatch, caplog, error):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    (key,), find = complete(journal, 1), journal.find
    monkeypatch.setattr(journal, "find", fails_first(find, error))
    found = worker_pool(service_support.worker_that_answers)
    wait_until(lambda: journal.results(key), "it ran after all")
    assert (find(key).state, find(key).attempts) == ("done", 2)
    (reason, *_) = [event.text for event in journal.events(key=key) if event.kind == "retry"]
    assert type(error).__name__ in reason
    assert type(error) in [record.exc_info[0] for record in caplog.records if record.exc_info], "the log says more"
    assert caplog.text.count("a line of the log") == 1, "the worker's process was not at fault and stays"
    wait_until(lambda: found.problems() == [], "it waits for the next one")


def test_an_unexpected_error_while_a_series_is_led_puts_it_back_and_is_shown(journal, worker_pool, monkeypatch, caplog):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    (key,), find = complete(journal, 1), journal.find
    monkeypatch.setattr(journal, "find", fails_first(find, TypeError("Doe^John")))
    monkeypatch.setattr(supervision, "_RESTART_S", 3600.0)
    found = worker_pool(service_support.worker_that_answers)
    wait_until(lambda: find(key).state == "complete" and find(key).reason, "it is put back")
    (remark,) = found.remarks()
    assert "TypeError" in remark
    assert remark in caplog.text
    assert "Doe" not in remark + caplog.text
    assert (find(key).reason, find(key).message) == ("unexpected", remark)


def test_a_fault_that_the_journal_cannot_be_told_of_ends_no_worker_either(journal, worker_pool, monkeypatch, caplog):
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    keys, find = complete(journal, 1, 2), journal.find
    monkeypatch.setattr(journal, "find", fails_first(find, TypeError("Doe^John")))
    monkeypatch.setattr(journal, "try_again", fails_first(journal.try_again, ValueError("Doe^John")))
    worker_pool(service_support.worker_that_answers)
    wait_until(lambda: {find(key).state for key in keys} & {"done", "aside"}, "the next series ran")
    assert "running" in {find(key).state for key in keys}, "until the node's next start"
    assert "ValueError" in caplog.text
    assert "Doe" not in caplog.text


@pytest.mark.parametrize("where", ["next_run_at", "claim"])
def test_an_unexpected_error_between_series_ends_no_worker(journal, worker_pool, monkeypatch, caplog, where):
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    monkeypatch.setattr(journal, where, fails_first(getattr(journal, where), TypeError("Doe^John")))
    (key,) = complete(journal, 1)
    found = worker_pool(service_support.worker_that_answers)
    wait_until(lambda: journal.find(key).state == "done", "it ran after all")
    assert "worker 0: unexpected TypeError" in caplog.text
    wait_until(lambda: found.problems() == found.remarks() == [], "nothing is left to say")


def test_a_fault_that_stays_makes_a_dead_letter_and_ends_no_worker(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 0.0)
    monkeypatch.setattr(supervision, "_RESTART_S", 0.01)
    (key,), find = complete(journal, 1), journal.find
    errors = [sqlite3.OperationalError("disk I/O error")] * supervision.MOST_ATTEMPTS
    monkeypatch.setattr(journal, "find", fails_first(find, *errors))
    worker_pool(service_support.worker_that_answers)
    wait_until(lambda: find(key).state == "dead", "a person decides")
    (other,) = complete(journal, 2)
    wait_until(lambda: find(other).state == "aside", "the next one ran")


def test_a_worker_that_could_not_be_heard_is_replaced_before_it_answers_for_another_series(
    journal, worker_pool, monkeypatch, caplog
):
    monkeypatch.setattr(supervision, "FIRST_WAIT_S", 3600.0)
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    found = worker_pool(service_support.worker_that_answers)
    wait_until(lambda: found.problems() == [], "it is open")
    (supervisor,) = found.threads
    monkeypatch.setattr(supervisor, "_receive", fails_first(supervisor._receive, OSError(12, "Cannot allocate memory")))
    first, second = complete(journal, 1, 2)
    wait_until(lambda: journal.find(second).state == "aside", "the second ran")
    assert journal.find(first).state == "complete", "its answer was not heard, and is nobody else's"
    assert caplog.text.count("a line of the log") == 2, "another process ran the second"


def test_a_stop_does_not_wait_for_a_fault_to_pass(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "_RESTART_S", 3600.0)
    (key,), find = complete(journal, 1), journal.find
    monkeypatch.setattr(journal, "find", fails_first(find, sqlite3.OperationalError("locked")))
    found = worker_pool(service_support.worker_that_answers)
    wait_until(lambda: find(key).state == "complete" and find(key).reason, "it is put back")
    found.ending.set()
    (supervisor,) = found.threads
    supervisor.join(PATIENCE_S)
    assert not supervisor.is_alive()


def test_every_gpu_gets_a_worker_where_none_is_named(journal, worker_pool, monkeypatch):
    found = worker_pool(service_support.worker_that_answers, devices=())
    assert found.opened.wait(60)
    added = []
    monkeypatch.setattr(found, "_add", added.append)
    found.first_word = None
    found.told(Ready("model", "1", False, 3))
    assert added == [["cuda:1", "cuda:2"]]


def test_a_process_that_cannot_be_started_is_told_and_tried_again(journal, worker_pool, monkeypatch):
    (key,) = complete(journal, 1)
    monkeypatch.setattr(supervision, "_RESTART_S", 0.05)
    start, asked = SpawnProcess.start, []

    def fail(process) -> None:
        asked.append(process)
        if len(asked) < 3:
            raise OSError(12, "Cannot allocate memory")
        start(process)

    monkeypatch.setattr(SpawnProcess, "start", fail)
    found = worker_pool(service_support.worker_that_answers)
    wait_until(found.opened.is_set, "somebody is told")
    wait_until(lambda: journal.find(key).state == "done", "it runs")
    assert len(asked) == 3
    assert found.problems() == []


def test_while_no_process_can_be_started_the_pool_says_so(worker_pool, monkeypatch):
    monkeypatch.setattr(supervision, "_RESTART_S", 3600)
    monkeypatch.setattr(
        SpawnProcess, "start", lambda _process: (_ for _ in ()).throw(OSError(12, "Cannot allocate memory"))
    )
    found = worker_pool(service_support.worker_that_answers)
    wait_until(found.opened.is_set, "somebody is told")
    assert found.problems() == ["no worker is open: its process cannot be started (Cannot allocate memory)"]


def test_a_worker_that_ends_while_it_waits_is_named_and_started_again(journal, worker_pool, monkeypatch):
    monkeypatch.setattr(pool, "_LOOK_AGAIN_S", 3600)
    found = worker_pool(service_support.worker_that_answers, devices=("cuda:0", "cuda:1"))
    wait_until(lambda: found.problems() == found.remarks() == [], "both are open")
    first, second = found.threads
    first.kill()
    wait_until(lambda: found.remarks() == ["worker 0 is not open"], "it is named")
    assert found.problems() == [], "the other one runs"
    second.kill()
    wait_until(lambda: found.problems() == ["no worker is open: the log says why"], "both are named")
    assert found.remarks() == []
    for supervisor in (first, second):
        supervisor._killed = False  # as if something else had ended them
    journal.event("note", "something happens")
    wait_until(lambda: found.problems() == found.remarks() == [], "both are open again")


def test_a_late_answer_does_not_take_the_result_of_another_worker(journal, worker_pool, tmp_path):
    """A run that a person discards and retries while it runs is computed twice, into the same folder."""
    (key,) = complete(journal, 1)
    folder = tmp_path / "results" / key

    def deliveries(answer):
        (tmp_path / "results" / answer.folder).mkdir(parents=True)
        journal.discard(key)
        journal.retry(key)
        assert journal.commit(journal.claim(), answer, [])
        return []

    worker_pool(service_support.worker_that_answers, deliveries=deliveries)
    (other,) = complete(journal, 2)
    wait_until(lambda: journal.find(other).state == "aside", "the late answer is dealt with")
    assert next(event.kind for event in journal.events(key=key)) == "superseded"
    assert journal.find(key).state == "done"
    assert [path.name for path in folder.iterdir()] == [journal.results(key)[0].folder.partition("/")[2]]
