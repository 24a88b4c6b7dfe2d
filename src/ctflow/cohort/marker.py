"""A commit marker is read strictly: each field has its type, and the content fits the name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.outcome import MarkName, RowFinding, RowOutcome, RowSegment
from ctflow.core.errors import NotWritten

_VERSIONS = ("1", "2")
_MOST = 2**31 - 1
_MOST_NUMBER = 1e12
_TIME = re.compile(r"(?:19[7-9]|20\d|21\d)\d-\d\d-\d\dT\d\d:\d\d:\d\dZ|")
_MOST_BYTES = 16 << 20  # a hundred segments with a hundred findings each take 3 MB


def outcome_from_bytes(content: bytes, name: MarkName) -> RowOutcome:
    """Read a marker.

    Args:
        content: The file's.
        name: The file's.

    Raises:
        NotWritten: It is damaged, another row's, or a later version's.
    """
    try:
        return _outcome(content, name)
    except (ValueError, RecursionError) as error:
        raise NotWritten(
            f"the marker of row {name.id} is damaged ({error}): remove it, and the next start segments the row again",
            reason="damaged-marker",
        ) from error


def outcome_of_mark(destination: RowDestination, name: MarkName) -> RowOutcome:
    """Read a marker of a destination.

    Raises:
        NotWritten: As `outcome_from_bytes`; or it has gone.
        OutputError: The destination cannot be read.
    """
    content = destination.read(f"rows/{name}")
    if content is None:
        raise NotWritten(f"the marker of row {name.id} has gone: start again", reason="damaged-marker")
    return outcome_from_bytes(content, name)


def _outcome(content: bytes, name: MarkName) -> RowOutcome:
    if len(content) > _MOST_BYTES:
        raise ValueError("larger than any")
    given = dict(_mapping("marker", json.loads(content)))
    version = given.pop("schema_version", None)
    if version not in _VERSIONS:
        raise ValueError("a version that this ctflow does not read")
    outcome: RowOutcome = _built(RowOutcome, given)
    if outcome.name != name:
        raise ValueError("another row's")
    if not _TIME.fullmatch(outcome.finished):
        raise ValueError("finished is no time")
    return outcome


def _built(kind: Any, given: Any) -> Any:
    """A value of a class whose fields are checked by their types' names."""
    document = _mapping(kind.__name__, given)
    readers, needed = _fields(kind)
    if unknown := document.keys() - readers.keys():
        raise ValueError(f"it has {len(unknown)} unknown fields")
    if missing := sorted(needed - document.keys()):
        raise ValueError(f"it lacks {', '.join(missing)}")
    return kind(**{name: readers[name](name, value) for name, value in document.items()})


@cache
def _fields(kind: Any) -> tuple[Mapping[str, Callable[[str, Any], Any]], frozenset[str]]:
    """Readers of a class's fields, and which of them must be there."""
    found = fields(kind)
    needed = {each.name for each in found if each.default is MISSING and each.default_factory is MISSING}
    return {each.name: _READERS[str(each.type)] for each in found}, frozenset(needed)


def _mapping(name: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} is no object")  # noqa: TRY004  # as of any other value that is wrong
    return value


def _of(kind: type) -> Callable[[str, Any], Any]:
    def read(name: str, value: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"{name} is no {kind.__name__}")
        return value

    return read


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not -_MOST_NUMBER <= value <= _MOST_NUMBER:
        raise ValueError(f"{name} is no number that is measured")
    return float(value)


def _several(read: Callable[[str, Any], Any]) -> Callable[[str, Any], tuple[Any, ...]]:
    def read_all(name: str, value: Any) -> tuple[Any, ...]:
        return tuple(read(name, each) for each in _of(list)(name, value))

    return read_all


def _named(read: Callable[[str, Any], Any]) -> Callable[[str, Any], dict[str, Any]]:
    def read_all(name: str, value: Any) -> dict[str, Any]:
        return {key: read(name, each) for key, each in _mapping(name, value).items()}

    return read_all


def _text(name: str, value: Any) -> str:
    text: str = _of(str)(name, value)
    text.encode()  # halves of a character, which JSON can hold, raise here and not in every reader
    return text


def _count(name: str, value: Any) -> int:
    number: int = _of(int)(name, value)
    if not 0 <= number <= _MOST:
        raise ValueError(f"{name} is no count")
    return number


_READERS: Mapping[str, Callable[[str, Any], Any]] = {
    "str": _text,
    "RowStatus": _text,  # the name has it, too
    "int": _count,
    "float": _number,
    "float | None": lambda name, value: None if value is None else _number(name, value),
    "tuple[str, ...]": _several(_text),
    "tuple[RowSegment, ...]": _several(lambda _, value: _built(RowSegment, value)),
    "tuple[RowFinding, ...]": _several(lambda _, value: _built(RowFinding, value)),
    "Mapping[str, str]": _named(_text),
    "Mapping[str, float]": _named(_number),
}
