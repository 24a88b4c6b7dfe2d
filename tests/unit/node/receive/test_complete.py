"""A quiet series is complete, and not a moment before; one that was refused in part waits for the rest."""

from __future__ import annotations

import time

import pytest

from ctflow.core.errors import StorageFull
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import Arrival
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
