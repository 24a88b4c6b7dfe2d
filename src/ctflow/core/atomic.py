"""Files and folders that appear whole, or not at all."""

from __future__ import annotations

import errno
import glob
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from ctflow.core.errors import NotWritten, OutputError, StorageFull

SUPERSEDED = ".superseded"  # hidden, so that a search for results does not enter it

_unpublished: set[Path] = set()  # folders of `temporary_folder`: `publish_folder` syncs all of their files


def output_error_from_oserror(error: OSError, what: str, remedy: str = "check path and permissions") -> OutputError:
    """The named error for a failed write.

    Args:
        error: The system's error.
        what: Name of the file or folder, without its path (a path may hold a name).
        remedy: What to do, unless the disk is full.
    """
    while error.errno is None and isinstance(error.__context__, OSError):
        error = error.__context__  # pydicom raises its own, without a number
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFull(f"no space left for {what}: free some space and run again")
    return NotWritten(
        f"{what} cannot be written ({error.strerror or type(error).__name__}): {remedy}", reason="unwritable"
    )


def make_output_folder(folder: Path, what: str = "the output folder", *, option: str = "") -> None:
    """Make a folder for results before work that may take hours; its name and its parents' are then on the disk.

    Args:
        folder: The folder.
        what: Its name in messages.
        option: The flag or key that names it, for messages.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        made = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for each in made:
            sync_folder(each.parent)
    except OSError as error:
        if isinstance(error, FileExistsError) and folder.is_file():
            text = f"{what} is a file and not a folder: give a folder{option and f' with {option}'}"
            raise NotWritten(text, reason="unwritable") from error
        remedy = f"check {option or 'path'} and permissions"
        raise output_error_from_oserror(error, what, remedy) from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under a temporary name, sync it, and give it its name.

    A file of a `temporary_folder` is synced when that is published.

    Args:
        path: The file; its folder exists. An older file is replaced.
        write: Gets the open temporary file.

    Raises:
        StorageFull: The disk or quota is full.
        NotWritten: Any other failure of the file system. No half-written file remains.
    """
    temporary: Path | None = None
    is_synced_later = path.parent in _unpublished
    try:
        # A random name: two writers of one file must not share a temporary file.
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fchmod(stream.fileno(), 0o644)
            if not is_synced_later:
                os.fsync(stream.fileno())
        temporary.replace(path)
        if not is_synced_later:
            sync_folder(path.parent)
    except OSError as error:
        raise output_error_from_oserror(error, path.name) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def temporary_folder(parent: Path, key: str) -> Iterator[Path]:
    """A hidden folder to build a result in; removed at the end unless it was published.

    Args:
        parent: Made if absent, and removed again if nothing was published into it.
        key: Part of the name.

    Yields:
        The folder.

    Raises:
        OutputError: It cannot be made.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    try:
        parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=_prefix(key, os.getpid()), dir=parent))
        folder.chmod(0o755)  # mkdtemp's 0700 would hide the result from the viewer's user
    except OSError as error:
        _remove_empty(made)
        raise output_error_from_oserror(error, f"the folder of {key}") from error
    _unpublished.add(folder)
    try:
        yield folder
    finally:
        _unpublished.discard(folder)
        shutil.rmtree(folder, ignore_errors=True)
        _remove_empty(made)


def remove_temporary_folder(parent: Path, key: str, process: int) -> None:
    """Remove what a process that was killed has left of `temporary_folder`; an older result returns to its place."""
    for folder in parent.glob(f"{glob.escape(_prefix(key, process))}*"):
        if folder.suffix == ".old" and not os.path.lexists(parent / key):
            with suppress(OSError):
                folder.rename(parent / key)
        shutil.rmtree(folder, ignore_errors=True)


def _prefix(key: str, process: int) -> str:
    return f".{key[:40]}.{process}-"


def publish_folder(folder: Path, final: Path) -> None:
    """Give a finished folder its final name.

    Args:
        folder: Built next to `final` by `temporary_folder`.
        final: Its name; an older result is moved aside first and then removed, so that a crash leaves the old result,
            none, or the new one, and never a mixture.

    Raises:
        OutputError: The folder cannot be renamed; the older result is then back in its place, if none has taken it.
    """
    aside = folder.with_name(f"{folder.name}.old")
    try:
        for path in folder.iterdir():
            if path.is_dir():  # published into this one, so its files are synced
                sync_folder(path)
            else:
                _sync_file(path)
        sync_folder(folder)
        if final.exists():
            final.rename(aside)
        try:
            folder.rename(final)
        except OSError:
            if os.path.lexists(final):  # another process was faster, and its result is complete
                shutil.rmtree(aside, ignore_errors=True)
            elif aside.exists():
                aside.rename(final)
            raise
        sync_folder(final.parent)
    except OSError as error:
        raise output_error_from_oserror(error, f"the folder {final.name}") from error
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)  # a file had the folder's name


def supersede_folder(folder: Path) -> Path | None:
    """Move an outdated result to `.superseded/<name>-<n>` next to it, without losing any of it.

    One rename, synced: after a crash the result is in one of the two places, and whole.

    Args:
        folder: The result's folder, or a file of that name.

    Returns:
        Its new path, n being the first free number; None if there was no result.

    Raises:
        OutputError: It cannot be moved, and stays in place.
    """
    aside = folder.parent / SUPERSEDED
    try:
        if not os.path.lexists(folder):
            return None
        aside.mkdir(exist_ok=True)
        target = _moved(folder, aside)
        if target is not None:
            sync_folder(aside)
            sync_folder(folder.parent)
    except OSError as error:
        raise output_error_from_oserror(error, f"{SUPERSEDED}, where an earlier result should go,") from error
    return target


def _moved(folder: Path, aside: Path) -> Path | None:
    """Rename a folder to the first free name; None if another run was faster."""
    for number in itertools.count(1):
        target = aside / f"{folder.name}-{number}"
        if os.path.lexists(target):
            continue
        try:
            return folder.rename(target)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
                raise  # else another run took the name since the check
    raise AssertionError("numbers do not end")


def _sync_file(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that this run made and left empty, the deepest first."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # not empty: something was published
