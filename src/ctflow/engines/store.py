"""The folder where made engine files are kept, each under the key of everything that it depends on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO

from ctflow.atomic import output_error_from_oserror, publish_folder, temporary_folder, write_atomically
from ctflow.errors import EngineMismatch, ExportFailed
from ctflow.volume import Size3

State = Literal["ready", "damaged", "foreign", "unreadable", "being made", "left over"]

_MANIFEST = "manifest.json"
_FORMAT = 1  # of the manifest; another one is a foreign folder
_LONGEST_DOCUMENT = 1 << 20  # bytes; ours have about a thousand
_DEEPEST = 50  # brackets within brackets; ours have five
_MOST_SHOWN = 6  # differing fields in a message; a foreign manifest may have any number
_LONGEST_SHOWN = 100  # characters of one value in a message
_NAME = re.compile(r"[a-z0-9_]+-[0-9a-f]{32}")
_TEMPORARY_NAME = re.compile(r"\.([a-z0-9_]+-[0-9a-f]+)\.[^.]+(\.old)?")  # as `temporary_folder` makes them


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


@dataclass(frozen=True)
class StoredEngine:
    """What lies in a store under one name, whole or not.

    Attributes:
        name: Name of the folder.
        state: "ready" can be found by its key; "damaged" lacks something or is not what was stored; "foreign" was not
            stored here under this name; "unreadable" is another user's; "being made" is a running maker's; "left over"
            is a killed maker's, which the next making of the same key removes.
        reason: What is wrong; None where it is ready or being made.
        key: Its key, if that can be told.
        size: Bytes of its files.
        made: When its manifest was written, in seconds since 1970; None without one.
    """

    name: str
    state: State
    reason: str | None
    key: EngineKey | None
    size: int
    made: float | None


@dataclass(frozen=True)
class Difference:
    """One field in which a stored key is not the wanted one; of lists such as the device only what differs.

    Attributes:
        field: Name of the key's field.
        stored: Its stored value as short, printable text, for example "driver 550.54".
        wanted: Its wanted value, for example "driver 580.159.04".
    """

    field: str
    stored: str
    wanted: str

    def __str__(self) -> str:
        made = {"device": "for", "version": "by"}.get(self.field)
        if made:  # what a person changes by taking another machine, and not by asking for something else
            return f"{self.field} (made {made} {self.stored}, this machine has {self.wanted})"
        return f"{self.field.replace('_', ' ')} ({self.stored} is stored, {self.wanted} is wanted)"


@dataclass(frozen=True)
class Nearest:
    """The stored engine that is most like one that is absent.

    Attributes:
        engine: What is stored.
        differing: In what its key differs, at least one.
    """

    engine: StoredEngine
    differing: tuple[Difference, ...]

    @property
    def text(self) -> str:
        """For a message: "a stored one differs in device (made for driver 550.54, this machine has driver 580.159)"."""
        return f"a stored one differs in {_joined(self.differing)}"


class _Fault(Exception):
    """Why a folder is not the engine that its name promises."""

    def __init__(self, state: State, reason: str) -> None:
        super().__init__(reason)
        self.state: State = state


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
        """The file of a key, checked byte for byte against its manifest: the file is read once for each opening.

        Args:
            key: What is wanted.

        Returns:
            The file, or None if it has not been made.

        Raises:
            EngineMismatch: The folder is damaged or belongs to something else; names what differs.
        """
        path = self.path_of(key)
        try:
            path.parent.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:  # for example another user's folder
            raise output_error_from_oserror(error, "the folder of engines") from error
        try:
            manifest = _read_manifest(path.parent)
            _check_key(manifest["key"], key)
            _check_digest(path, manifest)
        except _Fault as fault:
            text = f"stored engine {path.parent.name}: {fault}; remove that folder and run `ctflow export`"
            raise EngineMismatch(text) from fault
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
            ExportFailed: `make` wrote nothing.
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
                digest = _digest_of_made(make, folder / path.name)
                manifest = {"format": _FORMAT, "key": key.fields, "sha256": digest}
                text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
                write_atomically(folder / _MANIFEST, lambda stream: stream.write(text.encode()))
                publish_folder(folder, path.parent)
        return path

    def entries(self, *, check: bool = True) -> tuple[StoredEngine, ...]:
        """Everything that is stored or being made, in the order of names; never raises.

        Folders and files that are no engines, such as records of measurements, are left out.

        Args:
            check: Read each file and compare it with its digest, so that "ready" is what `find` would accept.

        Returns:
            One entry a folder; none if the store cannot be read (see `problem`).
        """
        try:
            names = sorted(path.name for path in self.folder.iterdir())
        except OSError:
            return ()
        found = []
        for name in names:
            temporary = _TEMPORARY_NAME.fullmatch(name)
            if temporary and _is_folder(self.folder / name):
                locks = [other for other in names if other.startswith(temporary[1]) and other.endswith(".lock")]
                found.append(_temporary_entry(self.folder / name, [self.folder / lock for lock in locks]))
            elif _NAME.fullmatch(name) or _is_file(self.folder / name / _MANIFEST):
                found.append(_entry(self.folder / name, check=check))
        return tuple(found)

    def problem(self) -> str | None:
        """Why the store's folder cannot be listed; None where it can, or where nothing has been put yet."""
        try:
            next(self.folder.iterdir(), None)
        except FileNotFoundError:
            return None
        except OSError as error:
            return f"it cannot be read ({error.strerror or type(error).__name__})"
        return None

    def nearest(self, key: EngineKey) -> Nearest | None:
        """What is stored for the same kind and weights instead of an absent key, to tell why that one is absent.

        Files are not read, so that this takes milliseconds; never raises.

        Args:
            key: What was wanted and not found.

        Returns:
            The entry with the fewest differing fields, of several the one made last; None if there is none.
        """
        wanted, found = key.fields, []
        for entry in self.entries(check=False):
            if entry.state != "ready" or entry.key is None:
                continue
            same = (entry.key.kind, entry.key.weights_digest) == (key.kind, key.weights_digest)
            differing = _differences(entry.key.fields, wanted)
            if same and differing:
                found.append(Nearest(entry, differing))
        return min(found, key=lambda near: (len(near.differing), -(near.engine.made or 0.0)), default=None)

    @contextmanager
    def _locked(self, key: EngineKey) -> Iterator[None]:
        """Hold the key's lock; the system frees it when the process ends, however it ends."""
        try:
            stream = _locked_stream(self.folder / f"{key.name}.lock")
        except OSError as error:  # also a network drive without locks
            raise output_error_from_oserror(error, "the folder of engines") from error
        with stream:
            yield


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a small file that anyone may have written.

    Args:
        path: A plain file; links and devices are refused.

    Returns:
        The object.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long or no JSON object.
    """
    with _open_plain(path) as stream:
        data = stream.read(_LONGEST_DOCUMENT + 1)
    if len(data) > _LONGEST_DOCUMENT:
        raise ValueError("too long")
    try:
        document = json.loads(data.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(document, dict) or _is_deep(document):
        raise ValueError("not an object, or nested too deep")
    return document


def _is_deep(document: object) -> bool:
    """Whether brackets lie in brackets so deep that a function which calls itself on them may fail."""
    level = [document]
    for _ in range(_DEEPEST):
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]
    return bool(level)


def _locked_stream(path: Path) -> TextIO:
    """The open and locked file; who waited for the lock of a cache that was emptied meanwhile takes the new one."""
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
    """Make a file; its digest."""
    try:
        make(path)
        if _is_file(path) and path.stat().st_size:
            return _digest_of_file(path)
    except OSError as error:
        if error.errno is None:  # a library that does not load; the disk's errors have numbers
            raise
        raise output_error_from_oserror(error, path.name) from error
    raise ExportFailed(f"{path.name} was not made: its maker wrote nothing")


def _read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest; its "key" is a mapping."""
    try:
        if not _is_folder(folder):
            raise _Fault("foreign", "it is not a folder")
        manifest = read_document(folder / _MANIFEST)
    except PermissionError as error:
        raise _Fault("unreadable", f"{_MANIFEST} cannot be read (PermissionError)") from error
    except (OSError, ValueError) as error:
        raise _Fault("damaged", f"{_MANIFEST} cannot be read ({type(error).__name__})") from error
    if manifest.get("format") != _FORMAT or not isinstance(manifest.get("key"), dict):
        raise _Fault("foreign", f"{_MANIFEST} is of another kind")
    return manifest


