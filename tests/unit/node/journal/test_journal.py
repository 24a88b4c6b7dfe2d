"""The journal keeps what it acknowledged, and a series goes only where its states lead."""

from __future__ import annotations

import os
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctflow.core.errors import NotWritten, SettingsInvalid
from ctflow.node.journal import journal as journal_module
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, ObjectRecord, Patient, Why, WorkerResult
from ctflow.node.journal.schema import MIGRATIONS
from ctflow.node.journal.search import SeriesSearch
from ctflow.node.journal.writes import digest_of_set, key_of
from node_support import Clock
from reasons import raises_reason

STUDY, SERIES = "1.2.3", "1.2.3.4"
KEY = key_of(STUDY, SERIES, 1)
LIMITS = {"most_instances": 100, "most_bytes": 10_000}


@pytest.fixture
def clock() -> Clock:
    return Clock(1000.0)


@pytest.fixture
def journal(tmp_path, clock):
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    yield journal
    journal.close()


def arrival(number: int, **other) -> Arrival:
    values = {
        "series_uid": SERIES, "study_uid": STUDY, "sop_instance_uid": f"1.2.3.4.{number}", "sop_class_uid": "1.2",
        "transfer_syntax": "1.2.1", "modality": "CT", "calling_ae": "ROUTER", "peer": "127.0.0.1",
        "file": f"{number}.dcm", "bytes": 10, "sha256": f"{number:064x}",
    }  # fmt: skip
    return Arrival(**{**values, **other})


def receive(journal, *numbers, **other):
    return [journal.receive(arrival(number, **other), **LIMITS) for number in numbers][-1]


def answer(folder="a/b") -> WorkerResult:
    objects = (
        ObjectRecord("segmentation.dcm", "1.2", "2.25.1", "00"),
        ObjectRecord("measurements.dcm", "1.3", "2.25.2", "11"),
    )
    return WorkerResult(folder, "model", "1.0", "abc", False, 1.5, objects)


FILES = ("segmentation.dcm", "measurements.dcm")


def to(*destinations) -> list[tuple[str, str]]:
    return [(destination, file) for destination in destinations for file in FILES]


def done(journal, destinations=("pacs",)):
    """A series with two instances and its result."""
    receive(journal, 1, 2)
    journal.complete_quiet(0)
    job = journal.claim()
    assert journal.commit(job, answer(), to(*destinations))
    return job


def kinds(journal, key=KEY) -> list[str]:
    return [event.kind for event in reversed(journal.events(key=key))]


def test_a_series_goes_its_way_and_every_step_is_in_the_audit_trail(journal, clock):
    assert receive(journal, 1, 2).verdict == "new"
    assert journal.find(KEY).state == "received"
    assert journal.next_quiet_at(5) == 1005
    clock.now += 4.9
    assert journal.complete_quiet(5) == ()
    clock.now += 0.1
    assert journal.complete_quiet(5) == (KEY,)
    job = journal.claim()
    assert (job.key, len(job.instances), job.attempts) == (KEY, 2, 1)
    assert job.set_digest == digest_of_set(["1.2.3.4.2", "1.2.3.4.1"])
    assert journal.claim() is None
    assert journal.commit(job, answer(), to("pacs", "archive"))
    assert journal.find(KEY).state == "done"
    first = journal.due("pacs", clock.now, limit=10)
    assert [each.file for each in first] == list(FILES)
    for each in (*first, *journal.due("archive", clock.now, limit=10)):
        assert journal.find(KEY).state == "done"
        journal.sent(each.id, f"{each.file} sent")
    assert journal.find(KEY).state == "delivered"
    assert kinds(journal) == ["received", "complete", "running", "done", "sent", "sent", "sent", "sent", "delivered"]
    detail = journal.detail(KEY)
    assert [each.file for each in detail.instances] == ["1.dcm", "2.dcm"]
    assert detail.results[0].objects[0].file == "segmentation.dcm"
    assert {each.state for each in detail.deliveries} == {"sent"}
    assert journal.counts()["delivered"] == 1
    assert journal.totals() == {"series": 1, "instances": 2, "bytes": 20, "duplicates": 0, "results": 1}


