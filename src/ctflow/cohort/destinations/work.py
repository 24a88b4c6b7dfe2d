"""Folders in which the results of rows are built."""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from contextlib import ExitStack
from pathlib import Path

from ctflow.core.atomic import output_error_from_oserror
from ctflow.core.errors import NotWritten, SettingsInvalid


class WorkFolder:
    """A folder of this process below one that all processes share; a context manager that removes it.

    A lock, which the system releases when its process ends, tells the work of a running process from what a killed one
    has left. Each run has a folder of its own: a process that outlives a killed run by a moment writes nothing into the
    next one's.

    Args:
        parent: The folder that they share; it exists once this is entered.
        share: Name of what this process computes.
    """

    def __init__(self, parent: Path, share: str) -> None:
        self._parent, self._share = parent, share
        self._own = parent / share
        self._run = self._own
        self._stack = ExitStack()

    def __enter__(self) -> WorkFolder:
        with ExitStack() as failing:
            try:
                handle = _locked(self._own)
                if handle is None:
                    raise SettingsInvalid(
                        f"-o: another process computes {self._share} there: wait for it, or give another --part",
                        reason="folder-in-use",
                    )
                failing.callback(os.close, handle)
                self._remove_left_over()
                shutil.rmtree(self._own, ignore_errors=True)
                self._own.mkdir(exist_ok=True)
                self._run = Path(tempfile.mkdtemp(dir=self._own))
            except OSError as error:
                raise output_error_from_oserror(error, "the folder for work") from error
            failing.callback(shutil.rmtree, self._own, ignore_errors=True)
            self._stack = failing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def path(self) -> Path:
        """This run's folder."""
        return self._run

    def workspace(self, row_id: str) -> Path:
        """As `RowDestination.workspace`."""
        folder = self._run / f"{row_id}~"  # no id ends so: what it is renamed to while it is replaced is none's, either
        self.discard(folder)
        try:
            folder.mkdir()
        except OSError as error:
            raise output_error_from_oserror(error, f"the folder of row {row_id}") from error
        return folder

    def discard(self, folder: Path) -> None:
        """As `RowDestination.discard`."""
        shutil.rmtree(folder, ignore_errors=True)

    def _remove_left_over(self) -> None:
        """Remove the work of other shares whose processes have ended: the next run may divide the rows otherwise."""
        for folder in [each for each in self._parent.iterdir() if each.is_dir() and each != self._own]:
            handle = _locked(folder)
            if handle is not None:
                try:
                    shutil.rmtree(folder, ignore_errors=True)
                finally:
                    os.close(handle)


def folder_of_machine(name: str) -> Path:
    """A folder on this machine's own disk (TMPDIR), which only this user can enter.

    Raises:
        OutputError: It cannot be made, or somebody else made it.
    """
    parent = Path(tempfile.gettempdir()) / f"ctflow-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        facts = parent.lstat()
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
            raise NotWritten(
                f"{parent.name} in the folder for temporary files belongs to somebody else: set TMPDIR",
                reason="unwritable",
            )
        folder = parent / name
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise output_error_from_oserror(error, "the folder for temporary files", "set TMPDIR") from error
    return folder


def _locked(folder: Path) -> int | None:
    """A lock on a folder for work, until its handle is closed; None if another process has it."""
    handle = os.open(folder.with_name(f"{folder.name}.lock"), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    except OSError:
        os.close(handle)
        raise
    return handle