def _check_key(stored: Mapping[str, Any], wanted: EngineKey) -> None:
    differing = _differences(stored, wanted.fields)
    if differing:
        raise _Fault("foreign", f"it differs in {_joined(differing)}")


def _check_digest(path: Path, manifest: Mapping[str, Any]) -> None:
    try:
        digest = _digest_of_file(path)
    except OSError as error:
        state: State = "unreadable" if isinstance(error, PermissionError) else "damaged"
        raise _Fault(state, f"{path.name} cannot be read ({type(error).__name__})") from error
    if digest != manifest.get("sha256"):
        raise _Fault("damaged", f"{path.name} is not the file that was stored")


def _digest_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with _open_plain(path) as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _open_plain(path: Path) -> BinaryIO:
    """Open a plain file to read; a link may be changed behind the store's back, and a pipe would never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "not a plain file")


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    """Whether it is a folder and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _entry(folder: Path, *, check: bool) -> StoredEngine:
    """What lies under a name; `_Fault` becomes its state."""
    key: EngineKey | None = None
    state: State = "ready"
    reason: str | None = None
    try:
        manifest = _read_manifest(folder)
        key = _key_from_fields(manifest["key"])
        _check_place(folder, key)
        if check:
            _check_digest(folder / f"engine.{key.kind}", manifest)
    except _Fault as fault:
        state, reason = fault.state, str(fault)
    return StoredEngine(folder.name, state, reason, key, _size(folder), _made(folder / _MANIFEST))


