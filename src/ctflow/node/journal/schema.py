"""The journal's tables, and the migrations of older journals."""

from __future__ import annotations

import sqlite3

from ctflow.core.errors import SettingsInvalid

# One statement list per version; MIGRATIONS[n] brings a journal of version n to n+1.
_FIRST = """
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
    reason TEXT,
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
"""
_REASONS = """
ALTER TABLE series RENAME COLUMN reason TO message;
ALTER TABLE series ADD COLUMN reason TEXT;
ALTER TABLE deliveries ADD COLUMN last_reason TEXT;
"""
# An instance may take the place of an earlier one of its UID; objects that are no images of CT are kept beside.
_SAME_UID = """
ALTER TABLE instances ADD COLUMN replaced INTEGER NOT NULL DEFAULT 0;
CREATE TABLE left_out (
    study_uid TEXT NOT NULL,
    series_uid TEXT NOT NULL,
    sop_instance_uid TEXT NOT NULL,
    sop_class_uid TEXT NOT NULL,
    transfer_syntax TEXT NOT NULL,
    modality TEXT NOT NULL,
    calling_ae TEXT NOT NULL,
    peer TEXT NOT NULL,
    file TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    sha256 TEXT NOT NULL,
    received_at REAL NOT NULL,
    PRIMARY KEY (study_uid, series_uid, sop_instance_uid)
) WITHOUT ROWID;
CREATE INDEX instances_by_file ON instances (file);
"""
# The columns deaths and interruptions of `series` stay, unused: SQLite before 3.35 cannot drop them.
_RUNS = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    series_key TEXT NOT NULL REFERENCES series(key),
    model TEXT NOT NULL,
    state TEXT NOT NULL,
    reason TEXT,
    message TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    deaths INTEGER NOT NULL DEFAULT 0,
    interruptions INTEGER NOT NULL DEFAULT 0,
    next_at REAL NOT NULL DEFAULT 0,
    priority INTEGER,
    queued_at REAL NOT NULL,
    UNIQUE (series_key, model)
);
CREATE INDEX runs_by_state ON runs (state, next_at);
INSERT INTO runs (series_key, model, state, reason, message, attempts, deaths, interruptions, next_at, queued_at)
    SELECT key, '', CASE state WHEN 'received' THEN 'done' ELSE state END, reason, message, attempts, deaths,
    interruptions, next_at, last_at FROM series
    WHERE state != 'received' OR EXISTS (SELECT 1 FROM results WHERE series_key = key) ORDER BY first_at, key;
CREATE TABLE results_of_runs (
    id INTEGER PRIMARY KEY,
    run_id INTEGER NOT NULL REFERENCES runs(id),
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
    UNIQUE (run_id, set_digest)
);
INSERT INTO results_of_runs SELECT r.id, runs.id, r.series_key, r.revision, r.set_digest, r.folder, r.model, r.version,
    r.weights, r.demonstration, r.elapsed_s, r.committed_at FROM results r JOIN runs ON runs.series_key = r.series_key;
DROP TABLE results;
ALTER TABLE results_of_runs RENAME TO results;
CREATE INDEX results_by_series ON results (series_key, id);
ALTER TABLE events ADD COLUMN model TEXT;
"""
# What retention removed: no columns of tables that other migrations make anew.
_RETENTION = """
CREATE TABLE pruned_series (series_key TEXT PRIMARY KEY, at REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE pruned_results (result_id INTEGER PRIMARY KEY, at REAL NOT NULL, gone INTEGER NOT NULL);
CREATE INDEX left_out_by_file ON left_out (file);
"""
# Storage commitment: what peers ask of the node, and which request to a destination an object belongs to.
_COMMITMENTS = """
CREATE TABLE commitments (
    id INTEGER PRIMARY KEY,
    transaction_uid TEXT NOT NULL,
    calling_ae TEXT NOT NULL,
    peer TEXT NOT NULL,
    with_tls INTEGER NOT NULL,
    report TEXT NOT NULL,
    state TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0,
    requested_at REAL NOT NULL,
    next_at REAL NOT NULL,
    reported_at REAL,
    last_reason TEXT,
    last_error TEXT,
    UNIQUE (calling_ae, transaction_uid)
);
CREATE INDEX commitments_by_state ON commitments (state, next_at);
CREATE INDEX instances_by_uid ON instances (sop_instance_uid);
CREATE INDEX left_out_by_uid ON left_out (sop_instance_uid);
ALTER TABLE deliveries ADD COLUMN transaction_uid TEXT;
CREATE INDEX deliveries_by_transaction ON deliveries (transaction_uid) WHERE transaction_uid IS NOT NULL;
"""
# So that no write looks at every row: removing a series asks which one names it as its previous one.
_LOOKED_UP = """
CREATE INDEX series_by_previous ON series (previous);
CREATE INDEX results_by_folder ON results (folder);
CREATE INDEX events_by_at ON events (at, kind);
"""
MIGRATIONS = (_FIRST, _REASONS, _SAME_UID, _RUNS, _RETENTION, _COMMITMENTS, _LOOKED_UP)
VERSION = len(MIGRATIONS)


def schema_version(connection: sqlite3.Connection) -> int:
    """The version of a journal; 0 for an empty file.

    Raises:
        SettingsInvalid: A newer ctflow wrote it.
        sqlite3.Error: It cannot be read.
    """
    (found,) = connection.execute("PRAGMA user_version").fetchone()
    if found > VERSION:
        raise SettingsInvalid(
            f"the journal has version {found}, but this ctflow knows only up to {VERSION}: use the "
            "ctflow that wrote it, or another data folder",
            reason="journal",
        )
    return int(found)


def unopened(error: sqlite3.Error) -> SettingsInvalid:
    """The named error for a journal that SQLite cannot open."""
    return SettingsInvalid(f"the journal cannot be opened ({error}): give another data folder", reason="journal")


def bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Create the tables, or migrate those of an older version, all at once or not at all.

    Raises:
        SettingsInvalid: A newer ctflow wrote the journal, or the file is not a journal.
    """
    try:
        connection.execute("PRAGMA foreign_keys = OFF")  # a table that others refer to is made anew
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")  # takes effect in a new file, before its first table
        for version in range(schema_version(connection), VERSION):
            statements = f"BEGIN IMMEDIATE; {MIGRATIONS[version]} PRAGMA user_version = {version + 1}; COMMIT;"
            connection.executescript(statements)
    except sqlite3.DatabaseError as error:
        raise unopened(error) from error
