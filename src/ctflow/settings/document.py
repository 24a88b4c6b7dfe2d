"""A YAML file to values of the wanted kinds; whatever is wrong is named with its file, line and key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ctflow.core.errors import SettingsInvalid

LARGEST_BYTES = 256_000  # a file of a thousand rules has 100 kB
_DEEPEST = 12
_LONGEST_TEXT = 400
_NULL = "tag:yaml.org,2002:null"
_PLAIN_TAGS = frozenset({None, "!"})  # "!" is what a quoted scalar resolves through

T = TypeVar("T")
Section = TypeVar("Section")
Read = Callable[["Place"], T]


@dataclass(frozen=True, eq=False)
class Place:
    """One value of the file and where it stands.

    Attributes:
        file: What messages call the file.
        folder: Relative paths of the file start here.
        key: The way to the value, as `limits.associations` or `rules[2].name`; empty for the whole file.
        node: The value, a scalar, sequence or mapping node of yaml.compose.
    """

    file: str
    folder: Path
    key: str
    node: Any

    def at(self, key: str, node: Any) -> Place:
        """A value inside this one."""
        return Place(self.file, self.folder, key, node)

    def refuse(self, what: str, reason: str = "invalid-value") -> NoReturn:
        """Raise `SettingsInvalid` that names file, line and key."""
        line = self.node.start_mark.line + 1
        raise SettingsInvalid(f"{self.file}, line {line}: {f'{self.key}: ' if self.key else ''}{what}", reason=reason)

    @property
    def is_null(self) -> bool:
        """Whether nothing is written after the key."""
        return bool(self.node.id == "scalar" and self.node.tag == _NULL)

    @property
    def shown(self) -> str:
        """The value for a message, short."""
        if self.node.id != "scalar":
            return {"mapping": "a group of keys", "sequence": "a list"}[self.node.id]
        text = str(self.node.value)
        return repr(text if len(text) <= 40 else f"{text[:40]}...")


def place_of_file(path: Path) -> Place | None:
    """Read a YAML file; None if it holds nothing but comments.

    Args:
        path: The file.

    Raises:
        SettingsInvalid: It cannot be read, is too large, is not one YAML document, or holds what a settings file never
            needs: anchors and aliases (with which a small file becomes an endless one) or tags (which make objects).
    """
    name = path.name
    try:
        with path.open("rb") as stream:
            raw = stream.read(LARGEST_BYTES + 1)
    except OSError as error:
        raise SettingsInvalid(f"{name} cannot be read: {error.strerror}", reason="settings-file") from None
    if len(raw) > LARGEST_BYTES:
        raise SettingsInvalid(
            f"{name} is larger than {LARGEST_BYTES // 1000} kB: not a file of settings", reason="settings-file"
        )
    try:
        content = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsInvalid(
            f"{name}, line {raw[: error.start].count(10) + 1}: not UTF-8 text", reason="settings-file"
        ) from None
    node = _node_from_text(content, name)
    return None if node is None else Place(name, path.absolute().parent, "", node)


def _node_from_text(content: str, name: str) -> Any:
    # Late: the library does not need it, only the node's settings do.
    import yaml  # noqa: PLC0415

    try:
        _refuse_what_no_settings_need(yaml.parse(content, Loader=yaml.SafeLoader), name)
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark else ""
        raise SettingsInvalid(f"{name}{where}: not YAML: {error.problem or error.context}", reason="yaml") from None
    except yaml.reader.ReaderError as error:
        line = content.count("\n", 0, error.position) + 1
        raise SettingsInvalid(
            f"{name}, line {line}: a control character, which YAML does not allow", reason="yaml"
        ) from None
    return None if node is None or node.tag == _NULL else node


def _refuse_what_no_settings_need(events: Any, name: str) -> None:
    """Aliases, tags and deep nesting, before anything is built of them."""
    depth = 0
    for event in events:
        kind, line = type(event).__name__, event.start_mark.line + 1
        if kind == "AliasEvent" or getattr(event, "anchor", None) is not None:
            raise SettingsInvalid(
                f"{name}, line {line}: anchors and aliases (& and *) are not taken: write it out", reason="yaml"
            )
        if getattr(event, "tag", None) not in _PLAIN_TAGS:
            raise SettingsInvalid(f"{name}, line {line}: tags (!) are not taken: write the plain value", reason="yaml")
        depth += kind.endswith("StartEvent") - kind.endswith("EndEvent")
        if depth > _DEEPEST:
            raise SettingsInvalid(f"{name}, line {line}: nested too deeply", reason="yaml")


# ------------------------------------------------------------------------------------------------- groups and lists


def entries(place: Place) -> dict[str, Place]:
    """The keys of a group and the places of their values.

    Raises:
        SettingsInvalid: It is no group, or a key stands twice in it or is no word.
    """
    if place.node.id != "mapping":
        place.refuse(f"must be a group of keys (`key: value` lines), not {place.shown}")
    found: dict[str, Place] = {}
    for key, value in place.node.value:
        here = place.at(place.key, key)
        if key.id != "scalar" or key.tag == _NULL:
            here.refuse("a key must be one word")
        if key.value in found:
            first = found[key.value].node.start_mark.line + 1
            here.refuse(
                f"the key {key.value[:40]!r} stands twice here, first in line {first}: keep one", "duplicate-key"
            )
        found[key.value] = place.at(f"{place.key}.{key.value}".lstrip("."), value)
    return found


def key(read: Read[Any], meaning: str, *, default: Any = MISSING, may_be_empty: bool = False) -> Any:
    """A field of a dataclass that is a group of keys.

    Args:
        read: Reader of its value.
        meaning: One sentence for the documentation.
        default: What holds if the key is left out; without one the key must be given.
        may_be_empty: Whether nothing after the key means the default (groups and lists whose lines are comments).
    """
    return field(default=default, metadata={"read": read, "meaning": meaning, "may_be_empty": may_be_empty})


def section(kind: type[Section], **given: Any) -> Read[Section]:
    """A reader of a group of keys.

    Args:
        kind: A dataclass whose fields were made by `key`.
        given: What holds for fields that the file leaves out and the class has no default for.
    """
    if not is_dataclass(kind):
        raise TypeError(f"{kind} is no dataclass")

    def read(place: Place) -> Section:
        known: Mapping[str, Field[Any]] = {each.name: each for each in fields(kind)}
        values: dict[str, Any] = dict(given)
        for name, value in entries(place).items():
            if name not in known:
                value.refuse(f"unknown key{_nearest(name, known)}", "unknown-key")
            if not value.is_null:
                values[name] = known[name].metadata["read"](value)
            elif not known[name].metadata["may_be_empty"]:
                value.refuse("has no value: give one, or leave the key out")
        for name, each in known.items():
            if name not in values and each.default is MISSING and each.default_factory is MISSING:
                place.refuse(f"the key {name} is missing", "missing-key")
        return _made(kind, values, place)

    return read


def _made(kind: type[Section], values: Mapping[str, Any], place: Place) -> Section:
    """The dataclass; what its own checks refuse is refused here."""
    try:
        return kind(**values)
    except ValueError as error:
        place.refuse(str(error))


def _nearest(name: str, known: Mapping[str, object]) -> str:
    # Underscores and hyphens, capitals: the commonest slips are no difference.
    plain = name.lower().replace("-", "_")
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    return f": do you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


def list_of(read: Read[T], *, most: int = 1000) -> Read[tuple[T, ...]]:
    """A reader of a list; one value alone is a list of one."""

    def read_all(place: Place) -> tuple[T, ...]:
        if place.node.id != "sequence":
            return (read(place),)
        if len(place.node.value) > most:
            place.refuse(f"has {len(place.node.value)} entries, more than {most}")
        places = [place.at(f"{place.key}[{number}]", node) for number, node in enumerate(place.node.value, start=1)]
        for each in places:
            if each.is_null:
                each.refuse("is empty: give a value or take the line away")
        return tuple(read(each) for each in places)

    return read_all


# -------------------------------------------------------------------------------------------------------- one value


def text(place: Place) -> str:
    """Any text of one line, as it is written (`NO` and `010` stay what they are)."""
    value: str = place.node.value
    if place.node.id != "scalar":
        place.refuse(f"must be text, not {place.shown}")
    if len(value) > _LONGEST_TEXT or not value.isprintable() or not value.strip():
        place.refuse(f"must be one line of 1 to {_LONGEST_TEXT} letters")
    return value.strip()


def one_of(*allowed: str) -> Read[str]:
    """A reader of one of some words."""

    def read(place: Place) -> str:
        value = text(place)
        if value not in allowed:
            place.refuse(f"{place.shown} is none of {', '.join(allowed)}{_close_word(value, allowed)}")
        return value

    return read


def _close_word(value: str, allowed: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(value.lower(), allowed, n=1)
    return f": do you mean {close[0]}?" if close else ""


def switch(place: Place) -> bool:
    """`true` or `false`."""
    if place.node.id != "scalar" or place.node.value not in {"true", "false"} or place.node.style:
        place.refuse(f"must be true or false, not {place.shown}")
    return bool(place.node.value == "true")


def whole(least: int, most: int) -> Read[int]:
    """A reader of a whole number."""

    def read(place: Place) -> int:
        value = _plain(place)
        if not re.fullmatch(r"\d{1,15}", value, re.ASCII) or not least <= int(value) <= most:
            place.refuse(f"must be a whole number from {least} to {most}, not {place.shown}")
        return int(value)

    return read


def real(least: float, most: float) -> Read[float]:
    """A reader of a decimal number."""

    def read(place: Place) -> float:
        value = _plain(place)
        if not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", value, re.ASCII) or not least <= float(value) <= most:
            place.refuse(f"must be a number from {least:g} to {most:g}, not {place.shown}")
        return float(value)

    return read


_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(least: int, most: int) -> Read[int]:
    """A reader of a number of bytes, alone or with a unit (`20 GB`, `128 KiB`)."""

    def read(place: Place) -> int:
        match = re.fullmatch(r"(\d{1,15}) ?([A-Za-z]{0,3})", _plain(place), re.ASCII)
        if match is None or match[2] not in _UNITS:
            place.refuse(f"must be bytes, as 131072, 500 MB or 20 GB, not {place.shown}")
        value = int(match[1]) * _UNITS[match[2]]
        if not least <= value <= most:
            place.refuse(f"must be from {size_text(least)} to {size_text(most)}, not {place.shown}")
        return value

    return read


def size_text(count: int) -> str:
    """Bytes with the largest unit that needs no fraction: 20 GB, 128 KiB, 1500."""
    units = sorted(((factor, unit) for unit, factor in _UNITS.items() if factor > 1), reverse=True)
    for factor, unit in units:
        if count and count % factor == 0:
            return f"{count // factor} {unit}"
    return str(count)


def path(place: Place) -> Path:
    """A path; a relative one starts at the folder of the file that says it."""
    value = text(place)
    if value.startswith("~"):
        place.refuse("~ is not followed, as the user of a service seldom is the one who wrote it: give the whole path")
    return place.folder / value


def _plain(place: Place) -> str:
    """A number's text; empty, which is no number, for anything in quotes or not a scalar."""
    return str(place.node.value) if place.node.id == "scalar" and not place.node.style else ""