def _check_place(folder: Path, key: EngineKey) -> None:
    if key.name != folder.name:
        raise _Fault("foreign", f"it belongs under the name {key.name}")
    if not _is_file(folder / f"engine.{key.kind}"):
        raise _Fault("damaged", f"engine.{key.kind} is not there")


def _temporary_entry(folder: Path, locks: list[Path]) -> StoredEngine:
    """A folder without its final name: a running maker holds the lock."""
    if any(_is_held(lock) for lock in locks):
        return StoredEngine(folder.name, "being made", None, None, _size(folder), None)
    reason = "its maker was killed; the next making of this engine removes it"
    return StoredEngine(folder.name, "left over", reason, None, _size(folder), None)


def _is_held(lock: Path) -> bool:
    try:
        with _open_plain(lock) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:  # BlockingIOError; where it cannot be told, nobody is told to remove it
        return True
    return False


def _size(folder: Path) -> int:
    """Bytes of the files in a folder, as far as they can be told; a file in its place has its own."""
    try:
        if not _is_folder(folder):
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


def _key_from_fields(fields: Mapping[str, Any]) -> EngineKey:
    """The key that a manifest gives.

    Raises:
        _Fault: A field is missing, unknown or of another type, as another version of ctflow may write it.
    """
    texts = ("kind", "version", "weights_digest", "network", "head", "precision", "device")
    fits = (
        fields.keys() == EngineKey.__dataclass_fields__.keys()
        and all(isinstance(fields[name], str) for name in texts)
        and type(fields["rewrite"]) is int
        and isinstance(fields["arguments"], dict)
        and _are_integers(fields["roi"], 3)
        and _are_integers(fields["batch_range"], 2)
    )
    if not fits or not re.fullmatch("[a-z0-9_]+", fields["kind"]):
        raise _Fault("foreign", f"{_MANIFEST} is of another kind")
    return EngineKey(**{**fields, "roi": tuple(fields["roi"]), "batch_range": tuple(fields["batch_range"])})


def _are_integers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(number) is int for number in value)


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    names = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    return tuple(Difference(_shown(name), *_apart(stored.get(name), wanted.get(name))) for name in names)


def _apart(stored: object, wanted: object) -> tuple[str, str]:
    """Two values as text; of two lists of as many parts ("NVIDIA H200, driver 580.159") only the parts that differ."""
    if isinstance(stored, str) and isinstance(wanted, str) and stored.count(", ") == wanted.count(", "):
        pairs = [pair for pair in zip(stored.split(", "), wanted.split(", "), strict=True) if pair[0] != pair[1]]
        stored, wanted = (", ".join(pair[side] for pair in pairs) for side in (0, 1))
    return _shown(stored), _shown(wanted)


def _shown(value: object) -> str:
    """A value for a message: short, and without anything that a terminal would obey."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: _LONGEST_SHOWN + 1])
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def _joined(differing: tuple[Difference, ...]) -> str:
    text = ", ".join(map(str, differing[:_MOST_SHOWN]))
    more = len(differing) - _MOST_SHOWN
    return f"{text} and {more} more" if more > 0 else text
