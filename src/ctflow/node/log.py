"""The node's log: one JSON object per line, including the audit trail, without patient data.

The journal is the trail of record; the log repeats it, each event at least once and with its number.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from ctflow.core.atomic import output_error_from_oserror, write_atomically
from ctflow.core.entry_point import keep_values_out, show_tracebacks, traceback_without_texts
from ctflow.node.journal.reading import JournalReader
from ctflow.node.journal.records import EventRecord
from ctflow.node.settings.groups import Log

AUDIT = logging.INFO + 5  # above info, so that `level: info` shows it; its logger shows it at every level
_LONGEST_TEXT = 2000
_GATHER_S = 0.2  # the journal changes with every instance; its events are logged together
_PAGE = 500  # events per read: a journal of years, logged from its beginning, must not be in memory whole
POSITION_FILE = "audit-position"  # in the data folder
_TERSE = ("uvicorn",)  # it logs its own start and end, which the node also logs

_audit = logging.getLogger("ctflow.audit")


class JsonLines(logging.Formatter):
    """A record as one JSON object in one line.

    Keys: `time` (UTC, to the millisecond), `level`, `logger`, `message`; `event`, `series` and others of the audit
    trail; `error`, the kind and place of an exception without its text, which may hold patient data.
    """

    def format(self, record: logging.LogRecord) -> str:
        """One line without its line break."""
        line: dict[str, Any] = {
            "time": _iso(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_LONGEST_TEXT],
        }
        line |= getattr(record, "facts", {})
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = traceback_without_texts(record.exc_info[1])
        return json.dumps(line, allow_nan=False, default=str)


def set_up_node_log(settings: Log, stream: TextIO | None = None) -> logging.Handler:
    """Send the log of the whole process to the file or stream of the settings, as JSON lines.

    Args:
        settings: The target, the lowest level, and when a file is rotated.
        stream: In place of standard output.

    Returns:
        The handler, for `close_node_log`.

    Raises:
        OutputError: The file cannot be opened.
    """
    handler: logging.Handler
    if settings.file is None:
        handler = logging.StreamHandler(stream or sys.stdout)
    else:
        try:
            settings.file.parent.mkdir(parents=True, exist_ok=True)
            handler = RotatingFileHandler(
                settings.file, maxBytes=settings.rotate_at, backupCount=settings.keep, encoding="utf-8"
            )
        except OSError as error:
            raise output_error_from_oserror(error, "the log file") from error
    handler.setFormatter(JsonLines())
    keep_values_out(handler)
    logging.addLevelName(AUDIT, "AUDIT")
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    show_tracebacks()
    _audit.setLevel(AUDIT)
    for name in _TERSE:
        logging.getLogger(name).setLevel(logging.WARNING)
    return handler


def close_node_log(handler: logging.Handler) -> None:
    """Remove the handler and close its file."""
    logging.getLogger().removeHandler(handler)
    handler.close()


def position_in(file: Path) -> int:
    """The number of the last logged event that a file keeps; 0 if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return int(file.read_bytes()[:20])
    return 0


class AuditTrail:
    """Copies every event of the journal to the log, in order, also those before a crash.

    Args:
        journal: Source of the events.
        position: File with the number of the last logged event. Without it the trail starts at the first.
    """

    def __init__(self, journal: JournalReader, position: Path) -> None:
        self._journal = journal
        self._position = position
        self._told = self._read_position()
        self._kept = self._told
        self._lock = threading.Lock()

    def tell(self) -> int:
        """Write new events; return the number of lines.

        Raises:
            OutputError: The position cannot be stored; the lines are written anyway, and again after a restart.
        """
        with self._lock:
            told = 0
            while page := self._journal.events_after(self._told, limit=_PAGE):
                for event in page:
                    _audit.log(AUDIT, event.text, extra={"facts": self._facts(event)})
                    self._told, told = event.id, told + 1
                if len(page) < _PAGE:
                    break
            if self._told != self._kept:
                write_atomically(self._position, lambda stream: stream.write(b"%d\n" % self._told))
                self._kept = self._told
            return told

    def _read_position(self) -> int:
        """The stored number; 0 if there is none, or one that this journal has not reached."""
        newest, kept = self._journal.events(limit=1), position_in(self._position)
        return kept if newest and 0 <= kept <= newest[0].id else 0

    def _facts(self, event: EventRecord) -> Mapping[str, Any]:
        """The sender, what it sent and when, and the model and version of the result."""
        facts = {"event": event.kind, "event_id": event.id, "at": _iso(event.at), "peer": event.peer}
        facts["run"] = event.model  # of several models
        series = self._journal.find(event.series_key) if event.series_key else None
        if series is not None:
            facts |= {"series": series.digest, "key": series.key, "revision": series.revision}
            facts |= {"calling_ae": series.calling_ae, "instances": series.instances}
        if series is not None and event.kind == "done":
            facts |= self._answer(series.key, event.model or "", event.at)
        return {name: value for name, value in facts.items() if value is not None}

    def _answer(self, key: str, model: str, at: float) -> Mapping[str, Any]:
        results = [
            result for result in self._journal.results(key) if result.committed_at <= at and result.run_model == model
        ]
        if not results:
            return {}
        newest = results[-1]
        return {
            "model": newest.model,
            "model_version": newest.version,
            "weights": newest.weights,
            "demonstration": newest.demonstration,
            "seconds": round(newest.elapsed_s, 3),
        }


@contextlib.contextmanager
def told_forever(trail: AuditTrail, changed: threading.Event) -> Iterator[threading.Thread]:
    """A thread that logs new events whenever `changed` is set (by the journal's listener), and at the end.

    Args:
        trail: Writes the events.
        changed: Cleared by the thread.

    Yields:
        The thread.
    """
    ending = threading.Event()

    def tell() -> None:
        while not ending.is_set():
            changed.wait()
            ending.wait(_GATHER_S)
            changed.clear()
            _tell(trail)

    thread = threading.Thread(target=tell, name="audit", daemon=True)
    changed.set()  # events that an earlier process had not logged yet
    thread.start()
    try:
        yield thread
    finally:
        ending.set()
        changed.set()
        thread.join()
        _tell(trail)


def _tell(trail: AuditTrail) -> None:
    try:
        trail.tell()
    except Exception:
        # A full disk must not end the trail: events not logged now are logged with the next one.
        logging.getLogger(__name__).exception("the audit trail could not be written")


def _iso(seconds: float) -> str:
    whole, part = divmod(int(seconds * 1000), 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{part:03d}Z"
