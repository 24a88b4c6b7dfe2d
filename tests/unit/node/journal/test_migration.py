"""A journal of ctflow 0.1 keeps everything: series in every state, results, deliveries, events."""

from __future__ import annotations

import sqlite3

import pytest

from ctflow.core.errors import SettingsInvalid
from ctflow.node.journal import schema
from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import STATES, Arrival, ObjectRecord, Why, WorkerResult
from ctflow.node.journal.writes import digest_of_set, key_of

# As 0.1 made it (version 2); a copy, so that a change of the code's first migrations shows.
OF_0_1 = """
CREATE TABLE series (
    key TEXT PRIMARY KEY,
    series_uid TEXT NOT NULL,
    study_uid TEXT NOT NULL,
    revision INTEGER NOT NULL,
    previous TEXT REFERENCES series(key),
    calling_ae TEXT NOT NULL,
    peer TEXT NOT NULL,
    modality TEXT NOT NULL,
    first_at REAL NOT NULL,
    last_at REAL NOT NULL,
    state TEXT NOT NULL,
    message TEXT,
    expected_instances INTEGER,
    instances INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0,
    duplicates INTEGER NOT NULL DEFAULT 0,
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL DEFAULT 0,
    patient_name TEXT,
    patient_id TEXT,
    patient_birth_date TEXT,
    accession_number TEXT,
    reason TEXT,
    UNIQUE (study_uid, series_uid, revision)
);
CREATE INDEX series_by_state ON series (state, first_at);
CREATE INDEX series_by_last ON series (last_at);
CREATE TABLE instances (
    series_key TEXT NOT NULL REFERENCES series(key),
    sop_instance_uid TEXT NOT NULL,
    sop_class_uid TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL,
    file TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    received_at REAL NOT NULL,
    PRIMARY KEY (series_key, sop_instance_uid)
) WITHOUT ROWID;
CREATE TABLE refusals (
    series_key TEXT NOT NULL REFERENCES series(key),
    sop_instance_uid TEXT NOT NULL,
    at REAL NOT NULL,
    PRIMARY KEY (series_key, sop_instance_uid)
) WITHOUT ROWID;
CREATE TABLE results (
    id INTEGER PRIMARY KEY,
    series_key TEXT NOT NULL REFERENCES series(key),
    revision INTEGER NOT NULL,
    set_digest TEXT NOT NULL,
    folder TEXT NOT NULL,
    model TEXT NOT NULL,
    version TEXT NOT NULL,
    weights TEXT NOT NULL,
    demonstration INTEGER NOT NULL,
    elapsed_s REAL NOT NULL,
    committed_at REAL NOT NULL,
    UNIQUE (series_key, set_digest)
);
CREATE TABLE objects (
    result_id INTEGER NOT NULL REFERENCES results(id),
    file TEXT NOT NULL,
    sop_class_uid TEXT NOT NULL,
    sop_instance_uid TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    PRIMARY KEY (result_id, file)
) WITHOUT ROWID;
CREATE TABLE deliveries (
    id INTEGER PRIMARY KEY,
    result_id INTEGER NOT NULL REFERENCES results(id),
    destination TEXT NOT NULL,
    file TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL DEFAULT 0,
    last_error TEXT,
    sent_at REAL,
    last_reason TEXT,
    UNIQUE (result_id, destination, file)
);
CREATE INDEX deliveries_by_state ON deliveries (destination, state, id);
CREATE TABLE events (
    id INTEGER PRIMARY KEY,
    at REAL NOT NULL,
    kind TEXT NOT NULL,
    series_key TEXT,
    peer TEXT,
    text TEXT NOT NULL
);
CREATE INDEX events_by_series ON events (series_key, id);
PRAGMA user_version = 2;
"""
STUDY = "1.2.3"
ANSWERED = {"done": "waiting", "delivered": "sent", "dead": "dead", "discarded": "withdrawn"}


def key(state: str) -> str:
    return key_of(STUDY, state, 1)


