"""The manifest next to a stored engine file, its key, and the checks of both."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ctflow.core.volume import Size3

EntryState = Literal["ready", "damaged", "foreign", "unreadable", "being made", "left over"]

MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest; another format marks a foreign folder
_LONGEST_DOCUMENT = 1 << 20  # bytes; ctflow's have about a thousand
_DEEPEST = 50  # nested brackets; ctflow's have five
_MOST_SHOWN = 6  # differing fields in a message; a foreign manifest may have any number
_LONGEST_SHOWN = 100  # characters of one value in a message


@dataclass(frozen=True)
class EngineKey:
    """Everything that a stored file depends on.

    Attributes:
        kind: Kind of the file, for example "onnx".
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
        """The key as JSON returns it."""
        fields: dict[str, Any] = json.loads(json.dumps(asdict(self), sort_keys=True, default=str))
        return fields

    @property
    def name(self) -> str:
        """Name of its folder: the kind and half of a SHA-256 over the fields."""
        text = json.dumps(self.fields, sort_keys=True, ensure_ascii=True)
        return f"{self.kind}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


class Fault(Exception):
    """Why a folder is not the engine that its name promises."""

    def __init__(self, state: EntryState, reason: str) -> None:
        super().__init__(reason)
        self.state: EntryState = state


@dataclass(frozen=True)
class Difference:
    """One field in which a stored key differs from the wanted one; of lists such as devices, only differing parts.

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
        if made:  # changed by using another machine, not by another request
            return f"{self.field} (made {made} {self.stored}, this machine has {self.wanted})"
        return f"{self.field.replace('_', ' ')} ({self.stored} is stored, {self.wanted} is wanted)"


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file that anyone may have written.

    Args:
        path: A plain file; links and devices are refused.

    Returns:
        The object.

    Raises:
        OSError: It cannot be read.
        ValueError: It is too long or no JSON object.
    """
    with open_plain(path) as stream:
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
    """Whether brackets are nested so deep that a recursive function may fail on them."""
    level = [document]
    for _ in range(_DEEPEST):
        inner = [
            value.values() if isinstance(value, dict) else value for value in level if isinstance(value, dict | list)
        ]
        level = [value for values in inner for value in values]
    return bool(level)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest; its "key" is a mapping."""
    try:
        if not is_folder(folder):
            raise Fault("foreign", "it is not a folder")
        manifest = read_json_object(folder / MANIFEST)
    except PermissionError as error:
        raise Fault("unreadable", f"{MANIFEST} cannot be read (PermissionError)") from error
    except (OSError, ValueError) as error:
        raise Fault("damaged", f"{MANIFEST} cannot be read ({type(error).__name__})") from error
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("key"), dict):
        raise Fault("foreign", f"{MANIFEST} is of another kind")
    return manifest


def check_key(stored: Mapping[str, Any], wanted: EngineKey) -> None:
    """Reject a stored key that is not the wanted one, with a `Fault` that names the differences."""
    differing = differences(stored, wanted.fields)
    if differing:
        raise Fault("foreign", f"it differs in {text_of_differences(differing)}")


def check_digest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Reject a file whose digest is not the manifest's, with a `Fault`."""
    try:
        digest = digest_of_file(path)
    except OSError as error:
        state: EntryState = "unreadable" if isinstance(error, PermissionError) else "damaged"
        raise Fault(state, f"{path.name} cannot be read ({type(error).__name__})") from error
    if digest != manifest.get("sha256"):
        raise Fault("damaged", f"{path.name} is not the file that was stored")


def digest_of_file(path: Path) -> str:
    """SHA-256 of a plain file, as hexadecimal digits; an OSError where it cannot be read."""
    digest = hashlib.sha256()
    with open_plain(path) as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def open_plain(path: Path) -> BinaryIO:
    """Open a plain file to read; a link may change behind the store's back, and a pipe would never end."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    raise OSError(errno.EINVAL, "not a plain file")


def is_file(path: Path) -> bool:
    """Whether it is a plain file and no link to one."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Whether it is a folder and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def key_from_fields(fields: Mapping[str, Any]) -> EngineKey:
    """The key in a manifest.

    Raises:
        Fault: A field is missing, unknown or of another type, as another version of ctflow may write it.
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
        raise Fault("foreign", f"{MANIFEST} is of another kind")
    return EngineKey(**{**fields, "roi": tuple(fields["roi"]), "batch_range": tuple(fields["batch_range"])})


def _are_integers(value: object, count: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(type(number) is int for number in value)


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[Difference, ...]:
    """The differences between the fields of two keys, sorted by name."""
    names = sorted(name for name in {*stored, *wanted} if stored.get(name) != wanted.get(name))
    return tuple(Difference(_shown(name), *_apart(stored.get(name), wanted.get(name))) for name in names)


def _apart(stored: object, wanted: object) -> tuple[str, str]:
    """Two values as text; of two lists of as many parts ("NVIDIA H200, driver 580.159") only the parts that differ."""
    if isinstance(stored, str) and isinstance(wanted, str) and stored.count(", ") == wanted.count(", "):
        pairs = [pair for pair in zip(stored.split(", "), wanted.split(", "), strict=True) if pair[0] != pair[1]]
        stored, wanted = (", ".join(pair[side] for pair in pairs) for side in (0, 1))
    return _shown(stored), _shown(wanted)


def _shown(value: object) -> str:
    """A value for a message: short, and without control characters for a terminal."""
    if value is None:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value)
    if re.fullmatch("[0-9a-f]{64}", text):
        return text[:12]
    text = "".join(letter if letter.isprintable() else "?" for letter in text[: _LONGEST_SHOWN + 1])
    return text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}..."


def text_of_differences(differing: tuple[Difference, ...]) -> str:
    """Differences as one line for a message, the first few of them."""
    text = ", ".join(map(str, differing[:_MOST_SHOWN]))
    more = len(differing) - _MOST_SHOWN
    return f"{text} and {more} more" if more > 0 else text
