"""The folder of stored engine files, each under the key of everything that it depends on."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TextIO

from ctflow.core.atomic import output_error_from_oserror, publish_folder, temporary_folder, write_atomically
from ctflow.core.errors import EngineMismatch, ExportFailed, OutputError
from ctflow.engines.store.inventory import Nearest, StoredEngine, nearest_engine, problem_with, stored_engines
from ctflow.engines.store.manifest import (
    FORMAT,
    MANIFEST,
    EngineKey,
    Fault,
    check_digest,
    check_key,
    digest_of_file,
    is_file,
    read_manifest,
)

__all__ = ["INSTALLED", "EngineKey", "EngineStore"]

# What was made for this installation and belongs to it, as in a container image; need not exist, may be read-only.
INSTALLED = Path(str(files("ctflow"))) / "made"

_REMEDY = "check --cache or CTFLOW_CACHE (-o of `ctflow export`)"


class EngineStore:
    """Stored engine files, one folder each: the file and a manifest that says what it belongs to.

    Args:
        folder: Need not exist until something is stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, key: EngineKey) -> Path:
        """Path of a key's file, whether or not it exists."""
        return self.folder / key.name / f"engine.{key.kind}"

    def find(self, key: EngineKey) -> Path | None:
        """The file of a key, checked byte for byte against its manifest: the file is read once for each opening.

        Args:
            key: The wanted key.

        Returns:
            The file, in this folder or in the one that came with the installation; None if it has not been made.

        Raises:
            EngineMismatch: The folder is damaged or belongs to something else; names the differences.
        """
        own, installed = self.path_of(key), EngineStore(INSTALLED).path_of(key)
        try:
            return self._checked(own, key) or self._checked(installed, key)
        except (EngineMismatch, OutputError):  # a damaged cache does not hide what the installation brings
            found = None if own == installed else self._checked(installed, key)
            if found is None:
                raise
            return found

    @staticmethod
    def _checked(path: Path, key: EngineKey) -> Path | None:
        try:
            path.parent.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # for example another user's folder
            raise output_error_from_oserror(error, "the folder of engines", _REMEDY) from error
        try:
            manifest = read_manifest(path.parent)
            check_key(manifest["key"], key)
            check_digest(path, manifest)
        except Fault as fault:
            text = f"stored engine {path.parent.name}: {fault}; remove that folder and run `ctflow export`"
            raise EngineMismatch(text, reason="stored-engine") from fault
        return path

    def put(self, key: EngineKey, make: Callable[[Path], None]) -> Path:
        """Make the file of a key once: of several processes that ask at the same time, one makes it, the others wait.

        Args:
            key: The wanted key.
            make: Writes the file at the path it is given.

        Returns:
            The file.

        Raises:
            EngineMismatch: A folder of this name exists and is damaged or belongs to something else.
            ExportFailed: `make` wrote nothing.
            OutputError: It cannot be written.
        """
        path = self.path_of(key)
        with self._locked(key):
            found = self.find(key)
            if found is not None:
                return found
            # Only the holder of the lock makes this key: an existing folder is a killed maker's.
            for left_over in self.folder.glob(f".{key.name[:40]}.*"):
                shutil.rmtree(left_over, ignore_errors=True)
            with temporary_folder(self.folder, key.name) as folder:
                digest = _digest_of_made(make, folder / path.name)
                manifest = {"format": FORMAT, "key": key.fields, "sha256": digest}
                text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
                write_atomically(folder / MANIFEST, lambda stream: stream.write(text.encode()))
                publish_folder(folder, path.parent)
        return path

    def entries(self, *, check: bool = True) -> tuple[StoredEngine, ...]:
        """See `ctflow.engines.store.inventory.stored_engines`."""
        return stored_engines(self.folder, check=check)

    def problem(self) -> str | None:
        """See `ctflow.engines.store.inventory.problem_with`."""
        return problem_with(self.folder)

    def nearest(self, key: EngineKey) -> Nearest | None:
        """See `ctflow.engines.store.inventory.nearest_engine`."""
        return nearest_engine(self.folder, key)

    @contextmanager
    def _locked(self, key: EngineKey) -> Iterator[None]:
        """Hold the key's lock; the system frees it when the process ends, however it ends."""
        try:
            stream = _locked_stream(self.folder / f"{key.name}.lock")
        except OSError as error:  # also a network drive without locks
            raise output_error_from_oserror(error, "the folder of engines", _REMEDY) from error
        with stream:
            yield


def _locked_stream(path: Path) -> TextIO:
    """The open and locked file; a waiter on the lock of a cache that was emptied meanwhile takes the new lock."""
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("a")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        except FileNotFoundError:
            pass
        except BaseException:
            stream.close()
            raise
        stream.close()


def _digest_of_made(make: Callable[[Path], None], path: Path) -> str:
    """Make a file and return its digest."""
    try:
        make(path)
        if is_file(path) and path.stat().st_size:
            return digest_of_file(path)
    except OSError as error:
        if error.errno is None:  # a library that does not load; disk errors have numbers
            raise
        raise output_error_from_oserror(error, path.name) from error
    raise ExportFailed(f"{path.name} was not built: nothing was written", reason="nothing-made")
