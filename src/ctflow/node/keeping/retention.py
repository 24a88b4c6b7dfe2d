"""Removes files of finished series by the site's settings: by age, by what is delivered, by free disk space."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ctflow.node.journal.journal import Journal
from ctflow.node.journal.reading import JournalReader
from ctflow.node.journal.retention import (
    Finished,
    LeftOut,
    What,
    finished_series,
    folders_to_remove,
    forget_events,
    forget_series,
    forgettable_series,
    last_old_event,
    left_out_series,
    note_gone,
    old_events,
    prune_instances,
    prune_left_out,
    prune_results,
)
from ctflow.node.keeping.locks import may_remove
from ctflow.node.log import POSITION_FILE, position_in
from ctflow.node.settings.retention import Retention
from ctflow.node.work.pool import Places
from ctflow.settings.schema import size_text

_DAY_S = 86_400.0
_MOST_SHRINKS = 50

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Removal:
    """One thing that retention removes.

    Attributes:
        what: The instances of a series, its results, or objects that were kept and not run.
        of: Whose.
        count: Instances, results or objects.
        bytes: What that frees; less if a backup has hard links to the files.
        age_days: Days since the series was finished.
        why: The setting that says so, for the audit trail.
    """

    what: What
    of: Finished | LeftOut
    count: int
    bytes: int
    age_days: float
    why: str

    @property
    def document(self) -> dict[str, Any]:
        """For `ctflow node prune --json`; without UIDs."""
        return {
            "series": self.of.digest,
            "key": self.of.key if isinstance(self.of, Finished) else None,
            "state": self.of.state if isinstance(self.of, Finished) else "left-out",
            "what": self.what,
            "count": self.count,
            "bytes": self.bytes,
            "age_days": round(self.age_days, 2),
            "why": self.why,
        }


def plan_removals(
    reader: JournalReader, data: Path, retention: Retention, now: float, free: Callable[[], int] | None = None
) -> tuple[Removal, ...]:
    """What the settings remove now, in order.

    Args:
        reader: The journal.
        data: The data folder.
        retention: The settings.
        now: Unix time.
        free: Bytes free on the disk; as the system says if None.
    """
    if not retention.removes:
        return ()
    finished = reader.look(partial(finished_series, only_delivered=retention.only_delivered))
    left_out = reader.look(left_out_series)
    results = Places.below(data).results
    removals = list(_by_age(finished, left_out, retention, now, results))
    if retention.free_disk is not None:
        here = free() if free is not None else shutil.disk_usage(data).free
        missing = retention.free_disk - here - sum(each.bytes for each in removals)
        removals += _by_space(finished, left_out, removals, missing, retention.free_disk, now, results)
    return tuple(removals)


def _by_age(
    finished: Sequence[Finished], left_out: Sequence[LeftOut], retention: Retention, now: float, results: Path
) -> Iterator[Removal]:
    limits = (("instances", retention.instances_days), ("results", retention.results_days))
    least = min((days for _, days in limits if days is not None), default=None)
    for series in finished:
        if least is None or now - series.at <= least * _DAY_S:
            continue  # nothing of it is measured: there may be a hundred thousand folders
        for removal in _parts(series, now, results):
            days = dict(limits)[removal.what]
            if days is not None and removal.age_days > days:
                yield _named(removal, f"older than {days:g} days (retention.{removal.what}_days)")
    for objects in left_out:
        days = retention.instances_days
        if days is not None and now - objects.at > days * _DAY_S:
            yield _of_objects(objects, now, f"older than {days:g} days (retention.instances_days)")


def _by_space(
    finished: Sequence[Finished],
    left_out: Sequence[LeftOut],
    planned: Sequence[Removal],
    missing: float,
    wanted: int,
    now: float,
    results: Path,
) -> Iterator[Removal]:
    """More removals until so many bytes are free: delivered series first, the oldest of them first."""
    done = {(each.what, each.of) for each in planned}
    why = f"less than {size_text(wanted)} free (retention.free_disk)"
    order = sorted(finished, key=lambda series: (series.state != "delivered", series.at))
    parts = (part for series in order for part in _parts(series, now, results))  # measured only as far as needed
    for removal in chain(parts, (_of_objects(each, now, why) for each in left_out)):
        if missing <= 0:
            return
        if (removal.what, removal.of) not in done and removal.bytes:
            missing -= removal.bytes
            yield _named(removal, why)


def _parts(series: Finished, now: float, results: Path) -> Iterator[Removal]:
    age_days = (now - series.at) / _DAY_S
    if series.instances:
        yield Removal("instances", series, series.instances, series.bytes, age_days, "")
    if series.results:
        size = sum(_bytes_below(results / folder) for _, folder in series.results)
        yield Removal("results", series, len(series.results), size, age_days, "")


def _of_objects(objects: LeftOut, now: float, why: str) -> Removal:
    return Removal("left-out", objects, objects.objects, objects.bytes, (now - objects.at) / _DAY_S, why)


def _named(removal: Removal, why: str) -> Removal:
    return Removal(removal.what, removal.of, removal.count, removal.bytes, removal.age_days, why)


def _bytes_below(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it has gone meanwhile
            size += path.lstat().st_size
    return size


def carry_out(
    journal: Journal,
    data: Path,
    retention: Retention,
    now: float,
    free: Callable[[], int] | None = None,
    is_ending: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Remove what the settings say; return what was removed (`document_of`).

    A removal is in the journal before the first of its files goes. While a backup is made nothing is removed.

    Raises:
        OutputError: The journal cannot be written; the files of what it has not recorded are all there.
    """
    done: list[Removal] = []
    postponed = False
    for removal in plan_removals(journal, data, retention, now, free):
        if is_ending():  # a node that stops has some seconds; the next start goes on
            break
        with may_remove(data) as allowed:
            postponed = not allowed
            if postponed:
                log.info("nothing is removed while a backup is made")
                break
            if _remove(journal, data, removal):
                done.append(removal)
    events = 0 if postponed or is_ending() else _forget(journal, data, retention, now)
    if done or events:
        _shrink(journal)
    return document_of(done, events, dry_run=False) | {"postponed": postponed}


