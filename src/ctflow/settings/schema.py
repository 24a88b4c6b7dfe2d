"""What a schema of settings is made of: groups of keys, what each key means, and how text becomes its value.

A group is a frozen dataclass over `Group`; each field is `Annotated[type, Key(meaning)]`. Flags, variables and YAML
files give text, which pydantic turns into values; values made in Python are taken as they are. pydantic is imported
when a value is first read, so that `ctflow --help` does not wait for it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from ctflow.core.errors import SettingsInvalid

if TYPE_CHECKING:
    from pydantic import GetCoreSchemaHandler, TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

LARGEST_TEXT = 400
_MEANT_CHOICES = {"gpu": "cuda", "gpus": "cuda", "nvidia": "cuda"}  # where no spelling is close
Loc = tuple[str | int, ...]
Read = Callable[[Any], Any]


class Written(str):
    """A scalar of a YAML file: its text, whether it stands in quotes, and the folder that relative paths start at."""

    quoted: bool
    folder: Path


class Refused(SettingsInvalid, ValueError):
    """What is wrong in a group; `at` leads from the group to the value that it is wrong with."""

    def __init__(self, message: str, *at: str | int, reason: str = "invalid-value") -> None:
        super().__init__(message, reason=reason)
        self.at = at


class Group:
    """Base of the dataclasses that are groups of keys.

    Attributes:
        MEANT: Keys that a person may look for here, and the ones that take their place.
        ALIKE: A group of which it has keys once more, for a part of what that one is for: they are documented there.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    MEANT: ClassVar[Mapping[str, str]] = {}
    ALIKE: ClassVar[type[Group] | None] = None


G = TypeVar("G", bound=Group)


@dataclass(frozen=True)
class Reads:
    """How a value is read from text, and shown as text; a ValueError of `read` says what is wrong."""

    read: Read
    show: Callable[[Any], str] = str

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """What pydantic asks for."""
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.no_info_plain_validator_function(self.read)


@dataclass(frozen=True)
class Key:
    """What a person is told of one field.

    Attributes:
        meaning: One sentence.
        metavar: What stands for the value in the help of a command; the choices where it is left out.
        default: What holds without it, where that is no constant.
        most: Entries of a list.
        of_files: Says what is written, and so means nothing to commands that write no result folder.
    """

    meaning: str
    metavar: str = ""
    default: str = ""
    most: int = 1000
    of_files: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """What pydantic asks for."""
        from pydantic_core import core_schema  # noqa: PLC0415

        return core_schema.no_info_before_validator_function(partial(self._given, source), handler(source))

    def _given(self, source: Any, value: Any) -> Any:
        """A group or list whose lines are all comments is the default; one value alone is a list of one."""
        is_list = get_origin(source) is tuple
        if value is None and not is_list and group_of(source) is not source:
            raise ValueError("has no value: give one, or leave the key out")
        if value is None:
            return [] if is_list else {}
        if is_list and not isinstance(value, list):
            return [value]
        if is_list and len(value) > self.most:
            raise ValueError(f"has {len(value)} entries, more than {self.most}")
        return value


# ----------------------------------------------------------------------------------------------------- looking at it


def group_of(annotation: Any) -> type[Group] | None:
    """The group that a field's type is, or is a list of."""
    if get_origin(annotation) is None and isinstance(annotation, type) and issubclass(annotation, Group):
        return annotation
    return next((found for each in get_args(annotation) if (found := group_of(each))), None)


def keys_of(kind: type[Group]) -> Mapping[str, tuple[Any, Key]]:
    """Every field's type and key: the group's own first, then those of the group that it extends."""
    types = get_type_hints(kind, include_extras=True)
    own = kind.__annotations__
    names = sorted((each.name for each in fields(kind)), key=lambda name: name not in own)  # type: ignore[arg-type]
    return {name: (types[name], types[name].__metadata__[-1]) for name in names}


def choices_of(annotation: Any) -> tuple[str, ...]:
    """The words that a key takes; none where it takes anything else."""
    parts = get_args(annotation)
    if get_origin(annotation) is Literal:
        return parts
    return next((found for part in parts if (found := choices_of(part))), ())


@dataclass(frozen=True)
class Row:
    """One key for the documentation: its way, what holds without it, and what it means."""

    name: str
    default: str
    meaning: str


