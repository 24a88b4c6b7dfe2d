"""A copy of a node's data folder that is consistent with its journal, made while the node runs."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ctflow import __version__
from ctflow.core.atomic import output_error_from_oserror, sync_folder
from ctflow.core.errors import NotWritten, SettingsInvalid, StorageFull
from ctflow.node.journal.journal import JOURNAL_FILE
from ctflow.node.keeping.locks import nothing_removed
from ctflow.node.keeping.pruning import opened_reader
from ctflow.node.log import POSITION_FILE
from ctflow.node.work.pool import Places

BACKUP_FILE = "backup.json"  # what a backup holds
_NO_LINK = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EACCES)


@dataclass
class _Count:
    """What a backup has so far."""

    copy: bool
    instances: int = 0
    results: int = 0
    linked: int = 0
    bytes: int = 0
    missing: int = 0
    folders: set[Path] = field(default_factory=set)


def back_up(data: Path, target: Path, *, copy: bool = False) -> dict[str, Any]:
    """Copy the journal, and link or copy every file that it names.

    The backup has its name only when it is whole and on the disk. It is a data folder: a node starts from it.

    Args:
        data: The data folder; a node may use it.
        target: The backup; must not exist.
        copy: Copy every file, also on the same disk, where hard links take no space but share the data.

    Returns:
        Numbers of what it has; `missing` counts files that the journal names but that are not there.

    Raises:
        SettingsInvalid: There is no journal, or the target exists or lies in the data folder.
        OutputError: The backup cannot be written; nothing of it remains.
    """
    opened_reader(data).close()  # there is a journal, of this version
    if os.path.lexists(target):
        raise SettingsInvalid("the folder of the backup exists: name another one", reason="backup-place")
    if target.resolve().is_relative_to(data.resolve()):
        raise SettingsInvalid("the backup lies in the data folder: name a folder elsewhere", reason="backup-place")
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name[:40]}.", dir=target.parent))
        with nothing_removed(data):
            count = _fill(data, temporary, copy=copy)
        document = _document(count)
        (temporary / BACKUP_FILE).write_text(json.dumps(document, indent=2), encoding="utf-8")
        _sync(temporary, count)
        temporary.chmod(0o750)
        temporary.rename(target)
        temporary = None
        sync_folder(target.parent)
    except sqlite3.Error as error:
        if "full" in str(error):
            raise StorageFull("no space left for the backup: free some space and run again") from error
        raise NotWritten(f"the journal cannot be copied ({error})", reason="unwritable") from error
    except OSError as error:
        raise output_error_from_oserror(error, "the backup", "check its folder") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
    return document


def _document(count: _Count) -> dict[str, Any]:
    return {
        "ctflow": __version__,
        "made_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "instances": count.instances,
        "results": count.results,
        "bytes": count.bytes,
        "hard_links": count.linked,
        "missing": count.missing,
    }


def _fill(data: Path, backup: Path, *, copy: bool) -> _Count:
    """Copy the journal as it is now, then all that it names."""
    _copy_journal(data / JOURNAL_FILE, backup / JOURNAL_FILE)
    with contextlib.suppress(FileNotFoundError):
        shutil.copyfile(data / POSITION_FILE, backup / POSITION_FILE)
    places, count = Places.below(data), _Count(copy)
    for file in _files_in(backup / JOURNAL_FILE):
        count.instances += _take(places.inbox / file, backup / "inbox" / file, count)
    for folder in _folders_in(backup / JOURNAL_FILE):
        source = places.results / folder
        if not source.is_dir():
            count.missing += 1
            continue
        count.results += 1
        for path in sorted(source.rglob("*")):
            if path.is_file() and not path.is_symlink():
                _take(path, backup / "results" / folder / path.relative_to(source), count)
    return count


def _copy_journal(source: Path, target: Path) -> None:
    """Copy the journal at one moment; its writer does not wait for that."""
    with contextlib.closing(sqlite3.connect(source, timeout=30)) as theirs:
        theirs.execute("PRAGMA query_only = ON")
        with contextlib.closing(sqlite3.connect(target)) as ours:
            theirs.backup(ours)
            ours.execute("PRAGMA journal_mode = DELETE")  # one file; a node that starts from it changes that
            found = ours.execute("PRAGMA quick_check").fetchone()[0]
    if found != "ok":
        raise NotWritten("the copy of the journal is damaged: check the disk", reason="unwritable")


def _query(journal: Path, question: str) -> Iterator[str]:
    uri = f"{journal.absolute().as_uri()}?immutable=1"
    with contextlib.closing(sqlite3.connect(uri, uri=True)) as connection:
        yield from (str(row[0]) for row in connection.execute(question))


def _files_in(journal: Path) -> Iterator[str]:
    return _query(journal, "SELECT file FROM instances UNION SELECT file FROM left_out")


def _folders_in(journal: Path) -> Iterator[str]:
    return _query(journal, "SELECT folder FROM results WHERE id NOT IN (SELECT result_id FROM pruned_results)")


def _take(source: Path, target: Path, count: _Count) -> int:
    """Link a file, which never changes once it has its name, or copy it; return 1, or 0 if it is missing."""
    if target.parent not in count.folders:
        target.parent.mkdir(parents=True, exist_ok=True)
        count.folders.add(target.parent)
    try:
        size = source.stat().st_size
    except FileNotFoundError:
        count.missing += 1
        return 0
    count.bytes += size
    if not count.copy:
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in _NO_LINK:
                raise
        else:
            count.linked += 1
            return 1
    with source.open("rb") as reading, target.open("xb") as writing:
        shutil.copyfileobj(reading, writing, 2**20)
        writing.flush()
        os.fsync(writing.fileno())
    return 1


def _sync(backup: Path, count: _Count) -> None:
    for file in backup.iterdir():
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
    folders = {above for folder in count.folders for above in (folder, *folder.parents) if backup in above.parents}
    for folder in sorted(folders, key=lambda each: -len(each.parts)):
        sync_folder(folder)
    sync_folder(backup)
