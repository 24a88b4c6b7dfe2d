"""Each model has a run of a series, with its own result and deliveries; urgent ones first, and none waits for ever."""

from __future__ import annotations

import logging

import pytest

from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, DecidedRun, ObjectRecord, Why, WorkerResult
from ctflow.node.journal.runs import QueueRules
from ctflow.node.journal.writes import key_of
from ctflow.node.log import AuditTrail
from node_support import Clock

STUDY = "1.2.3"


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def journal(tmp_path, clock):
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    journal.order_by(QueueRules(decides=True))
    yield journal
    journal.close()


def receive(journal, series: str, number: int = 1) -> str:
    arrival = Arrival(
        series, STUDY, f"{series}.{number}", "1.2", "1.2.1", "CT", "ROUTER", "127.0.0.1", f"{series}{number}.dcm", 10,
        f"{number:064x}",
    )  # fmt: skip
    return journal.receive(arrival, most_instances=9, most_bytes=999).key


def complete(journal, *series: str) -> list[str]:
    keys = [receive(journal, each) for each in series]
    journal.complete_quiet(0)
    return keys


def decide(journal, *models: str, priority: int = 0, **why: Why):
    job = journal.claim()
    assert not job.is_decided
    runs = [DecidedRun(model, priority) for model in models]
    assert journal.decide(job, [*runs, *(DecidedRun(model, priority, each) for model, each in why.items())])
    return job


def answer(folder: str = "a/b") -> WorkerResult:
    return WorkerResult(folder, "net", "1.0", "abc", False, 1.0, (ObjectRecord("s.dcm", "1.2", f"2.25.{folder}", ""),))


def states(journal, key: str) -> dict[str, str]:
    return {run.model: run.state for run in journal.runs(key)}


def commit(journal, job, folder: str = "a/b", destinations=("pacs",)) -> bool:
    return journal.commit(job, answer(folder), [(each, "s.dcm") for each in destinations])


def test_each_model_has_its_own_result_deliveries_and_state(journal, clock):
    (key,) = complete(journal, "s")
    first = decide(journal, "lung", "body")
    assert states(journal, key) == {"lung": "complete", "body": "complete"}
    assert not commit(journal, first), "it was decided: nothing runs under its number any more"
    lung = journal.claim()
    assert (lung.model, lung.is_decided, lung.attempts) == ("lung", True, 1)
    assert journal.claim({key}) is None, "one series at a time in a worker"
    body = journal.claim()
    assert body.model == "body"
    assert commit(journal, lung, "k/lung")
    assert journal.find(key).state == "running"
    assert commit(journal, body, "k/body", ("pacs", "archive"))
    assert not commit(journal, body, "k/body")
    results = journal.results(key)
    assert [(each.run_model, each.folder) for each in results] == [("lung", "k/lung"), ("body", "k/body")]
    assert [each.run_model for each in journal.detail(key).deliveries] == ["lung", "body", "body"]
    for each in journal.due("pacs", clock.now, limit=9):
        journal.sent(each.id, "sent")
    assert states(journal, key) == {"lung": "delivered", "body": "done"}
    assert journal.find(key).state == "done"
    (last,) = journal.due("archive", clock.now, limit=9)
    journal.sent(last.id, "sent")
    assert journal.find(key).state == "delivered"
    done = [event for event in journal.events(key=key) if event.kind == "done"]
    assert [event.model for event in done] == ["body", "lung"]
    assert done[1].text == "lung: net 1.0 answered in 1.0 s"
    assert journal.run_counts() == {("lung", "delivered"): 1, ("body", "delivered"): 1}


def test_the_audit_trail_names_the_model_of_each_result(journal, tmp_path, caplog):
    complete(journal, "s")
    decide(journal, "lung", "body")
    jobs = [journal.claim(), journal.claim()]
    for job in reversed(jobs):  # both at the same moment
        assert journal.commit(job, WorkerResult(f"k/{job.model}", f"net of {job.model}", "1", "w", False, 1.0, ()), [])
    with caplog.at_level(logging.INFO, "ctflow.audit"):
        AuditTrail(journal, tmp_path / "told").tell()
    facts = [each.facts for each in caplog.records if each.facts["event"] == "done"]
    assert [(each["run"], each["model"]) for each in facts] == [("body", "net of body"), ("lung", "net of lung")]


def test_a_model_that_is_set_aside_hides_no_result_of_another_and_is_retried_alone(journal, clock):
    (key,) = complete(journal, "s")
    decide(journal, "lung", body=Why("body-part", "no abdomen"))
    assert states(journal, key) == {"lung": "complete", "body": "aside"}
    assert journal.find(key).state == "complete"
    assert commit(journal, journal.claim())
    assert (journal.find(key).state, journal.find(key).reason) == ("aside", "body-part")
    (due,) = journal.due("pacs", clock.now, limit=9)
    journal.sent(due.id, "sent")
    assert states(journal, key) == {"lung": "delivered", "body": "aside"}
    assert journal.retry(key, model="body")
    assert states(journal, key) == {"lung": "delivered", "body": "complete"}
    assert not journal.retry(key, model="lung")
    assert journal.discard(key, model="body")
    assert journal.find(key).state == "delivered"
    assert not journal.discard(key, model="other")
    assert journal.retry(key)
    assert states(journal, key) == {"lung": "delivered", "body": "complete"}