def test_a_second_start_finds_everything_and_runs_what_was_running(tmp_path, clock):
    first = Journal(tmp_path / "j", clock)
    receive(first, 1)
    receive(first, 1, series_uid="later")
    first.complete_quiet(0)
    first.claim()
    first.close()
    second = Journal(tmp_path / "j", clock)
    assert second.recover() == (KEY,)
    # What the node ended with may have ended it: the others come first.
    assert second.claim().series_uid == "later"
    job = second.claim()
    assert (job.key, job.attempts) == (KEY, 1)
    second.close()


def test_beside_others_runs_nothing_that_was_tried_before_and_no_series_twice(journal):
    for uid in ("first", "second"):
        receive(journal, 1, series_uid=uid)
    journal.complete_quiet(0)
    first = journal.claim()
    second = journal.claim({first.key})
    assert (first.series_uid, second.series_uid) == ("first", "second")
    assert journal.try_again(second, Why("gap", "later"), 0.0)
    assert journal.claim({first.key}) is None
    assert journal.claim().attempts == 2
    receive(journal, 2, series_uid="first")  # while it runs
    journal.complete_quiet(0)
    assert journal.claim({second.key, first.key}) is None
    assert journal.claim({second.key}).key == first.key


def test_the_same_instance_is_a_duplicate_and_another_content_a_conflict(journal):
    receive(journal, 1)
    assert receive(journal, 1, file="other.dcm").verdict == "duplicate"
    kept = journal.instances(KEY)[0].sha256
    assert receive(journal, 1, transfer_syntax="1.2.4", sha256="f", same_as=kept).verdict == "duplicate"
    assert receive(journal, 1, transfer_syntax="1.2.4", sha256="f", same_as="another").verdict == "conflict"
    assert "in another transfer syntax that cannot be compared; the first one is kept" in journal.events()[0].text
    assert receive(journal, 1, transfer_syntax="1.2.4", sha256="f").verdict == "conflict"
    assert receive(journal, 1, sha256="f").verdict == "conflict"
    assert [each.file for each in journal.instances(KEY)] == ["1.dcm"]
    assert journal.find(KEY).duplicates == 2
    assert "conflict" in kinds(journal)


def test_a_late_instance_reopens_a_series_and_what_runs_without_it_is_not_kept(journal):
    receive(journal, 1)
    journal.complete_quiet(0)
    job = journal.claim()
    receive(journal, 2)
    assert journal.find(KEY).state == "received"
    assert not journal.commit(job, answer(), ())
    assert not journal.results(KEY)
    journal.complete_quiet(0)
    assert journal.commit(journal.claim(), answer(), ())


def test_an_instance_after_the_result_makes_a_revision_that_knows_the_earlier_one(journal):
    done(journal)
    receipt = receive(journal, 3)
    assert receipt.key == key_of(STUDY, SERIES, 2)
    found = journal.find(receipt.key)
    assert (found.revision, found.previous, found.instances, found.bytes) == (2, KEY, 3, 30)
    assert journal.find(KEY).state == "done"  # its result is still to be sent
    assert receive(journal, 1).verdict == "duplicate"
    journal.complete_quiet(0)
    job = journal.claim()
    assert len(job.instances) == 3
    assert job.earlier == "a/b"


def test_the_senders_count_completes_a_series_at_once(journal):
    assert not receive(journal, 1, 2, expected_instances=3).completes
    assert receive(journal, 3).completes
    assert journal.find(KEY).state == "complete"