def documented(kind: type[Group], above: str = "") -> Iterator[Row]:
    """Every key of a group and of the groups in it."""
    defaults = {each.name: each.default for each in fields(kind)}  # type: ignore[arg-type]
    for name, (annotation, key) in keys_of(kind).items():
        if kind.ALIKE and name in keys_of(kind.ALIKE):
            continue
        default, inner = defaults[name], group_of(annotation)
        if isinstance(default, Group):
            yield from documented(type(default), f"{above}{name}.")
            continue
        text = "must be given" if default is MISSING else shown_as_set(annotation, default)
        yield Row(f"{above}{name}", key.default or text, key.meaning)
        if inner and default in ((), None):
            yield from documented(inner, f"{above}{name}{'[]' if default == () else ''}.")


def effective(settings: Group, loc: Loc = ()) -> Iterator[tuple[Loc, str]]:
    """Every key of a group with the value that holds, as text, and the way to it."""
    open_ = {each.name for each in fields(settings) if each.default is None}  # type: ignore[arg-type]
    for name, (annotation, key) in keys_of(type(settings)).items():
        value, here = getattr(settings, name), (*loc, name)
        if settings.ALIKE and name in keys_of(settings.ALIKE):
            continue
        groups = value if isinstance(value, tuple) else (value,)
        if groups and all(isinstance(each, Group) for each in groups):
            for number, each in enumerate(groups):
                yield from effective(each, (*here, number) if isinstance(value, tuple) else here)
        else:
            yield here, (value is None and name in open_ and key.default) or shown_as_set(annotation, value)


def shown_as_set(annotation: Any, value: Any) -> str:
    """A value as a person would write it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool | float):
        return str(value).lower() if isinstance(value, bool) else f"{value:g}"
    return next((each.show for each in annotation.__metadata__ if isinstance(each, Reads)), str)(value)


def key_text(loc: Loc) -> str:
    """The way to a value, as `limits.associations` or `rules[2].name`."""
    return "".join(f"[{part + 1}]" if isinstance(part, int) else f".{_key_name(part)}" for part in loc).lstrip(".")


def _key_name(name: str) -> str:
    """A key as it is written; in quotes and short if it is longer than any key, empty, or would alter a terminal."""
    return name if name.isprintable() and 0 < len(name) <= 40 else shown(name)


# --------------------------------------------------------------------------------------------------------- reading


def validated(kind: type[G], data: Mapping[str, Any], where: Callable[[Loc], tuple[int, str]]) -> G:
    """A group from text.

    Args:
        kind: The group.
        data: Text, lists and groups by the keys' names.
        where: The way to a value -> its line, and what a message says of its place.

    Raises:
        SettingsInvalid: Names the place, the key and what is wrong; of several mistakes the first in the file.
    """
    from pydantic import ValidationError  # noqa: PLC0415

    try:
        anything: Any = kind  # to mypy, a class of dataclasses cannot be hashed
        found: G = _adapter(anything).validate_python(data)
    except ValidationError as error:
        problems = [_problem(kind, each) for each in error.errors(include_url=False)]
    else:
        return found
    # Of a group with an unknown and a missing key, the unknown one is the missing one misspelt.
    first = min(problems, key=lambda problem: (where(problem.at)[0], problem.reason == "missing-key"))
    raise SettingsInvalid(f"{where(first.at)[1]}: {first}", reason=first.reason)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter  # noqa: PLC0415

    return TypeAdapter(kind)


def _problem(kind: type[Group], error: ErrorDetails) -> Refused:
    loc, value = error["loc"], error["input"]
    match error["type"]:
        case "value_error":
            cause = error["ctx"]["error"]
            own = isinstance(cause, Refused)
            return Refused(str(cause), *loc, *cause.at, reason=cause.reason) if own else Refused(str(cause), *loc)
        case "missing":
            return Refused(f"the key {loc[-1]} is missing", *loc[:-1], reason="missing-key")
        case "unexpected_keyword_argument":
            return Refused(f"unknown key{_nearest(str(loc[-1]), kind, loc[:-1])}", *loc, reason="unknown-key")
        case "literal_error" if isinstance(value, str):
            return Refused(wrong_choice(value, re.findall("'(.*?)'", error["ctx"]["expected"])), *loc)
        case "literal_error":
            return Refused(f"must be text, not {shown(value)}", *loc)
        case "dataclass_type":
            return Refused(f"must be a group of keys (`key: value` lines), not {shown(value)}", *loc)
    raise TypeError(f"{key_text(loc)}: {error['type']} has no message")


def _nearest(name: str, kind: type[Group], loc: Loc) -> str:
    for part in loc:
        kind = group_of(keys_of(kind)[part][0]) or kind if isinstance(part, str) else kind
    # Underscores and hyphens, capitals: the commonest slips are no difference.
    plain, known = name.lower().replace("-", "_"), keys_of(kind)
    plain = kind.MEANT.get(plain, plain)
    close = [plain] if plain in known else difflib.get_close_matches(plain, known, n=1, cutoff=0.5)
    return f": do you mean {close[0]}?" if close else f"; there are {', '.join(sorted(known))}"


def wrong_choice(value: str, allowed: list[str]) -> str:
    """The message for a word that is not among those allowed."""
    meant = _MEANT_CHOICES.get(value.lower().rstrip(":,0123456789"))
    close = [meant] if meant in allowed else difflib.get_close_matches(value.lower(), allowed, n=1)
    hint = f": do you mean {close[0]}?" if close else ""
    return f"invalid choice {shown(value)} (choose from {', '.join(allowed)}){hint}"


def shown(value: Any) -> str:
    """A value for a message, short."""
    if not isinstance(value, str):
        return "a group of keys" if isinstance(value, dict) else "a list"
    return repr(str(value) if len(value) <= 40 else f"{value[:40]}...")


# -------------------------------------------------------------------------------------------------- kinds of values


def one_line(value: Any) -> str:
    """Any text of one line, as it is written (`NO` and `010` stay what they are)."""
    if not isinstance(value, str):
        raise ValueError(f"must be text, not {shown(value)}")  # noqa: TRY004  # pydantic takes no TypeError
    if len(value) > LARGEST_TEXT or not value.isprintable() or not value.strip():
        raise ValueError(f"must be one line of 1 to {LARGEST_TEXT} letters")
    return value.strip()


def switch(value: Any) -> bool:
    """`true` or `false`; of a flag or variable also other words."""
    words = {"true": True, "false": False}
    if not isinstance(value, Written):
        words |= {"1": True, "yes": True, "on": True, "0": False, "no": False, "off": False}
        value = value.lower() if isinstance(value, str) else value
    if text_of_scalar(value) not in words:
        raise ValueError(f"must be true or false, not {shown(value)}")
    return words[value]


def text_of_scalar(value: Any) -> str:
    """A number's text; for anything in quotes, and what is not text, a text that is no number."""
    return value if isinstance(value, str) and not getattr(value, "quoted", False) else "?"