def _remove(journal: Journal, data: Path, removal: Removal) -> bool:
    """Remove one thing; False if its series is no longer finished."""
    places, of = Places.below(data), removal.of
    if isinstance(of, LeftOut):
        files = journal.change(lambda db, now: prune_left_out(db, now, of, removal.why))
    elif removal.what == "instances":
        files = journal.change(lambda db, now: prune_instances(db, now, of.key, removal.why))
    else:
        folders = journal.change(lambda db, now: prune_results(db, now, of.key, removal.why))
        remove_results(journal, places.results, folders)
        return bool(folders)
    for file in files:
        _unlink(places.inbox / file)
    for folder in {(places.inbox / file).parent for file in files}:
        with contextlib.suppress(OSError):  # it has other files
            folder.rmdir()
    return bool(files)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:  # the next start removes it: the journal no longer has it
        log.error("a file cannot be removed (%s)", error.strerror)  # noqa: TRY400  # named


def remove_results(journal: Journal, results: Path, folders: Sequence[str] | None = None) -> int:
    """Remove folders of results that the journal knows as removed, and record that; return how many.

    Args:
        journal: The journal.
        results: Folder of all results.
        folders: Which; all that may still be there if None.
    """
    wanted = journal.look(folders_to_remove) if folders is None else folders
    gone = []
    for folder in wanted:
        path = results / folder
        try:
            if path.exists():
                shutil.rmtree(path)
            gone.append(folder)
        except OSError as error:
            log.error("a result cannot be removed (%s)", error.strerror)  # noqa: TRY400  # named
        for parent in path.parents:
            if parent == results or results not in parent.parents:
                break
            with contextlib.suppress(OSError):  # it has other results
                parent.rmdir()
    if gone:
        journal.change(lambda db, _now: note_gone(db, gone))
    return len(gone)


def _forget(journal: Journal, data: Path, retention: Retention, now: float) -> int:
    """Forget old events that the log has, then series of which nothing is left; return the number of events."""
    if retention.events_days is None:
        return 0
    before, told = now - retention.events_days * _DAY_S, position_in(data / POSITION_FILE)
    last = journal.look(lambda db: last_old_event(db, before, told))
    forgotten = 0
    while last and (count := journal.change(lambda db, _now: forget_events(db, before, last))):
        forgotten += count
    while keys := journal.look(lambda db: forgettable_series(db, before)):
        if not _forget_series(journal, before, keys):
            break
    return forgotten


def _forget_series(journal: Journal, before: float, keys: Sequence[str]) -> int:
    return journal.change(lambda db, _now: forget_series(db, before, keys))


def _shrink(journal: Journal) -> None:
    for _ in range(_MOST_SHRINKS):
        if not journal.look(lambda db: db.execute("PRAGMA freelist_count").fetchone()[0]):
            return
        journal.shrink()


def forgettable_events(reader: JournalReader, data: Path, retention: Retention, now: float) -> int:
    """How many events would be forgotten."""
    if retention.events_days is None:
        return 0
    before, told = now - retention.events_days * _DAY_S, position_in(data / POSITION_FILE)
    return reader.look(lambda db: old_events(db, before, told))


def document_of(removals: Sequence[Removal], events: int, *, dry_run: bool) -> dict[str, Any]:
    """What was, or would be, removed, for `ctflow node prune`."""
    return {
        "dry_run": dry_run,
        "removals": [each.document for each in removals],
        "events": events,
        "bytes": sum(each.bytes for each in removals),
    }