def test_a_series_waits_for_what_was_refused_and_is_set_aside_if_it_never_comes(journal, clock):
    receive(journal, 1, expected_instances=2)
    journal.refused(arrival(2), "the disk is nearly full")
    clock.now += 100
    assert journal.complete_quiet(5) == ()
    assert journal.next_quiet_at(5) is None
    assert journal.find(KEY).refused == 1
    assert receive(journal, 2).completes
    journal.refused(arrival(1, series_uid="other"), "the disk is nearly full")
    clock.now += 100
    assert journal.give_up_refused(99) == (key_of(STUDY, "other", 1),)
    assert journal.find(key_of(STUDY, "other", 1)).reason == "not-sent-again"


def test_a_series_that_is_too_large_is_set_aside_and_takes_no_more(journal):
    receive(journal, 1)
    for limits in ({"most_instances": 1, "most_bytes": 10_000}, {"most_instances": 9, "most_bytes": 19}):
        assert journal.receive(arrival(2), **limits).verdict == "too-much"
    assert (journal.find(KEY).state, journal.find(KEY).reason) == ("aside", "series-too-large")
    assert journal.find(KEY).instances == 1


def test_a_case_that_kills_its_worker_is_tried_once_more_and_then_set_aside(journal):
    receive(journal, 1)
    journal.complete_quiet(0)
    assert journal.worker_died(journal.claim(), "the worker ended with signal 9")
    assert not journal.worker_died(journal.claim(), "the worker ended with signal 9")
    assert journal.find(KEY).state == "aside"
    assert journal.find(KEY).reason == "worker-died"
    assert journal.retry(KEY)
    assert journal.find(KEY).state == "complete"


def test_a_failure_waits_before_it_is_tried_again(journal, clock):
    receive(journal, 1)
    journal.complete_quiet(0)
    job = journal.claim()
    assert journal.try_again(job, Why("out-of-memory", "no memory"), 30)
    assert journal.claim() is None
    assert journal.next_run_at() == clock.now + 30
    clock.now += 30
    assert journal.claim().attempts == 2
    assert journal.give_up(job, Why("out-of-memory", "no memory, 2 times"))
    assert (journal.find(KEY).reason, journal.find(KEY).message) == ("out-of-memory", "no memory, 2 times")
    assert journal.find(KEY).state == "dead"


def test_an_object_that_does_not_arrive_is_sent_later_or_is_a_dead_letter(journal, clock):
    done(journal)
    seg, sr = journal.due("pacs", clock.now, limit=10)
    journal.not_sent(seg.id, Why("no-answer", "no answer"), 60)
    assert journal.due("pacs", clock.now, limit=10) == (sr,)
    assert journal.next_delivery_at("pacs") == 0
    journal.sent(sr.id, "sent")
    assert journal.next_delivery_at("pacs") == clock.now + 60
    journal.not_sent(seg.id, Why("object-refused", "refused: 0122H"), None)
    assert journal.find(KEY).reason == journal.detail(KEY).deliveries[0].last_reason == "object-refused"
    assert journal.find(KEY).state == "dead"
    assert journal.backlog() == {"pacs": {"dead": 1, "sent": 1}}
    assert journal.retry(KEY)
    assert journal.due("pacs", clock.now, limit=10)[0].id == seg.id
    journal.sent(seg.id, "sent")
    assert journal.find(KEY).state == "delivered"
    assert not journal.retry(KEY)


def test_a_discarded_series_is_neither_run_nor_sent_until_someone_wants_it(journal, clock):
    done(journal)
    assert journal.discard(KEY, by="page")
    assert not journal.discard(KEY)
    assert not journal.due("pacs", clock.now, limit=10)
    receive(journal, 1)  # sent again: the result is there already
    assert journal.find(KEY).state == "done"
    assert len(journal.due("pacs", clock.now, limit=10)) == 2
    receive(journal, 1, series_uid="other")
    other = key_of(STUDY, "other", 1)
    journal.discard(other)
    receive(journal, 1, series_uid="other")
    assert journal.find(other).state == "received"
    assert not journal.discard("unknown")
    assert not journal.retry("unknown")


