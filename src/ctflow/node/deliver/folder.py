"""Copies of results in a folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ctflow.core.atomic import publish_folder, temporary_folder
from ctflow.core.errors import DestinationDown, OutputError, PeerRefused
from ctflow.node.deliver.send import Channel


@dataclass(frozen=True)
class FolderTarget:
    """Copies into a folder: each result whole, in its own folder."""

    folder: Path

    @contextmanager
    def open(self) -> Iterator[Channel]:
        """The folder; `DestinationDown` if it does not exist (an unmounted disk must not fill the one below)."""
        if not self.folder.is_dir():
            raise DestinationDown("the folder for copies does not exist: create or mount it", reason="folder-unmounted")
        yield _Folder(self.folder)


@dataclass(frozen=True)
class _Folder:
    target: Path

    def send(self, folder: Path, file: str) -> str:
        name = f"{folder.parent.name}-{folder.name}"
        try:
            with temporary_folder(self.target, name) as temporary:
                shutil.copytree(folder / file, temporary, dirs_exist_ok=True)
                publish_folder(temporary, self.target / name)
        except (OutputError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise PeerRefused(f"the copy cannot be written ({reason})", reason="copy-failed") from error
        return ""
