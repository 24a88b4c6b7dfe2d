"""A bundle's configuration as data: literals and `@references`; expressions are never evaluated."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.bundle.documents import merged_document
from ctflow.bundle.signatures import REQUIRED, Signature
from ctflow.core.errors import BundleInvalid

MOST_REFERENCES = 32  # in one chain of references
MOST_LEVELS = 16
MOST_NODES = 100_000  # of all needed values, so that nested references cannot multiply
LARGEST_NUMBER = 1e9
_OWN_KEYS = frozenset({"_target_", "_disabled_", "_requires_", "_desc_", "_mode_"})
_REFERENCE = re.compile(r"@\w+(?:::\w+)*")  # MONAI's, without the relative ones
_RELATIVE = re.compile(r"[@%]::")
MISSING: Any = object()
_SHORT = reprlib.Repr()
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
    """One configuration file.

    Args:
        document: The parsed JSON object; its overrides are applied as in MONAI.
        file: The file's path inside the bundle, for messages.

    Raises:
        BundleInvalid: An override cannot be applied.
    """

    def __init__(self, document: Mapping[str, Any], file: str) -> None:
        self._document = merged_document(document, file)
        self.file = file
        self._nodes_left = MOST_NODES

    def invalid(self, place_id: str, problem: str, reason: str = "value") -> BundleInvalid:
        """The error for a location in this file; `reason` is one of `BundleInvalid.REASONS`."""
        return BundleInvalid(f"{self.file}: {place_id[:200]} {problem}", reason=reason)

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
        value = place.value
        seen: list[str] = []
        while isinstance(value, str) and value[:1] in ("@", "$", "%"):
            if value[0] != "@":
                kind = "an expression" if value[0] == "$" else "a macro"
                by = f" (by {short(seen[-1])})" if seen else ""
                raise self.invalid(
                    place.id,
                    f"is {kind}{by}, {short(value)}: ctflow executes nothing of a bundle; write the value itself",
                    "expression",
                )
            if value in seen:
                raise self.invalid(place.id, f"is a reference to itself, {short(value)}", "reference")
            if len(seen) >= MOST_REFERENCES:
                raise self.invalid(place.id, f"follows more than {MOST_REFERENCES} references", "reference")
            seen.append(value)
            value = self._looked_up(place.id, value)
        if isinstance(value, str):
            # MONAI replaces every "#" in a text by "::", whatever its purpose.
            value = value.replace("#", "::")
            if _RELATIVE.search(value):
                raise self.invalid(
                    place.id, f"contains a relative reference, {short(value)}: write the whole path", "reference"
                )
        return ConfigValue(place.id, value)

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
                if "#" in key or "::" in key:  # MONAI would read it as a path, here and in references
                    raise self.invalid(f"{place.id}#{key}", "has a separator in its name", "override")
            return {key: self._plain(ConfigValue(f"{place.id}#{key}", item), level + 1) for key, item in value.items()}
        return value


class Component:
    """A configured object: its class by name and its arguments.

    Args:
        config: The file.
        place: Its location; its value is resolved.
        package: The package that must contain the class, for example "monai.transforms".

    Raises:
        BundleInvalid: It is no object with a `_target_` in that package, is disabled, or requires executing something
            first.
    """

    def __init__(self, config: Config, place: ConfigValue, package: str) -> None:
        if not isinstance(place.value, Mapping):
            raise config.invalid(place.id, f"must be an object with a _target_, not {short(place.value)}", "target")
        self.config = config
        self.id = place.id
        self._values = place.value
        self._package = package
        target = self.get("_target_")
        if not isinstance(target, str) or not target:
            raise self.refused("_target_", "must name a class", "target")
        self.path = target
        name = target.rpartition(".")[2]
        if not name.isidentifier() or (name != target and not target.startswith(f"{package}.")):
            raise self.refused("_target_", f"is {short(target)}; ctflow accepts only classes of {package}", "target")
        self.target = name
        if "_mode_" in self._values and self.get("_mode_") != "default":
            raise self.refused("_mode_", 'must be "default"')
        if is_disabled(config, place):
            raise self.refused("_disabled_", "is true, but ctflow needs it")
        if self.get("_requires_", None) not in (None, [], {}):
            raise self.refused("_requires_", "requires code to be executed first; ctflow executes nothing")
        self.get("_desc_", None)

    def demand_module(self, module: str) -> None:
        """Require that a class named by its full path is where MONAI has it: its package or its defining module."""
        if self.path not in {self.target, f"{self._package}.{self.target}", f"{module}.{self.target}"}:
            raise self.refused(
                "_target_", f"is {short(self.path)}, which MONAI does not have; write {self.target}", "target"
            )

    def demand_signature(self, signature: Signature) -> None:
        """Require only arguments of the class, all that it needs, and only values that ctflow supports."""
        self.demand_arguments(signature)
        for name, values in signature.only.items():
            self.demand(name, values)

    def demand_arguments(self, signature: Signature) -> None:
        """Require only arguments of the class, and all that it needs."""
        self.demand_module(signature.module)
        for name in self.names:
            if name not in signature.arguments:
                raise self.refused(name, f"is an argument of {self.target} that ctflow does not know", "argument")
        for name, default in signature.read.items():
            if default is REQUIRED and name not in self._values:
                raise self._missing(name)

    @property
    def names(self) -> list[str]:
        """Names of the given arguments."""
        return [name for name in self._values if name not in _OWN_KEYS]

    def refused(self, name: str, problem: str, reason: str = "value") -> BundleInvalid:
        """The error for an argument; `reason` is one of `BundleInvalid.REASONS`."""
        return self.config.invalid(f"{self.id}#{name}", problem, reason)

    def _missing(self, name: str) -> BundleInvalid:
        return self.refused(name, f"is missing; {getattr(self, 'target', 'an object')} needs it", "argument")

    def place(self, name: str) -> ConfigValue:
        """An argument, unresolved."""
        return ConfigValue(f"{self.id}#{name}", self._values[name])

    def given(self, name: str) -> list[ConfigValue]:
        """The values of an argument, unresolved: one, or for a transform one per key that it acts on."""
        return [self.place(name)]

    def get(self, name: str, default: Any = MISSING) -> Any:
        """An argument with its references replaced.

        Raises:
            BundleInvalid: It is absent and has no default, or cannot be known without executing the bundle.
        """
        if name not in self._values:
            if default is MISSING:
                raise self._missing(name)
            return default
        values = [self.config.plain(place) for place in self.given(name)]
        if any(not _is_same(value, values[0]) for value in values[1:]):
            raise self.refused(name, f"has several values, {short(values)}; ctflow accepts one for all keys")
        return values[0]

    def number(self, name: str, default: Any = MISSING) -> float:
        """A finite number."""
        value = self.get(name, default)
        if not is_number(value):
            raise self.refused(name, f"must be a number, not {short(value)}")
        return float(value)

    def number_or_none(self, name: str, default: Any = MISSING) -> float | None:
        """A finite number or null."""
        return None if self.get(name, default) is None else self.number(name, default)

    def integer(self, name: str, low: int, high: int, default: Any = MISSING) -> int:
        """A whole number in [low, high]."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refused(name, f"must be a whole number from {low} to {high}, not {short(value)}")
        return value

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(name, f"must be true or false, not {short(value)}")
        return value

    def demand(self, name: str, values: tuple[Any, ...]) -> None:
        """Require one of the values for a given argument: others change the result and are not supported."""
        if name not in self._values:
            return
        for place in self.given(name):
            if isinstance(place.value, str) and place.value in values:
                continue  # an expression recognized by its text; it is not evaluated
            found = self.config.plain(place)
            if not any(_is_same(found, value) for value in values):
                words = " or ".join(short(value) for value in values)
                raise self.refused(name, f"is {short(found)}; ctflow implements only {words}")


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


def _is_same(given: Any, value: Any) -> bool:
    """Equal and of the same type, except 1 and 1.0: true is not 1."""
    if isinstance(given, bool) or isinstance(value, bool) or value is None:
        return given is value
    if given is None or isinstance(given, dict) or isinstance(value, dict):
        return type(given) is type(value) and bool(given == value)
    if isinstance(given, list) and isinstance(value, list):
        return len(given) == len(value) and all(_is_same(a, b) for a, b in zip(given, value, strict=True))
    return type(given) in (type(value), int, float) and bool(given == value)


def short(value: Any) -> str:
    """A value in a few characters, however deep or long it is."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python cannot print thousands of digits
        return "a huge number"
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