def test_patient_data_is_kept_only_where_it_is_given(journal):
    receive(journal, 1)
    assert journal.find(KEY).patient is None
    patient = Patient("A^B", "1", "19500101", "7")
    receive(journal, 1, series_uid="other", patient=patient)
    assert journal.find(key_of(STUDY, "other", 1)).patient == patient


def test_lists_are_the_newest_first_and_go_on_page_by_page(journal, clock):
    for name in ("a", "b", "c"):
        clock.now += 1
        receive(journal, 1, series_uid=name)
    first = journal.series(limit=2)
    assert [each.series_uid for each in first] == ["c", "b"]
    assert [each.series_uid for each in journal.series(limit=2, before=(first[-1].last_at, first[-1].key))] == ["a"]
    assert journal.series(SeriesSearch(("done",))) == ()
    assert journal.files() == {"1.dcm"}


def test_many_threads_write_at_once_and_each_gets_its_own_answer(journal):
    with ThreadPoolExecutor(16) as pool:
        receipts = list(pool.map(lambda n: journal.receive(arrival(n % 50), **LIMITS), range(100)))
    assert sorted(receipt.verdict for receipt in receipts) == ["duplicate"] * 50 + ["new"] * 50


def test_a_failing_write_spoils_no_other_of_its_batch(journal):
    def fail(_db):
        raise ValueError("mine")

    with ThreadPoolExecutor(8) as pool:
        failing = [pool.submit(journal._write, fail) for _ in range(8)]
        good = [pool.submit(receive, journal, n) for n in range(8)]
        assert all(future.result().verdict == "new" for future in good)
        for future in failing:
            with pytest.raises(ValueError, match="mine"):
                future.result()


def test_who_listens_is_told_of_every_write(journal):
    told = threading.Event()
    journal.on_change(told.set)
    journal.event("note", "text", peer="127.0.0.1")
    assert told.wait(10)
    assert journal.events()[0].kind == "note"
    newest = journal.events()[0].id
    assert journal.events_after(newest, limit=9) == ()
    journal.event("note", "another")
    journal.event("note", "a third")
    assert [event.id for event in journal.events_after(newest, limit=1)] == [newest + 1]
    assert [event.id for event in journal.events(before=newest + 2)] == [newest + 1, newest]


def test_threads_that_come_and_go_leave_nothing_open(journal):
    """Each association is a thread that asks; a descriptor left by each would end the node after some hundreds."""
    receive(journal, 1)

    def descriptors() -> int:
        opened = [os.readlink(each) for each in Path("/proc/self/fd").iterdir() if each.is_symlink()]  # noqa: PTH115
        return sum(name.startswith(str(journal.path)) for name in opened)

    for _ in range(40):
        thread = threading.Thread(target=journal.series)
        thread.start()
        thread.join()
    before = descriptors()
    with ThreadPoolExecutor(20) as pool:
        assert len(list(pool.map(lambda _: journal.series(), range(200)))) == 200
    assert before <= descriptors() <= before + 2 * 8


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_waits_when_the_writer_ends_is_told(journal, monkeypatch):
    began, go_on = threading.Event(), threading.Event()

    def fail(_self, _connection, _batch) -> None:
        began.set()
        go_on.wait(30)
        raise SystemExit  # a thread ends with it, and says nothing

    monkeypatch.setattr(Journal, "_write_batch", fail)
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(journal.event, "note", "text")
        assert began.wait(30)
        go_on.set()
        with raises_reason(NotWritten, "journal-closed"):
            waits.result(30)


