"""What was given and where: a YAML file to text, lists and groups, and the line of each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from ctflow.core.errors import SettingsInvalid
from ctflow.settings.schema import G, Loc, Written, key_text, shown, validated

LARGEST_BYTES = 256_000  # a file of a thousand rules has 100 kB
_DEEPEST = 12
_NULL = "tag:yaml.org,2002:null"
_PLAIN_TAGS = frozenset({None, "!"})  # "!" is what a quoted scalar resolves through


@dataclass(frozen=True)
class Given:
    """What was given for a group of keys, and where: in a file, by flags, by variables.

    Attributes:
        data: Text, lists and groups by the keys' names; None where nothing is written after a key.
        named: Key -> the flag or variable that gave it; the file gave the others.
        file: What messages call the file.
        folder: Relative paths of the file start here.
        lines: The line of every value of the file, by the way to it.
    """

    data: dict[str, Any] = field(default_factory=dict)
    named: dict[str | int, str] = field(default_factory=dict)
    file: str = ""
    folder: Path = Path()
    lines: dict[Loc, int] = field(default_factory=lambda: {(): 1})

    def read(self, kind: type[G]) -> G:
        """The values.

        Raises:
            SettingsInvalid: One is wrong; names the flag, the variable, or file, line and key.
        """
        return validated(kind, self.data, self.where)

    def where(self, loc: Loc) -> tuple[int, str]:
        """The line of a value, or of the group that lacks it, and what a message says of its place."""
        if loc and loc[0] in self.named:
            return 0, self.named[loc[0]]
        found = self._written(loc)
        line = self.lines[found]
        return line, f"{self.file}, line {line}: {key_text(found)}".removesuffix(": ")

    def origin(self, loc: Loc) -> str:
        """Where a value comes from: a flag, a variable, a line of the file, or the defaults."""
        if loc[0] in self.named:
            return self.named[loc[0]]
        # A list of one may be written without being a list.
        is_written = [part for part in self._written(loc) if part != 0] == [part for part in loc if part != 0]
        return f"line {self.where(loc)[0]}" if is_written else "default"

    def _written(self, loc: Loc) -> Loc:
        """As much of the way to a value as is written."""
        found: Loc = ()
        for part in loc:
            if (*found, part) in self.lines:
                found = (*found, part)
            elif part != 0:
                break
        return found

    def refuse(self, node: Any, loc: Loc, what: str, reason: str = "invalid-value") -> NoReturn:
        """Raise `SettingsInvalid` that names file, line and key."""
        line, key = node.start_mark.line + 1, key_text(loc)
        raise SettingsInvalid(f"{self.file}, line {line}: {f'{key}: ' if key else ''}{what}", reason=reason)

    def take(self, node: Any, loc: Loc = ()) -> Any:
        """The value of a YAML node; keeps the lines of what is in it."""
        self.lines[loc] = node.start_mark.line + 1
        if node.id == "mapping":
            return {name: self.take(value, (*loc, name)) for name, value in self._entries(node, loc).items()}
        if node.id == "sequence":
            values = [self.take(each, (*loc, number)) for number, each in enumerate(node.value)]
            if None in values:
                number = values.index(None)
                self.refuse(node.value[number], (*loc, number), "is empty: give a value or remove the line")
            return values
        if node.tag == _NULL:
            return None
        scalar = Written(node.value)
        scalar.quoted, scalar.folder = bool(node.style), self.folder
        return scalar

    def _entries(self, node: Any, loc: Loc) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in node.value:
            if key.id != "scalar" or key.tag == _NULL:
                self.refuse(key, loc, "a key must be one word")
            if key.value in found:
                line = found[key.value].start_mark.line + 1
                self.refuse(
                    key, loc, f"the key {shown(key.value)} is repeated, first in line {line}: keep one", "duplicate-key"
                )
            found[key.value] = value
        return found


def given_in_file(path: Path) -> Given:
    """Read a YAML file.

    Args:
        path: The file.

    Raises:
        SettingsInvalid: It cannot be read, is too large, is not one YAML document with a group of keys, repeats a key,
            or holds what a settings file never needs: anchors and aliases (with which a small file becomes an endless
            one) or tags (which make objects).
    """
    given = Given(file=path.name, folder=path.absolute().parent)
    node = _node_from_text(_content(path), path.name)
    if node is None:  # nothing but comments
        return given
    values = given.take(node)
    if not isinstance(values, dict):
        given.refuse(node, (), f"must be a group of keys (`key: value` lines), not {shown(values)}")
    given.data.update(values)
    return given


def _content(path: Path) -> str:
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
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SettingsInvalid(
            f"{name}, line {raw[: error.start].count(10) + 1}: not UTF-8 text", reason="settings-file"
        ) from None


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