def test_what_ended_a_worker_counts_for_its_model_alone(journal):
    (key,) = complete(journal, "s")
    decide(journal, "lung", "body")
    for _ in range(2):
        job = journal.claim()
        assert job.model == "lung"
        journal.worker_died(job, "signal 9")
    assert states(journal, key) == {"lung": "aside", "body": "complete"}
    assert journal.claim().attempts == 1


def test_what_ran_when_the_node_ended_runs_again_and_what_was_decided_stays(tmp_path, journal, clock):
    (key,) = complete(journal, "s")
    journal.claim()
    journal.close()
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    assert journal.recover() == (key,)
    decide(journal, "lung", "body")
    assert commit(journal, journal.claim())
    journal.claim()
    journal.close()
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    assert journal.recover() == (key,)
    job = journal.claim()
    assert (job.model, job.attempts) == ("body", 1)
    assert commit(journal, job)
    assert [each.run_model for each in journal.results(key)] == ["lung", "body"]
    journal.close()


def test_a_late_instance_makes_a_revision_for_each_model_which_knows_its_own_earlier_result(journal):
    (key,) = complete(journal, "s")
    decide(journal, "lung", "body")
    assert commit(journal, journal.claim(), "k/lung")
    running = journal.claim()
    later = receive(journal, "s", 2)
    assert later == key_of(STUDY, "s", 2)
    assert states(journal, key) == {"lung": "done", "body": "discarded"}
    assert not commit(journal, running), "without the late instance"
    journal.complete_quiet(0)
    decide(journal, "lung", "body")
    jobs = [journal.claim(), journal.claim()]
    assert [(job.model, job.earlier) for job in jobs] == [("lung", "k/lung"), ("body", None)]
    assert journal.retry(key)
    assert states(journal, key) == {"lung": "done", "body": "discarded"}, "the later revision has it"


def test_a_series_that_is_received_again_is_decided_again(journal):
    (key,) = complete(journal, "s")
    job = decide(journal, "lung", "body")
    receive(journal, "s", 2)
    assert journal.runs(key) == ()
    assert not journal.decide(job, [DecidedRun("lung", 0)])
    journal.complete_quiet(0)
    decide(journal, "body")
    assert states(journal, key) == {"body": "complete"}


def queue(journal, count: int, priority: int, name: str, model: str = "m") -> None:
    for number in range(count):
        complete(journal, f"{name}{number}")
        decide(journal, model, priority=priority)


def order(journal, count: int) -> str:
    return "".join(journal.claim().series_uid[0] for _ in range(count))


def test_urgent_runs_come_first_and_after_some_a_routine_one(journal):
    journal.order_by(QueueRules(True, urgent_in_a_row=3, routine_waits_s=1e9))
    queue(journal, 3, 0, "r")
    queue(journal, 8, 1, "u")
    assert order(journal, 11) == "uuuruuuruur"


def test_a_routine_run_that_waited_long_comes_after_one_urgent_one_but_not_before_all(journal, clock):
    journal.order_by(QueueRules(True, urgent_in_a_row=9, routine_waits_s=60))
    queue(journal, 3, 0, "r")
    queue(journal, 5, 1, "u")
    assert order(journal, 2) == "uu"
    clock.now += 60
    assert order(journal, 6) == "rururu"


def test_a_clock_that_is_set_back_starves_nothing(journal, clock):
    journal.order_by(QueueRules(True, urgent_in_a_row=2, routine_waits_s=60))
    queue(journal, 2, 0, "r")
    queue(journal, 4, 1, "u")
    clock.now -= 500
    assert order(journal, 6) == "uuruur"


def test_what_is_undecided_is_decided_before_anything_runs(journal):
    queue(journal, 1, 1, "u")
    complete(journal, "new")
    assert not journal.claim().is_decided


def test_runs_of_an_open_model_are_preferred_for_a_while(journal):
    queue(journal, 1, 0, "other", "other")
    queue(journal, 12, 0, "held", "held")
    found = [journal.claim(held=("held",)).model for _ in range(13)]
    assert found == [*["held"] * 8, "other", *["held"] * 4]


def test_an_open_model_is_no_reason_to_run_before_what_is_urgent(journal):
    queue(journal, 2, 0, "r", "held")
    queue(journal, 1, 1, "u", "other")
    assert journal.claim(held=("held",)).model == "other"


def test_without_several_models_a_series_runs_at_once_in_order_of_arrival(tmp_path, clock):
    journal = Journal(tmp_path / "one", clock)
    complete(journal, "a")
    clock.now += 1
    complete(journal, "b")
    jobs = [journal.claim(), journal.claim()]
    assert [(job.series_uid, job.model, job.is_decided) for job in jobs] == [("a", "", False), ("b", "", False)]
    assert commit(journal, jobs[0])
    journal.close()