def test_a_journal_of_the_first_version_keeps_its_sentences(tmp_path):
    connection = sqlite3.connect(tmp_path / "older")
    connection.executescript(f"{MIGRATIONS[0]} PRAGMA user_version = 1;")
    columns = "key, series_uid, study_uid, revision, calling_ae, peer, modality, first_at, last_at, state, reason"
    row = ("k", "1.2", "1.3", 1, "AE", "10.1.2.3", "CT", 1.0, 2.0, "aside", "a slice is missing")
    connection.execute(f"INSERT INTO series ({columns}) VALUES ({', '.join('?' * len(row))})", row)
    connection.commit()
    connection.close()
    journal = Journal(tmp_path / "older")
    assert (journal.find("k").reason, journal.find("k").message) == (None, "a slice is missing")
    assert journal.set_aside("k", Why("gap", "two slices are missing"))
    assert (journal.find("k").reason, journal.find("k").message) == ("gap", "two slices are missing")
    journal.close()


def test_what_is_no_journal_or_a_newer_one_is_refused(tmp_path, journal):
    (tmp_path / "text").write_bytes(b"no database" * 100)
    with raises_reason(SettingsInvalid, "journal"):
        Journal(tmp_path / "text")
    with raises_reason(SettingsInvalid, "journal"):
        Journal(tmp_path / "nowhere" / "journal")
    connection = sqlite3.connect(tmp_path / "newer")
    connection.execute("PRAGMA user_version = 99")
    connection.commit()
    connection.close()
    with raises_reason(SettingsInvalid, "journal", names="99"):
        Journal(tmp_path / "newer")
    journal.close()
    with raises_reason(NotWritten, "journal-closed"):
        receive(journal, 1)


class Unreliable:
    """A connection of which some statements fail, once each."""

    def __init__(self, connection: sqlite3.Connection, *statements: str) -> None:
        self._connection, self._fails = connection, list(statements)

    def execute(self, statement, *given):
        if statement in self._fails:
            self._fails.remove(statement)
            raise sqlite3.OperationalError(f"{statement}: disk I/O error")
        return self._connection.execute(statement, *given)

    def __getattr__(self, name):
        return getattr(self._connection, name)


@pytest.fixture
def opened(monkeypatch):
    """What opens the writer's connection, one after the other; a connection like others where nothing is left."""
    real, left = journal_module._opened, []
    monkeypatch.setattr(journal_module, "_opened", lambda path: (left.pop(0) if left else (lambda c: c))(real(path)))
    return left


def test_a_rollback_that_fails_too_undoes_all_the_same_and_is_told(tmp_path, clock, opened, caplog):
    opened.append(lambda connection: Unreliable(connection, "COMMIT", "ROLLBACK"))
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    with raises_reason(NotWritten, "unwritable"):
        journal.event("note", "lost")
    journal.event("note", "kept")
    assert [event.text for event in journal.events()] == ["kept"]
    assert "reopens the journal" in caplog.text
    assert all(thread.is_alive() for thread in journal.threads)
    journal.close()


def test_a_listener_that_fails_ends_no_writing(journal, caplog):
    journal.on_change(lambda: (_ for _ in ()).throw(TypeError("no")))
    for text in ("first", "second"):
        journal.event("note", text)
    assert {event.text for event in journal.events()} == {"first", "second"}
    assert "TypeError" in caplog.text


def test_a_journal_that_cannot_be_opened_again_says_so_and_ends(tmp_path, clock, opened, caplog):
    def refuses(connection):
        connection.close()
        raise NotWritten("no such folder", reason="unwritable")

    opened += [lambda connection: Unreliable(connection, "COMMIT", "ROLLBACK"), refuses]
    journal = Journal(tmp_path / "journal.sqlite3", clock)
    with raises_reason(NotWritten, "unwritable"):
        journal.event("note", "lost")
    (thread,) = journal.threads
    thread.join(60)
    assert not thread.is_alive(), "what `/readyz` looks at"
    assert "start the node again" in caplog.text
    with raises_reason(NotWritten, "journal-closed"):
        journal.event("note", "never")
    journal.close()
