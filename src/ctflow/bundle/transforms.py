"""A list of the bundle's transforms, and the keys for which ctflow has data."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ctflow.bundle.config import Component, Config, ConfigValue, is_disabled, short
from ctflow.bundle.config.signatures import COMPOSE, FLOAT32, HELD, Signature

IMAGE = "image"  # MONAI's evaluator passes it to the network, and
PREDICTION = "pred"  # stores the network's output under this key
MOST_TRANSFORMS = 200
MOST_KEYS = 50
_PACKAGE = "monai.transforms"
_VISTA = "monai.apps.vista3d.transforms"


class Transform(Component):
    """A dictionary transform of a list.

    Args:
        config: The file.
        place: Its location; its value is resolved.
    """

    def __init__(self, config: Config, place: ConfigValue) -> None:
        self._per_key: frozenset[str] = frozenset()
        self._count = 0
        self._numbers: list[int] = []
        self.acts_on: list[str] = []
        target = place.value.get("_target_") if isinstance(place.value, dict) else None
        is_vista = isinstance(target, str) and target.startswith(f"{_VISTA}.")
        super().__init__(config, place, _VISTA if is_vista else _PACKAGE)
        self.target = _usual_name(self.target)

    def demand_module(self, module: str) -> None:
        """As for a component, with each of MONAI's three names for a dictionary transform."""
        name = self.path.rpartition(".")[2]
        if self.path not in {name, f"{_PACKAGE}.{name}", f"{module}.{name}"}:
            raise self.refused("_target_", f"is {short(self.path)}, which MONAI does not have; write {name}", "target")

    def read_keys(self, signature: Signature, present: set[str]) -> None:
        """Find the present data that the transform acts on, and check its arguments.

        Args:
            signature: The class's arguments.
            present: Keys of the data before the transform.

        Raises:
            BundleInvalid: A key has no data and `allow_missing_keys` is not true, or an argument is not supported.
        """
        self._per_key = signature.per_key
        keys = self.key_list("keys")
        self._count = len(keys)
        if len(set(keys)) < len(keys):
            raise self.refused("keys", f"names a key twice, {short(keys)}", "keys")
        self._numbers = [number for number, key in enumerate(keys) if key in present]
        self.acts_on = [keys[number] for number in self._numbers]
        may_lack = "allow_missing_keys" in signature.arguments and self.flag("allow_missing_keys", False)
        lacking = [key for key in keys if key not in present]
        if lacking and "allow_missing_keys" in signature.arguments and not may_lack:
            have = " and ".join(sorted(present)) or "nothing"
            raise self.refused(
                "keys",
                f"names {short(lacking[0])}, but there is only {have} then: leave it out, or set allow_missing_keys",
                "keys",
            )
        if "allow_missing_keys" not in signature.arguments:
            self._numbers = list(range(len(keys)))  # DeleteItemsd: the keys that a pattern matches are unknown
        if self._numbers:
            self.demand_signature(signature)
            return
        # It does nothing, but MONAI must be able to construct it.
        self.demand_arguments(signature)
        for name in signature.per_key.intersection(self.names):
            self.given(name)

    def key_list(self, name: str) -> list[str]:
        """An argument that is a key or a list of keys."""
        value = self.get(name)
        keys = value if isinstance(value, list) else [value]
        if not 1 <= len(keys) <= MOST_KEYS or not all(isinstance(key, str) for key in keys):
            raise self.refused(name, f"must be a key or a list of keys, not {short(value)}", "keys")
        return keys

    def given(self, name: str) -> list[ConfigValue]:
        """The values for the keys that the transform acts on, unresolved; a single one if it is for all keys."""
        place = self.place(name)
        if name not in self._per_key:
            return [place]
        found = self.config.resolved(place) if _is_reference(place.value) else place
        if not isinstance(found.value, list):
            return [place]
        if len(found.value) != self._count:
            raise self.refused(name, f"has {len(found.value)} values for {self._count} keys")
        return [ConfigValue(f"{place.id}#{number}", found.value[number]) for number in self._numbers]


def transforms_from_config(config: Config, key: str) -> Iterator[Transform]:
    """The transforms of a Compose that are not disabled, in their order.

    Args:
        config: configs/inference.json.
        key: The location of the Compose.

    Raises:
        BundleInvalid: It is no Compose, or not as ctflow supports it.
    """
    compose = Component(config, config.top(key), _PACKAGE)
    if compose.target != "Compose":
        raise compose.refused("_target_", f"is {compose.target}; ctflow reads a Compose", "target")
    compose.demand_signature(COMPOSE)
    if "transforms" not in compose.names:
        raise compose.refused("transforms", "is missing; Compose needs it", "argument")
    # The list itself may hold references; the content of its items is resolved one by one, and only where needed.
    place = config.resolved(compose.place("transforms"))
    if not isinstance(place.value, list) or len(place.value) > MOST_TRANSFORMS:
        raise compose.refused("transforms", f"must be a list of at most {MOST_TRANSFORMS} transforms")
    for number, item in enumerate(place.value):
        item_place = ConfigValue(f"{place.id}#{number}", item)
        found = config.resolved(item_place)
        # MONAI skips a disabled item only if it is in the list itself.
        if _is_reference(item) or not is_disabled(config, found):
            yield Transform(config, found)


def check_held(transform: Transform, present: set[str], types: tuple[Any, ...] = FLOAT32) -> None:
    """Check a transform that only changes how the data are held, and update the keys.

    Args:
        transform: One of `HELD`.
        present: Keys of the data before it; those that it deletes are removed.
        types: Element types, as text, that the data may be converted to.

    Raises:
        BundleInvalid: It would change data that ctflow reads, or an argument is unknown.
    """
    signature = HELD[transform.target]
    transform.read_keys(signature, present)
    if "dtype" in signature.read and transform.acts_on:
        transform.demand("dtype", types)
    if transform.target == "DeleteItemsd":
        nested = [key for key in transform.key_list("keys") if "." in key]
        if nested:
            raise transform.refused("keys", f"names a part of an item, {short(nested[0])}", "keys")
        present.difference_update(transform.acts_on)
    if transform.target == "SelectItemsd":
        present.intersection_update(transform.acts_on)


def _is_reference(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _usual_name(name: str) -> str:
    """MONAI has each dictionary transform under three names: Spacingd, SpacingD, SpacingDict."""
    for ending in ("Dict", "D"):
        if name.endswith(ending):
            return name[: -len(ending)] + "d"
    return name
