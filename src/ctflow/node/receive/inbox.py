"""Files of instances: one each, synced before its sender gets an answer, named by digests and never by the peer."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from ctflow.core.atomic import make_output_folder, output_error_from_oserror, sync_folder
from ctflow.node.keeping.locks import may_remove

_LOOK_AGAIN_S = 0.25  # between checks of the free space: 150 images/s do not need 150 checks
_MOST_KNOWN = 4096  # folders known to be synced; a forgotten one is synced again


class Inbox:
    """The folder of received instances.

    Args:
        folder: Made if absent.
        least_free: Bytes kept free for results and the journal: below this nothing more is accepted.
    """

    def __init__(self, folder: Path, least_free: int) -> None:
        self.folder = folder
        self._least_free = least_free
        self._looked_at = 0.0
        self._free = 0
        self._lock = threading.Lock()
        self._making = threading.Lock()
        self._synced: dict[Path, None] = {}
        make_output_folder(folder, "the inbox")
        try:
            sync_folder(folder.parent)  # a process that ended early may have made it without a sync
        except OSError as error:
            raise output_error_from_oserror(error, "the inbox") from error

    def has_space(self, count: int) -> bool:
        """Whether enough space stays free after so many more bytes."""
        with self._lock:
            now = time.monotonic()
            if now > self._looked_at + _LOOK_AGAIN_S or self._free - count < self._least_free:
                self._free, self._looked_at = shutil.disk_usage(self.folder).free, now
            self._free -= count
            return self._free >= self._least_free

    def write(self, series: str, sop_instance_uid: str, parts: Sequence[bytes | memoryview]) -> str:
        """Write and sync an instance.

        Args:
            series: The series' folder, hexadecimal digits.
            sop_instance_uid: As sent by the peer.
            parts: The file's content, one after another.

        Returns:
            The file below the inbox; no other instance has or gets this name.

        Raises:
            OutputError: It cannot be written; no part of it remains.
        """
        digest = hashlib.sha256(sop_instance_uid.encode("utf-8", "surrogateescape")).hexdigest()
        name = f"{series[:2]}/{series}/{digest[:32]}-{secrets.token_hex(4)}.dcm"
        path = self.folder / name
        try:
            handle = self._make_file(path)
            try:
                for part in parts:
                    _write_all(handle, part)
                os.fsync(handle)
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            finally:
                os.close(handle)
            sync_folder(path.parent)
        except OSError as error:
            raise output_error_from_oserror(error, "an instance") from error
        return name

    def _make_file(self, path: Path) -> int:
        """Make a file and its folder, which retention may remove in between."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        self._make_folder(path.parent)
        try:
            return os.open(path, flags, 0o640)
        except FileNotFoundError:
            with self._making:
                self._synced.pop(path.parent, None)
            self._make_folder(path.parent)
            return os.open(path, flags, 0o640)

    def _make_folder(self, folder: Path) -> None:
        """Make a series' folder whose own name and its parent's are on the disk, no matter who made it when.

        An existing folder is not enough: another association may have just made it and not synced it yet, or a
        process may have ended in between.
        """
        if folder in self._synced and folder.is_dir():
            return
        with self._making:
            if folder in self._synced and folder.is_dir():
                return
            self._synced.pop(folder, None)  # retention has removed it: others wait here until the new one is synced
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
            sync_folder(self.folder)
            self._synced[folder] = None
            if len(self._synced) > _MOST_KNOWN:
                del self._synced[next(iter(self._synced))]

    def remove(self, name: str) -> None:
        """Remove a file that the journal did not accept."""
        (self.folder / name).unlink(missing_ok=True)

    def remove_outdated(self, name: str) -> None:
        """Remove a file that the journal has no more, unless a backup is being made: then the next start does."""
        with may_remove(self.folder.parent) as allowed:
            if allowed:
                self.remove(name)

    def sweep(self, known: Collection[str]) -> int:
        """Remove files that the journal does not know: their receipt was never acknowledged. Return their number."""
        removed = 0
        for path in self.folder.glob("*/*/*.dcm"):
            if path.relative_to(self.folder).as_posix() not in known:
                path.unlink()
                removed += 1
        return removed


def _write_all(handle: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]
