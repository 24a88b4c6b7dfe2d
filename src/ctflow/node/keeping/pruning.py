"""Who carries retention out: a thread of the node, at intervals and when `ctflow node prune` asks; or that command."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
import sqlite3
import threading
import time
from pathlib import Path
from typing import Any

from ctflow.core.atomic import write_atomically
from ctflow.core.errors import CtflowError, NotWritten, OutputError, SettingsInvalid
from ctflow.node.journal.journal import JOURNAL_FILE, Journal
from ctflow.node.journal.reading import JournalReader
from ctflow.node.journal.schema import VERSION, schema_version, unopened
from ctflow.node.keeping.locks import is_in_use, only_one
from ctflow.node.keeping.retention import carry_out, document_of, forgettable_events, plan_removals
from ctflow.node.settings.retention import Retention

REQUEST_FILE, ANSWER_FILE = "prune-request", "prune-answer"  # in the data folder, between the command and the node
_LOOK_S = 0.5  # for a request
_DISK_S = 60.0  # between checks of the free space
_ROUND_S = 900.0  # between rounds by age
_MOST_WAIT_S = 1800.0  # for a node that removes

log = logging.getLogger(__name__)


class RetentionThread(threading.Thread):
    """Removes what the settings say, while the node runs.

    Args:
        journal: The node's.
        data: Its data folder.
        retention: The settings.
    """

    def __init__(self, journal: Journal, data: Path, retention: Retention) -> None:
        super().__init__(name="retention", daemon=True)
        self._journal, self._data, self._retention = journal, data, retention
        self._ending = threading.Event()

    def run(self) -> None:
        """Run until `stop`."""
        round_at = disk_at = time.monotonic()
        while not self._ending.wait(_LOOK_S):
            now = time.monotonic()
            if (self._data / REQUEST_FILE).exists():
                self._answer()
            elif self._retention.removes and (now >= round_at or (now >= disk_at and self._is_disk_low())):
                self._round()
                round_at = time.monotonic() + _ROUND_S
            if now >= disk_at:
                disk_at = now + _DISK_S

    def stop(self) -> None:
        """End; returns when the thread has ended."""
        self._ending.set()
        self.join()

    def _is_disk_low(self) -> bool:
        wanted = self._retention.free_disk
        return wanted is not None and shutil.disk_usage(self._data).free < wanted

    def _round(self) -> dict[str, Any] | None:
        try:
            return carry_out(self._journal, self._data, self._retention, time.time(), is_ending=self._ending.is_set)
        except OutputError as error:  # the journal's disk is full: what is not recorded is not removed
            log.error("%s", error)  # noqa: TRY400  # named: no traceback needed
        except (OSError, sqlite3.Error) as error:
            log.error("retention: %s", type(error).__name__)  # noqa: TRY400
        return None

    def _answer(self) -> None:
        """Do what `ctflow node prune` asks for, and say what was done."""
        request = self._data / REQUEST_FILE
        try:
            token = request.read_text(encoding="ascii")[:64]
            request.unlink()
            answer = json.dumps({"token": token, "document": self._round()})
            write_atomically(self._data / ANSWER_FILE, lambda stream: stream.write(answer.encode()))
        except (OSError, OutputError, UnicodeDecodeError) as error:
            log.error("retention: a request cannot be answered (%s)", type(error).__name__)  # noqa: TRY400


def prune(data: Path, retention: Retention, *, dry_run: bool, most_wait_s: float = _MOST_WAIT_S) -> dict[str, Any]:
    """Remove what the settings say, or say what would be removed; a node that uses the folder does the work.

    Args:
        data: The data folder.
        retention: The settings.
        dry_run: Remove nothing.
        most_wait_s: Seconds to wait for the node.

    Raises:
        SettingsInvalid: There is no journal, or one of another version.
        OutputError: It cannot be written, or the node did not answer.
    """
    _require_journal(data)
    if dry_run:
        reader = opened_reader(data)
        try:
            removals = plan_removals(reader, data, retention, time.time())
            return document_of(removals, forgettable_events(reader, data, retention, time.time()), dry_run=True)
        finally:
            reader.close()
    if is_in_use(data):
        return _asked(data, most_wait_s)
    with only_one(data):
        journal = Journal(data / JOURNAL_FILE)
        try:
            return carry_out(journal, data, retention, time.time())
        finally:
            journal.close()


def _require_journal(data: Path) -> None:
    try:
        (data / JOURNAL_FILE).stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SettingsInvalid("data: there is no journal in this folder: name the node's", reason="journal") from error
    except OSError as error:  # the node's folder is closed to other users
        raise SettingsInvalid(
            f"data: the folder cannot be entered ({error.strerror}): start as the node's user", reason="missing-folder"
        ) from error


def opened_reader(data: Path) -> JournalReader:
    """The journal of a data folder, to read only.

    Raises:
        SettingsInvalid: There is none, it cannot be read, or another version of ctflow has written it.
    """
    _require_journal(data)
    reader = JournalReader(data / JOURNAL_FILE)
    try:
        found = reader.look(schema_version)
    except sqlite3.Error as error:
        raise unopened(error) from error
    except CtflowError:
        reader.close()
        raise
    if found != VERSION:
        reader.close()
        raise SettingsInvalid(
            f"the journal has version {found}, and this ctflow's is {VERSION}: start the node once", reason="journal"
        )
    return reader


def _asked(data: Path, most_wait_s: float) -> dict[str, Any]:
    """Ask the node that uses the folder, and wait for its answer."""
    token = secrets.token_hex(16)
    write_atomically(data / REQUEST_FILE, lambda stream: stream.write(token.encode()))
    deadline = time.monotonic() + most_wait_s
    while time.monotonic() < deadline and is_in_use(data):
        time.sleep(0.2)
        try:
            answer = json.loads((data / ANSWER_FILE).read_bytes())
        except (OSError, ValueError):
            continue
        if answer["token"] != token:
            continue
        (data / ANSWER_FILE).unlink(missing_ok=True)
        if answer["document"] is None:
            raise NotWritten("the node could not remove anything: its log says why", reason="prune-failed")
        document: dict[str, Any] = answer["document"]
        return document
    (data / REQUEST_FILE).unlink(missing_ok=True)
    raise NotWritten("the node that uses the folder did not answer: see its log", reason="prune-failed")
