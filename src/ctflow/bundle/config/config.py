"""A bundle's configuration as data: literals, `@references`, and `$` expressions that are computed, never executed."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.config.documents import merged_document
from ctflow.bundle.config.relative import with_whole_references
from ctflow.bundle.expressions.files import BundleFiles
from ctflow.bundle.expressions.interpreter import sole_reference, value_of_expression
from ctflow.bundle.expressions.values import Budget, Held, NameValue, NotUnderstood, as_literal
from ctflow.core.errors import BundleInvalid

MOST_REFERENCES = 32  # in one chain of references
MOST_LEVELS = 16
MOST_NODES = 100_000  # of all needed values, so that nested references cannot multiply
LARGEST_NUMBER = 1e9
_REFERENCE = re.compile(r"@\w+(?:::\w+)*")  # MONAI's, without the relative ones
_RELATIVE = re.compile(r"[@%]::")
MISSING: Any = object()


class _Short(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        """As the base class, but Python cannot print thousands of digits."""
        return "a huge number" if abs(x) >= 10**30 else super().repr_int(x, level)


_SHORT = _Short()
_SHORT.maxlevel = 2
_SHORT.maxstring = 60


@dataclass(frozen=True)
class ConfigValue:
    """A value of the configuration.

    Attributes:
        id: Its location, for messages: keys joined by `#`.
        value: The value; a string that starts with `@`, `$` or `%` is not resolved yet.
    """

    id: str
    value: Any


class Config:
    """One configuration, of one file or several merged ones.

    Args:
        document: The parsed object; its overrides are applied as in MONAI.
        file: The file's path inside the bundle, for messages.
        files: What its expressions may read.

    Raises:
        BundleInvalid: An override cannot be applied.
    """

    def __init__(self, document: Mapping[str, Any], file: str, files: BundleFiles | None = None) -> None:
        self._document = merged_document(document, file)
        self._document = with_whole_references(self._document)
        self._document["bundle_root"] = "."  # as `monai.bundle run --bundle_root`: paths start in this bundle
        self.file = file
        self._files = files or BundleFiles(None)
        self._nodes_left = MOST_NODES
        self._budget = Budget()
        self._computed: dict[tuple[str, bool], Any] = {}  # value of each expression, and whether it keeps arrays
        self._computing: list[str] = []

    def invalid(self, place_id: str, problem: str, reason: str = "value") -> BundleInvalid:
        """The error for a location in this file; `reason` is one of `BundleInvalid.REASONS`."""
        return BundleInvalid(f"{self.file}: {place_id[:200]} {problem}", reason=reason)

    @property
    def document(self) -> Mapping[str, Any]:
        """The whole configuration, for MONAI's parser."""
        return self._document

    def __contains__(self, key: str) -> bool:
        return key in self._document

    @property
    def keys(self) -> list[str]:
        """The top-level keys."""
        return list(self._document)

    def raw(self, key: str) -> ConfigValue:
        """A top-level value with no reference followed; it must exist."""
        return ConfigValue(key, self._document[key])

    def top(self, key: str) -> ConfigValue:
        """A top-level value, with references followed.

        Raises:
            BundleInvalid: It is absent or cannot be known without executing the bundle.
        """
        if key not in self._document:
            raise BundleInvalid(f"{self.file} lacks the key {key!r}, which ctflow needs", reason="argument")
        return self.resolved(ConfigValue(key, self._document[key]))

    def resolved(self, place: ConfigValue) -> ConfigValue:
        """Follow references to a literal; the location keeps its id."""
        return self._resolved(place, keeps_arrays=False)

    def _resolved(self, place: ConfigValue, *, keeps_arrays: bool) -> ConfigValue:
        value = place.value
        seen: list[str] = []
        while isinstance(value, str) and not isinstance(value, NameValue) and value[:1] in ("@", "$", "%"):
            by = f" (by {short(seen[-1])})" if seen else ""
            if value[0] == "%":
                raise self.invalid(place.id, f"is a macro{by}, {short(value)}: write the value itself", "expression")
            if value[0] == "$":
                reference = sole_reference(value[1:])
                if reference is None:
                    return ConfigValue(place.id, self._value_of_expression(place.id, value, by, keeps_arrays))
                value = f"@{reference}"
            if value in seen:
                raise self.invalid(place.id, f"is a reference to itself, {short(value)}", "reference")
            if len(seen) >= MOST_REFERENCES:
                raise self.invalid(place.id, f"follows more than {MOST_REFERENCES} references", "reference")
            seen.append(value)
            value = self._looked_up(place.id, value)
        if isinstance(value, str) and not isinstance(value, NameValue):
            # MONAI replaces every "#" in a text by "::", whatever its purpose.
            value = value.replace("#", "::")
            if _RELATIVE.search(value):
                raise self.invalid(
                    place.id, f"contains a relative reference, {short(value)}: write the whole path", "reference"
                )
        return ConfigValue(place.id, value)

    def _value_of_expression(self, place_id: str, text: str, by: str, keeps_arrays: bool) -> Any:
        if (text, keeps_arrays) in self._computed:
            return self._computed[text, keeps_arrays]
        if text in self._computing or len(self._computing) >= MOST_REFERENCES:
            raise self.invalid(place_id, f"is an expression of itself, {short(text)}", "reference")
        self._computing.append(text)
        try:
            found = value_of_expression(
                text[1:], lambda path: self._for_expression(place_id, path), self._files, self._budget
            )
            self._computed[text, keeps_arrays] = as_literal(found, keeps_arrays=keeps_arrays)
        except NotUnderstood as error:
            part = f"{short(error.part)} " if error.part else "it "
            advice = "write the value itself; ctflow computes a small part of Python and executes nothing of a bundle"
            raise self.invalid(
                place_id, f"is an expression{by}, {short(text)}: {part}{error.why}: {advice}", "expression"
            ) from None
        finally:
            self._computing.pop()
        return self._computed[text, keeps_arrays]

    def _for_expression(self, place_id: str, path: str) -> Any:
        """The value of a reference inside an expression; objects are held, not looked into."""
        return self._held(self._resolved(ConfigValue(place_id, f"@{path}"), keeps_arrays=True), 0)

    def _held(self, place: ConfigValue, level: int) -> Any:
        self._nodes_left -= 1
        if level > MOST_LEVELS or self._nodes_left < 0:
            raise self.invalid(place.id, "is nested too deeply or too large")
        value = place.value
        if isinstance(value, Mapping) and "_target_" in value:
            return Held(value)
        if isinstance(value, list):
            return [self._held_inside(place, item, level) for item in value]
        if isinstance(value, Mapping):
            return {key: self._held_inside(place, item, level) for key, item in value.items()}
        return value

    def _held_inside(self, place: ConfigValue, item: Any, level: int) -> Any:
        return self._held(self._resolved(ConfigValue(place.id, item), keeps_arrays=True), level + 1)

    def _looked_up(self, place_id: str, reference: str) -> Any:
        path = reference.replace("#", "::")
        if not _REFERENCE.fullmatch(path):
            advice = "write @a::b with the whole path from the top, of letters, digits and _"
            raise self.invalid(
                place_id, f"is not a reference that ctflow follows, {short(reference)}: {advice}", "reference"
            )
        value: Any = self._document
        for part in path[1:].split("::"):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and _is_index(part) and int(part) < len(value):
                value = value[int(part)]
            else:
                raise self.invalid(place_id, f"refers to {short(reference)}, which is not in the file", "reference")
        return value

    def referred(self, place_id: str, reference: str) -> ConfigValue:
        """What a reference names, with no other one followed.

        Args:
            place_id: Where the reference is, for messages.
            reference: With the leading `@`.

        Raises:
            BundleInvalid: The file does not have it.
        """
        return ConfigValue(reference[1:].replace("::", "#"), self._looked_up(place_id, reference))

    def plain(self, place: ConfigValue) -> Any:
        """A value with every reference inside it replaced: numbers, strings, booleans, None, lists and dicts."""
        return self._plain(place, 0)

    def _plain(self, place: ConfigValue, level: int) -> Any:
        self._nodes_left -= 1
        if level > MOST_LEVELS or self._nodes_left < 0:
            raise self.invalid(place.id, "is nested too deeply or too large")
        value = self.resolved(place).value
        if isinstance(value, list):
            return [self._plain(ConfigValue(f"{place.id}#{i}", item), level + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise self.invalid(
                    place.id, "is an object to construct; ctflow accepts only numbers, words and lists of them here"
                )
            for key in value:
                if not isinstance(key, str):
                    raise self.invalid(place.id, f"has the key {short(key)}, which is no word")
                if "#" in key or "::" in key:  # MONAI would read it as a path, here and in references
                    raise self.invalid(f"{place.id}#{key}", "has a separator in its name", "override")
            return {key: self._plain(ConfigValue(f"{place.id}#{key}", item), level + 1) for key, item in value.items()}
        return value


def is_disabled(config: Config, place: ConfigValue) -> bool:
    """Whether an item of a list says `_disabled_: true` (words count as in MONAI)."""
    if not isinstance(place.value, Mapping) or "_disabled_" not in place.value:
        return False
    value = config.resolved(ConfigValue(f"{place.id}#_disabled_", place.value["_disabled_"])).value
    if isinstance(value, str):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise config.invalid(f"{place.id}#_disabled_", f"must be true or false, not {short(value)}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a plausible size for a configuration."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 10


def is_same(given: Any, value: Any) -> bool:
    """Equal and of the same type, except 1 and 1.0: true is not 1."""
    if isinstance(given, NameValue):
        return bool(value == f"${given}")
    if isinstance(given, bool) or isinstance(value, bool) or value is None:
        return given is value
    if given is None or isinstance(given, dict) or isinstance(value, dict):
        return type(given) is type(value) and bool(given == value)
    if isinstance(given, list) and isinstance(value, list):
        return len(given) == len(value) and all(is_same(a, b) for a, b in zip(given, value, strict=True))
    return type(given) in (type(value), int, float) and bool(given == value)


def short(value: Any) -> str:
    """A value in a few characters, however deep or long it is."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