def whole(least: int, most: int) -> Reads:
    """A whole number."""

    def read(value: Any) -> int:
        if not re.fullmatch(r"\d{1,15}", text_of_scalar(value), re.ASCII) or not least <= int(value) <= most:
            raise ValueError(f"must be a whole number from {least} to {most}, not {shown(value)}")
        return int(value)

    return Reads(read)


def real(least: float, most: float) -> Reads:
    """A decimal number."""

    def read(value: Any) -> float:
        if (
            not re.fullmatch(r"\d{1,12}(\.\d{1,9})?", text_of_scalar(value), re.ASCII)
            or not least <= float(value) <= most
        ):
            raise ValueError(f"must be a number from {least:g} to {most:g}, not {shown(value)}")
        return float(value)

    return Reads(read)


_UNITS = {"": 1, "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def size(least: int, most: int) -> Reads:
    """A number of bytes, alone or with a unit (`20 GB`, `128 KiB`)."""

    def read(value: Any) -> int:
        match = re.fullmatch(r"(\d{1,15}) ?([A-Za-z]{0,3})", text_of_scalar(value), re.ASCII)
        if match is None or match[2] not in _UNITS:
            raise ValueError(f"must be bytes, as 131072, 500 MB or 20 GB, not {shown(value)}")
        count = int(match[1]) * _UNITS[match[2]]
        if not least <= count <= most:
            raise ValueError(f"must be from {size_text(least)} to {size_text(most)}, not {shown(value)}")
        return count

    return Reads(read, size_text)


def size_text(count: int) -> str:
    """Bytes with the largest unit that needs no fraction: 20 GB, 128 KiB, 1500."""
    units = sorted(((factor, unit) for unit, factor in _UNITS.items() if factor > 1), reverse=True)
    for factor, unit in units:
        if count and count % factor == 0:
            return f"{count // factor} {unit}"
    return str(count)


def path(value: Any) -> Path:
    """A path; a relative one of a file starts at the file's folder. A `Path` is the system's own and is not checked."""
    if isinstance(value, Path):
        return value
    found, folder = one_line(value), getattr(value, "folder", Path())
    if isinstance(value, Written) and found.startswith("~"):
        raise ValueError(
            "~ is not followed, as the user of a service seldom is the one who wrote it: give the whole path"
        )
    return Path(folder / found)


Text = Annotated[str, Reads(one_line)]
Switch = Annotated[bool, Reads(switch)]
FilePath = Annotated[Path, Reads(path)]
