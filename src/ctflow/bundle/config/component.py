"""A configured object: its class by name and its arguments, each read, limited or rejected by key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ctflow.bundle.config.config import MISSING, Config, ConfigValue, is_disabled, is_number, is_same, short
from ctflow.bundle.config.signatures import REQUIRED, Signature
from ctflow.core.errors import BundleInvalid

_OWN_KEYS = frozenset({"_target_", "_disabled_", "_requires_", "_desc_", "_mode_"})


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
        wrong = next((key for key in place.value if not isinstance(key, str)), None)
        if wrong is not None:
            raise config.invalid(place.id, f"has the key {short(wrong)}, which is no word")
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
        if any(not is_same(value, values[0]) for value in values[1:]):
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
            if not any(is_same(found, value) for value in values):
                words = " or ".join(short(value) for value in values)
                raise self.refused(name, f"is {short(found)}; ctflow implements only {words}")
