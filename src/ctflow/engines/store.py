"""The folder where made engine files are kept, each under the key of everything that it depends on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ctflow.atomic import output_error_from_oserror, publish_folder, temporary_folder, write_atomically
from ctflow.errors import EngineMismatch
from ctflow.volume import Size3

_MANIFEST = "manifest.json"
_FORMAT = 1  # of the manifest; another one is a foreign folder


@dataclass(frozen=True)
class EngineKey:
    """Everything that a stored file depends on.

    Attributes:
        kind: What the file is, for example "onnx".
        version: Version of the software that made it.
        rewrite: Version of the network rewrites (`ctflow.networks.swin.REWRITE_VERSION`).
        weights_digest: SHA-256 of the weights.
        network: Class of the network.
        arguments: Its arguments.
        head: Whether a two-class head is folded, as the model's activation decides.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch that the file takes.
        precision: Number format inside.
        device: The device it is for; "any" if it does not depend on one.
    """

    kind: str
    version: str
    rewrite: int
    weights_digest: str
    network: str
    arguments: Mapping[str, Any]
    head: str
    roi: Size3
    batch_range: tuple[int, int]
    precision: str
    device: str

    @property
    def fields(self) -> dict[str, Any]:
        """The key as JSON would give it back."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self), sort_keys=True, default=str))
        return fields

    @property
    def name(self) -> str:
        """Name of its folder: the kind and half of a SHA-256 over the fields."""
        text = json.dumps(self.fields, sort_keys=True, ensure_ascii=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class EngineStore:
    """Made engine files, one folder each: the file and a manifest that says what it belongs to.

    Args:
        folder: Need not exist until something is put.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path_of(self, key: EngineKey) -> Path:
        """Where the file of a key lies, or would lie."""
        return self.folder / key.name / f"engine.{key.kind}"

    def find(self, key: EngineKey) -> Path | None:
        """The file of a key, checked byte for byte against its manifest.

        Args:
            key: What is wanted.

        Returns:
            The file, or None if it has not been made.

        Raises:
            EngineMismatch: The folder is damaged or belongs to something else; names what differs.
        """
        path = self.path_of(key)
        try:
            path.parent.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # for example another user's folder
            raise output_error_from_oserror(error, "the folder of engines") from error
        manifest = _read_manifest(path.parent)
        stored, wanted = manifest.get("key"), key.fields
        if manifest.get("format") != _FORMAT or not isinstance(stored, dict):
            raise _mismatch(path.parent, f"{_MANIFEST} is of another kind")
        differing = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
        if differing:
            raise _mismatch(path.parent, f"it was made for another {', '.join(name[:40] for name in differing)}")
        if _digest_of_file(path) != manifest.get("sha256"):
            raise _mismatch(path.parent, f"{path.name} is not the file that was stored")
        return path

    def put(self, key: EngineKey, make: Callable[[Path], None]) -> Path:
        """Make the file of a key, once: of several processes that ask at the same time one makes, the others wait.

        Args:
            key: What is wanted.
            make: Writes the file at the path it is given.

        Returns:
            The file.

        Raises:
            EngineMismatch: A folder of this name is there and is damaged or belongs to something else.
            OutputError: It cannot be written.
        """
        path = self.path_of(key)
        with self._locked(key):
            found = self.find(key)
            if found is not None:
                return found
            # Only the holder of the lock makes this key: what is there is a killed maker's.
            for left_over in self.folder.glob(f".{key.name[:40]}.*"):
                shutil.rmtree(left_over, ignore_errors=True)
            with temporary_folder(self.folder, key.name) as folder:
                make(folder / path.name)
                manifest = {"format": _FORMAT, "key": key.fields, "sha256": _digest_of_file(folder / path.name)}
                text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
                write_atomically(folder / _MANIFEST, lambda stream: stream.write(text.encode()))
                publish_folder(folder, path.parent)
        return path

    @contextmanager
    def _locked(self, key: EngineKey) -> Iterator[None]:
        """Hold the key's lock; the system frees it when the process ends, however it ends."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            stream = (self.folder / f"{key.name}.lock").open("a")
        except OSError as error:
            raise output_error_from_oserror(error, "the folder of engines") from error
        with stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX)
            except OSError as error:  # a network drive without locks
                raise output_error_from_oserror(error, "the folder of engines") from error
            yield


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _mismatch(folder, f"{_MANIFEST} cannot be read ({type(error).__name__})") from error
    if not isinstance(manifest, dict):
        raise _mismatch(folder, f"{_MANIFEST} is of another kind")
    return manifest


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
    except OSError as error:
        raise _mismatch(path.parent, f"{path.name} cannot be read ({type(error).__name__})") from error
    return digest.hexdigest()


def _mismatch(folder: Path, what: str) -> EngineMismatch:
    return EngineMismatch(f"stored engine {folder.name}: {what}; remove that folder and run `ctflow export`")
