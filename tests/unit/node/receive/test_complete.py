"""A quiet series is complete, and not a moment before; one that was refused in part waits for the rest."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial

import pytest

from ctflow.core.errors import StorageFull
from ctflow.node.journal.clock import move_after_start, move_with_clock
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival, Why
from ctflow.node.receive.complete import Completer
from service_support import wait_until


@pytest.fixture
def journal(tmp_path):
    journal = Journal(tmp_path / "journal.sqlite3")
    yield journal
    journal.close()


@pytest.fixture
def completer(journal):
    started = []

    def start(quiet_s: float, refused_wait_s: float = 3600.0) -> Completer:
        started.append(Completer(journal, quiet_s, refused_wait_s))
        started[-1].start()
        return started[-1]

    yield start
    for each in started:
        each.stop()


def arrival(number: int) -> Arrival:
    return Arrival("1.1", "1.2", f"1.3.{number}", "1.4", "1.5", "CT", "AE", "127.0.0.1", f"{number}", 1, f"{number}")


def receive(journal, number: int) -> str:
    return journal.receive(arrival(number), most_instances=9, most_bytes=999).key


def test_a_series_is_complete_a_quiet_period_after_its_last_instance(journal, completer):
    completer(0.3)
    key = receive(journal, 1)
    receive(journal, 2)
    last_at = journal.find(key).last_at
    wait_until(lambda: journal.find(key).state == "complete", "it is complete")
    completed = next(event for event in journal.events(key=key) if event.kind == "complete")
    assert completed.at - last_at >= 0.3


def test_what_was_being_sent_when_the_node_ended_gets_a_quiet_period_to_go_on(journal, completer):
    key = receive(journal, 1)
    started = time.time()
    completer(0.4)
    wait_until(lambda: journal.find(key).state == "complete", "it is complete")
    completed = next(event for event in journal.events(key=key) if event.kind == "complete")
    assert completed.at - started >= 0.4


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_the_series_of_a_study_wait_until_the_whole_study_is_quiet_and_a_late_one_waits_alone(tmp_path):
    clock = Clock()
    journal = Journal(tmp_path / "study.sqlite3", clock)

    def come(series: str, study: str = "1.2", take=journal.receive) -> str:
        found = replace(arrival(1), series_uid=series, study_uid=study, sop_instance_uid=f"{series}.{clock.now:g}")
        return take(replace(found, file=f"{study}{series}{clock.now:g}"), most_instances=9, most_bytes=999).key

    first = come("1.1")
    clock.now += 50
    second, other = come("2.1"), come("3.1", "9.9")
    clock.now += 50
    come("4.1", take=journal.leave_out)  # a dose report of the study
    assert journal.next_quiet_study_at(60) == clock.now + 10  # of the other study
    clock.now += 10
    assert journal.complete_quiet_studies(60) == (other,)
    clock.now += 49.9
    assert journal.complete_quiet_studies(60) == ()
    clock.now += 0.1
    assert journal.complete_quiet_studies(60) == (first, second)
    late = come("5.1")
    assert journal.next_quiet_study_at(60) == clock.now + 60
    clock.now += 60
    assert journal.complete_quiet_studies(60) == (late,)
    assert [journal.find(key).state for key in (first, second)] == ["complete", "complete"]
    assert journal.next_quiet_study_at(60) is None
    journal.close()


def test_a_completer_by_study_completes(journal):
    completer = Completer(journal, 0.2, by_study=True)
    key = receive(journal, 1)
    completer.start()
    wait_until(lambda: journal.find(key).state == "complete", "it is complete")
    completer.stop()
    assert "of its study" in journal.events(key=key, limit=1)[0].text


def test_refused_instances_that_never_come_set_their_series_aside(journal, completer):
    key = receive(journal, 1)
    journal.refused(arrival(2), "the disk is nearly full")
    completer(0.05, refused_wait_s=0.05)
    wait_until(lambda: journal.find(key).state == "aside", "it is set aside")


def test_a_full_disk_delays_completing_and_ends_nothing(journal, completer, monkeypatch):
    key = receive(journal, 1)
    failures = [StorageFull("no space left for the journal: free some space")]
    real = journal.complete_quiet

    def complete_quiet(quiet_s):
        if failures:
            raise failures.pop()
        return real(quiet_s)

    monkeypatch.setattr(journal, "complete_quiet", complete_quiet)
    completer(0.05)
    wait_until(lambda: journal.find(key).state == "complete", "it is complete")


class SetClock:
    """A clock that can be set, for the journal and for the completer, and a computer that sleeps; uptime is true."""

    CLOCK_BOOTTIME = time.CLOCK_BOOTTIME

    def __init__(self) -> None:
        self.by_s = self.slept_s = 0.0

    def time(self) -> float:
        return time.time() + self.by_s + self.slept_s

    def clock_gettime(self, clock: int) -> float:
        return time.clock_gettime(clock) + self.slept_s

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture
def clock(monkeypatch):
    clock = SetClock()
    monkeypatch.setattr("ctflow.node.receive.complete.time", clock)
    return clock


@pytest.fixture
def dated(tmp_path, clock):
    journal = Journal(tmp_path / "dated.sqlite3", clock=clock.time)
    yield journal
    journal.close()


def told(journal) -> list[str]:
    return [event.text for event in journal.events() if event.kind == "clock-set"]


@pytest.mark.parametrize("by_study", [False, True])
def test_a_clock_that_is_set_back_holds_up_no_series(dated, clock, by_study):
    ended = dated.receive(replace(arrival(7), series_uid="1.9"), most_instances=9, most_bytes=999).key
    dated.complete_quiet(0.0)
    completer = Completer(dated, 0.3, by_study=by_study)
    key, before = receive(dated, 1), dated.find(ended).last_at
    clock.by_s = -3600
    receive(dated, 2)  # also with an instance that came before it was noticed
    completer.start()
    wait_until(lambda: dated.find(key).state == "complete", "it is complete")
    completer.stop()
    assert told(dated) == ["the clock was set back by 3600 s"]
    assert dated.find(ended).last_at == before  # what is finished keeps its times


@pytest.mark.parametrize(("set_by", "slept", "text"), [
    (3600, 0, "the clock was set forward by 3600 s"), (0, 28800, "the computer slept for 28800 s"),
])  # fmt: skip
def test_a_clock_that_jumps_forward_ends_no_quiet_period(dated, clock, set_by, slept, text):
    completer = Completer(dated, 0.5)
    key = receive(dated, 1)
    clock.by_s, clock.slept_s = set_by, slept
    receive(dated, 2)
    begun = time.monotonic()
    completer.start()
    wait_until(lambda: told(dated), "it is noticed")
    assert told(dated) == [text]
    assert dated.find(key).state == "received"
    wait_until(lambda: dated.find(key).state == "complete", "it is complete")
    completer.stop()
    assert time.monotonic() - begun >= 0.5


def test_a_clock_that_is_set_again_and_again_starves_no_series_and_fills_no_trail(dated, clock):
    completer = Completer(dated, 1.0)
    key = receive(dated, 1)
    for _ in range(5):
        time.sleep(0.3)
        clock.by_s += 2.0
        completer._follow_clock()
    assert dated.find(key).last_at <= clock.time() - 1.4
    assert len(told(dated)) == 1


def test_retries_move_with_a_clock_that_is_set_back_while_the_node_was_down(dated, clock):
    key = receive(dated, 1)
    dated.complete_quiet(0.0)
    dated.try_again(dated.claim(), Why("no-worker", "none"), 30.0)
    clock.by_s = -86400
    dated.change(partial(move_after_start, longest_s=40.0))
    assert clock.time() < dated.next_run_at() < clock.time() + 31
    assert dated.find(key).next_at < clock.time() + 31
    assert told(dated) == ["the clock was set back by 86400 s or more"]
    dated.change(partial(move_after_start, longest_s=40.0))
    assert len(told(dated)) == 1


def test_no_wait_outlives_a_start_by_more_than_the_longest_although_a_set_clock_was_not_seen(dated, clock):
    """What happened last may lie hours back, and hide how far the clock was set."""
    receive(dated, 1)
    dated.complete_quiet(0.0)
    dated.try_again(dated.claim(), Why("no-worker", "none"), 7200.0)
    dated.change(partial(move_after_start, longest_s=40.0))
    assert dated.next_run_at() < clock.time() + 41
    assert told(dated) == []


def test_waiting_series_keep_their_turn_when_the_clock_is_set_back(dated, clock):
    first = receive(dated, 1)
    dated.complete_quiet(0.0)
    clock.by_s = -86400
    dated.change(partial(move_with_clock, by_s=-86400.0, tell=""))
    dated.receive(replace(arrival(7), series_uid="1.9"), most_instances=9, most_bytes=999)
    dated.complete_quiet(0.0)
    assert dated.claim().key == first
