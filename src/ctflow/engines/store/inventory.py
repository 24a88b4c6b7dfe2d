"""The contents of an engine folder, whole or not, for display; nothing here changes or rejects anything."""

from __future__ import annotations

import fcntl
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ctflow.engines.store.manifest import (
    MANIFEST,
    Difference,
    EngineKey,
    EntryState,
    Fault,
    check_digest,
    differences,
    is_file,
    is_folder,
    key_from_fields,
    open_plain,
    read_manifest,
    text_of_differences,
)

_NAME = re.compile(r"[a-z0-9_]+-[0-9a-f]{32}")
_TEMPORARY_NAME = re.compile(r"\.([a-z0-9_]+-[0-9a-f]+)\.[^.]+(\.old)?")  # as `temporary_folder` makes them


@dataclass(frozen=True)
class StoredEngine:
    """A store's entry under one name, whole or not.

    Attributes:
        name: Name of the folder.
        state: "ready" can be found by its key; "damaged" lacks something or is not what was stored; "foreign" was not
            stored here under this name; "unreadable" is another user's; "being made" is a running maker's; "left over"
            is a killed maker's, which the next making of the same key removes.
        reason: What is wrong; None where it is ready or being made.
        key: Its key, if known.
        size: Bytes of its files.
        made: When its manifest was written, in seconds since 1970; None without one.
    """

    name: str
    state: EntryState
    reason: str | None
    key: EngineKey | None
    size: int
    made: float | None


@dataclass(frozen=True)
class Nearest:
    """The stored engine closest to an absent one.

    Attributes:
        engine: The stored engine.
        differing: The differences of its key, at least one.
    """

    engine: StoredEngine
    differing: tuple[Difference, ...]

    @property
    def text(self) -> str:
        """For a message: "a stored one differs in device (made for driver 550.54, this machine has driver 580.159)"."""
        return f"a stored one differs in {text_of_differences(self.differing)}"


def stored_engines(store: Path, *, check: bool = True) -> tuple[StoredEngine, ...]:
    """Everything that is stored or being made, sorted by name; never raises.

    Folders and files that are not engines, such as records of measurements, are left out.

    Args:
        store: The folder.
        check: Read each file and compare it with its digest, so that "ready" is what the store would accept.

    Returns:
        One entry per folder; none if the store cannot be read (see `problem_with`).
    """
    try:
        names = sorted(path.name for path in store.iterdir())
    except OSError:
        return ()
    found = []
    for name in names:
        temporary = _TEMPORARY_NAME.fullmatch(name)
        if temporary and is_folder(store / name):
            locks = [other for other in names if other.startswith(temporary[1]) and other.endswith(".lock")]
            found.append(_temporary_entry(store / name, [store / lock for lock in locks]))
        elif _NAME.fullmatch(name) or is_file(store / name / MANIFEST):
            found.append(_entry(store / name, check=check))
    return tuple(found)


def problem_with(store: Path) -> str | None:
    """Why the store's folder cannot be listed; None where it can, or where nothing has been stored yet."""
    try:
        next(store.iterdir(), None)
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be read ({error.strerror or type(error).__name__})"
    return None


def nearest_engine(store: Path, key: EngineKey) -> Nearest | None:
    """The engine stored for the same kind and weights instead of an absent key, to explain why that one is absent.

    Does not read the files, so it takes milliseconds; never raises.

    Args:
        store: The folder.
        key: The key that was not found.

    Returns:
        The entry with the fewest differing fields, the latest of several; None if there is none.
    """
    wanted, found = key.fields, []
    for entry in stored_engines(store, check=False):
        if entry.state != "ready" or entry.key is None:
            continue
        same = (entry.key.kind, entry.key.weights_digest) == (key.kind, key.weights_digest)
        differing = differences(entry.key.fields, wanted)
        if same and differing:
            found.append(Nearest(entry, differing))
    return min(found, key=lambda near: (len(near.differing), -(near.engine.made or 0.0)), default=None)


def _entry(folder: Path, *, check: bool) -> StoredEngine:
    """The entry under a name; `Fault` becomes its state."""
    key: EngineKey | None = None
    state: EntryState = "ready"
    reason: str | None = None
    try:
        manifest = read_manifest(folder)
        key = key_from_fields(manifest["key"])
        _check_place(folder, key)
        if check:
            check_digest(folder / f"engine.{key.kind}", manifest)
    except Fault as fault:
        state, reason = fault.state, str(fault)
    return StoredEngine(folder.name, state, reason, key, _size(folder), _made(folder / MANIFEST))


def _check_place(folder: Path, key: EngineKey) -> None:
    if key.name != folder.name:
        raise Fault("foreign", f"it belongs under the name {key.name}")
    if not is_file(folder / f"engine.{key.kind}"):
        raise Fault("damaged", f"engine.{key.kind} is missing")


def _temporary_entry(folder: Path, locks: list[Path]) -> StoredEngine:
    """A folder without its final name: a running maker holds the lock."""
    if any(_is_held(lock) for lock in locks):
        return StoredEngine(folder.name, "being made", None, None, _size(folder), None)
    reason = "the process that built it was killed; the next build of this engine removes it"
    return StoredEngine(folder.name, "left over", reason, None, _size(folder), None)


def _is_held(lock: Path) -> bool:
    try:
        with open_plain(lock) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # BlockingIOError; where the state is unknown, no message suggests removal
        return True
    return False


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they can be read; a file in its place counts its own."""
    try:
        if not is_folder(folder):
            return folder.lstat().st_size
        with os.scandir(folder) as found:
            return sum(entry.stat(follow_symlinks=False).st_size for entry in found if not entry.is_dir())
    except OSError:
        return 0


def _made(path: Path) -> float | None:
    try:
        return path.lstat().st_mtime
    except OSError:
        return None
