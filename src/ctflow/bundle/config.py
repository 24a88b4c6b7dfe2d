"""A bundle's configuration as data: literals and `@references`; expressions are never evaluated."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ctflow.errors import BundleInvalid

MOST_REFERENCES = 32  # a reference to a reference to ...
MOST_LEVELS = 16
MOST_NODES = 100_000  # of all values that are needed, so that references to references cannot multiply
LARGEST_NUMBER = 1e9
_OWN_KEYS = frozenset({"_target_", "_disabled_", "_requires_", "_desc_", "_mode_"})
MISSING: Any = object()
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2
_SHORT.maxstring = 60


@dataclass(frozen=True)
class Place:
    """A value of the configuration.

    Attributes:
        id: Where it stands, for messages: keys joined by `#`.
        value: The value; a string that starts with `@`, `$` or `%` is not resolved yet.
    """

    id: str
    value: Any


class Config:
    """One configuration file.

    Args:
        document: The parsed JSON object.
        file: The file's path inside the bundle, for messages.
    """

    def __init__(self, document: Mapping[str, Any], file: str) -> None:
        self._document = document
        self.file = file
        self._nodes_left = MOST_NODES

    def invalid(self, place_id: str, reason: str) -> BundleInvalid:
        """The error for a place of this file."""
        return BundleInvalid(f"{self.file}: {place_id[:200]} {reason}")

    def top(self, key: str) -> Place:
        """A top-level value, with references followed.

        Raises:
            BundleInvalid: It is absent or cannot be known without executing the bundle.
        """
        if key not in self._document:
            raise BundleInvalid(f"{self.file} has no key {key!r}, which ctflow needs")
        return self.resolved(Place(key, self._document[key]))

    def resolved(self, place: Place) -> Place:
        """Follow references until a literal is reached; the place keeps its id."""
        value = place.value
        seen: list[str] = []
        while isinstance(value, str) and value[:1] in ("@", "$", "%"):
            if value[0] != "@":
                kind = "an expression" if value[0] == "$" else "a macro"
                by = f" (by {short(seen[-1])})" if seen else ""
                raise self.invalid(
                    place.id,
                    f"is {kind}{by}, {short(value)}: ctflow executes nothing of a bundle; write the value itself",
                )
            if value in seen:
                raise self.invalid(place.id, f"is a reference that leads back to itself, {short(value)}")
            if len(seen) >= MOST_REFERENCES:
                raise self.invalid(place.id, f"follows more than {MOST_REFERENCES} references")
            seen.append(value)
            value = self._looked_up(place.id, value)
        return Place(place.id, value)

    def _looked_up(self, place_id: str, reference: str) -> Any:
        value: Any = self._document
        for part in reference[1:].replace("#", "::").split("::"):
            if isinstance(value, Mapping) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isascii() and part.isdigit() and int(part[:9]) < len(value):
                value = value[int(part[:9])]
            else:
                raise self.invalid(place_id, f"refers to {short(reference)}, which is not in the file")
        return value

    def plain(self, place: Place) -> Any:
        """A value with every reference inside it replaced: numbers, strings, booleans, None, lists and dicts."""
        return self._plain(place, 0)

    def _plain(self, place: Place, level: int) -> Any:
        self._nodes_left -= 1
        if level > MOST_LEVELS or self._nodes_left < 0:
            raise self.invalid(place.id, "is nested too deeply or too large")
        value = self.resolved(place).value
        if isinstance(value, list):
            return [self._plain(Place(f"{place.id}#{i}", item), level + 1) for i, item in enumerate(value)]
        if isinstance(value, Mapping):
            if "_target_" in value:
                raise self.invalid(
                    place.id, "is an object to be made; ctflow takes numbers, words and lists of them here"
                )
            return {key: self._plain(Place(f"{place.id}#{key}", item), level + 1) for key, item in value.items()}
        return value


class Component:
    """A configured object: its class by name and its arguments.

    Args:
        config: The file.
        place: Where it stands; its value is resolved.
        package: The package that the class must be of, for example "monai.transforms".

    Raises:
        BundleInvalid: It is no object with a `_target_` of that package.
    """

    def __init__(self, config: Config, place: Place, package: str) -> None:
        if not isinstance(place.value, Mapping):
            raise config.invalid(place.id, f"must be an object with a _target_, not {short(place.value)}")
        self.config = config
        self.id = place.id
        self._values = place.value
        target = self.get("_target_")
        if not isinstance(target, str) or not target:
            raise config.invalid(f"{place.id}#_target_", "must name a class")
        name = target.rpartition(".")[2]
        if not name.isidentifier() or (name != target and not target.startswith(f"{package}.")):
            raise config.invalid(f"{place.id}#_target_", f"is {short(target)}; ctflow takes classes of {package} only")
        self.target = name
        if "_mode_" in self._values and self.get("_mode_") != "default":
            raise config.invalid(f"{place.id}#_mode_", 'must be "default"')

    @property
    def names(self) -> list[str]:
        """Names of the arguments given."""
        return [name for name in self._values if name not in _OWN_KEYS]

    def refused(self, name: str, reason: str) -> BundleInvalid:
        """The error for an argument."""
        return self.config.invalid(f"{self.id}#{name}", reason)

    def place(self, name: str) -> Place:
        """An argument, unresolved."""
        return Place(f"{self.id}#{name}", self._values[name])

    def get(self, name: str, default: Any = MISSING) -> Any:
        """An argument with its references replaced.

        Raises:
            BundleInvalid: It is absent and has no default, or cannot be known without executing the bundle.
        """
        if name not in self._values:
            if default is MISSING:
                raise self.refused(name, f"is missing; {getattr(self, 'target', 'an object')} needs it")
            return default
        return self.config.plain(self.place(name))

    def number(self, name: str, default: Any = MISSING) -> float:
        """A finite number."""
        value = _alone(self.get(name, default))
        if not is_number(value):
            raise self.refused(name, f"must be a number, not {short(value)}")
        return float(value)

    def number_or_none(self, name: str, default: Any = MISSING) -> float | None:
        """A finite number or null."""
        return None if _alone(self.get(name, default)) is None else self.number(name, default)

    def integer(self, name: str, low: int, high: int, default: Any = MISSING) -> int:
        """A whole number in [low, high]."""
        value = _alone(self.get(name, default))
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.refused(name, f"must be a whole number from {low} to {high}, not {short(value)}")
        return value

    def flag(self, name: str, default: Any = MISSING) -> bool:
        """True or false."""
        value = _alone(self.get(name, default))
        if not isinstance(value, bool):
            raise self.refused(name, f"must be true or false, not {short(value)}")
        return value

    def demand(self, **allowed: tuple[Any, ...]) -> None:
        """Each argument, where given, must have one of the values: the others change the result and are not done."""
        for name, values in allowed.items():
            given = self.get(name, values[0])
            items = given if isinstance(given, list) and given else [given]
            for item in items:
                if not any(item is value or (type(item) is not bool and item == value) for value in values):
                    words = " or ".join(short(value) for value in values)
                    raise self.refused(name, f"is {short(given)}; ctflow does only {words}")

    def demand_known(self, known: Iterable[str]) -> None:
        """No argument but these."""
        for name in self.names:
            if name not in known:
                raise self.refused(name, f"is an argument that ctflow does not know of {self.target}")


def is_disabled(config: Config, place: Place) -> bool:
    """Whether an item of a list says `_disabled_: true` (words count as MONAI counts them)."""
    if not isinstance(place.value, Mapping) or "_disabled_" not in place.value:
        return False
    value = config.resolved(Place(f"{place.id}#_disabled_", place.value["_disabled_"])).value
    if isinstance(value, str):
        return value.strip().lower() == "true"
    if not isinstance(value, bool):
        raise config.invalid(f"{place.id}#_disabled_", f"must be true or false, not {short(value)}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a finite number of a size that a configuration needs."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= LARGEST_NUMBER


def _alone(value: Any) -> Any:
    """MONAI's dictionary transforms take one value for each key; ctflow has one key."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def short(value: Any) -> str:
    """A value in a few characters, however deep or long it is."""
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to print thousands of digits
        return "a huge number"
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