@pytest.fixture
def older(tmp_path):
    """A journal of 0.1 with two instances of a series in each state, and results where the state has one."""
    connection = sqlite3.connect(tmp_path / "journal.sqlite3")
    connection.executescript(OF_0_1)
    for number, state in enumerate(STATES):
        why = ("gap", "a slice is missing") if state in ("aside", "dead") else (None, None)
        connection.execute(
            "INSERT INTO series (key, series_uid, study_uid, revision, calling_ae, peer, modality, first_at, last_at, "
            "state, reason, message, instances, bytes, attempts, deaths, interruptions, next_at) "
            "VALUES (?, ?, ?, 1, 'AE', '10.1.2.3', 'CT', ?, ?, ?, ?, ?, 2, 20, 2, 1, 3, 7.0)",
            (key(state), state, STUDY, number, number + 1.0, state, *why),
        )
        for each in (1, 2):
            row = (key(state), f"{state}.{each}", "1.2", "1.2.1", f"{state}{each}.dcm", 10, "0" * 64, 1.0)
            connection.execute("INSERT INTO instances VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row)
        connection.execute(
            "INSERT INTO events (at, kind, series_key, peer, text) VALUES (1.0, ?, ?, 'peer', 'text')",
            (state, key(state)),
        )
        if state not in ANSWERED:
            continue
        result = connection.execute(
            "INSERT INTO results (series_key, revision, set_digest, folder, model, version, weights, demonstration, "
            "elapsed_s, committed_at) VALUES (?, 1, ?, ?, 'lung', '1.0', 'abc', 1, 1.5, 9.0)",
            (key(state), digest_of_set([f"{state}.1", f"{state}.2"]), f"{key(state)}/x"),
        ).lastrowid
        connection.execute("INSERT INTO objects VALUES (?, 'segmentation.dcm', '1.2', '2.25.1', '00')", (result,))
        connection.execute(
            "INSERT INTO deliveries (result_id, destination, file, state, attempts) VALUES (?, 'pacs', "
            "'segmentation.dcm', ?, 4)",
            (result, ANSWERED[state]),
        )
    connection.execute("INSERT INTO refusals VALUES (?, '1.9', 1.0)", (key("received"),))
    connection.commit()
    connection.close()
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(older):
    journal = Journal(older, lambda: 1000.0)
    yield journal
    journal.close()


def test_every_series_result_delivery_and_event_is_kept(journal, older):
    assert journal.counts() == dict.fromkeys(STATES, 1)
    for state in STATES:
        detail = journal.detail(key(state))
        series = detail.series
        assert (series.state, series.attempts, series.next_at, series.instances) == (state, 2, 7.0, 2)
        assert series.reason == ("gap" if state in ("aside", "dead") else None)
        assert [each.kind for each in detail.events] == [state]
        assert [run.state for run in detail.runs] == ([] if state == "received" else [state])
        assert [(each.model, each.demonstration, each.run_model) for each in detail.results] == (
            [("lung", True, "")] if state in ANSWERED else []
        )
        assert [(each.state, each.attempts) for each in detail.deliveries] == (
            [(ANSWERED[state], 4)] if state in ANSWERED else []
        )
    assert journal.find(key("received")).refused == 1
    assert journal.totals()["results"] == len(ANSWERED)
    with sqlite3.connect(older) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_what_waited_and_ran_runs_once_and_what_was_sent_is_not_sent_again(journal):
    assert journal.recover() == (key("running"),)
    jobs = [journal.claim(), journal.claim()]
    assert [job.key for job in jobs] == [key("complete"), key("running")]
    assert journal.claim() is None
    answer = WorkerResult("a/b", "lung", "1.0", "abc", False, 1.0, (ObjectRecord("s.dcm", "1.2", "2.25.9", ""),))
    for job in jobs:
        assert journal.commit(job, answer, [("pacs", "s.dcm")])
        assert not journal.commit(job, answer, [("pacs", "s.dcm")])
    assert [each.series_key for each in journal.due("pacs", 1000.0, limit=9)] == [key("done"), *(j.key for j in jobs)]
    assert journal.retry(key("dead"))
    assert journal.retry(key("aside"))
    assert journal.find(key("aside")).state == "complete"


def test_an_instance_after_an_old_result_makes_a_revision_that_knows_it(journal):
    late = Arrival(
        "delivered", STUDY, "late", "1.2", "1.2.1", "CT", "AE", "10.1.2.3", "late.dcm", 10, "1" * 64,
    )  # fmt: skip
    receipt = journal.receive(late, most_instances=9, most_bytes=999)
    assert receipt.key == key_of(STUDY, "delivered", 2)
    journal.set_aside(key("complete"), Why("gap", "not this one"))
    journal.complete_quiet(0)
    assert journal.claim().earlier == f"{key('delivered')}/x"


def test_a_migration_that_cannot_finish_leaves_the_journal_as_it_was(older, monkeypatch):
    monkeypatch.setattr(schema, "MIGRATIONS", (*schema.MIGRATIONS[:2], f"{schema.MIGRATIONS[2]} SELECT nothing;"))
    with pytest.raises(SettingsInvalid):
        Journal(older)
    monkeypatch.undo()
    journal = Journal(older)
    assert journal.counts() == dict.fromkeys(STATES, 1)
    journal.close()
