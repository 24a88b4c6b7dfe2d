"""What expressions may hold, and the bounds that every step keeps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_STEPS = 50_000  # of all expressions of a configuration: the zoo's largest one takes 600
MOST_ITEMS = 20_000  # of a list with all that it holds, characters of a text
ITEMS_PER_STEP = 20
LARGEST_NUMBER = 1e18
LARGEST_EXPONENT = 64
DEEPEST = 40  # nested parts of one expression, and expressions that refer to one another


class NotUnderstood(Exception):
    """A part of an expression that is outside the subset, or cannot be computed.

    Args:
        part: The part's text.
        why: What is wrong with it.
    """

    def __init__(self, part: str, why: str = "is not understood") -> None:
        super().__init__(part, why)
        self.part, self.why = part, why


class NameValue(str):
    """A dotted name that stands for itself, such as an element type: `torch.float32`."""

    __slots__ = ()


class ArrayValue(list[Any]):
    """The numbers of an array that an expression makes. NumPy's arithmetic is not a list's, so they take none."""

    def __getitem__(self, at: Any) -> Any:
        found = super().__getitem__(at)
        return ArrayValue(found) if isinstance(at, slice) else found


def array_value(items: list[Any] | tuple[Any, ...]) -> ArrayValue:
    """Lists within lists as an array."""
    return ArrayValue(array_value(item) if isinstance(item, list | tuple) else item for item in items)


@dataclass(frozen=True, eq=False)
class Held:
    """A part of the configuration that describes an object; expressions may move it, not look into it."""

    node: Mapping[str, Any]


class Budget:
    """Steps that are left for all expressions of a configuration."""

    def __init__(self) -> None:
        self._left = MOST_STEPS

    def spend(self, steps: int = 1) -> None:
        """Count steps.

        Raises:
            NotUnderstood: None are left.
        """
        self._left -= steps
        if self._left < 0:
            raise NotUnderstood("", f"takes more than {MOST_STEPS} steps")


def size_of(value: Any) -> int:
    """Items of a value and of all that it holds, characters of texts; more than `MOST_ITEMS` is not counted on.

    A list that holds one large list many times takes no memory, but comparing it would take forever.
    """
    count, left = 0, [value]
    while left and count <= MOST_ITEMS:
        item = left.pop()
        count += 1
        if isinstance(item, int | float) and not _is_sane(item):
            return MOST_ITEMS + 1
        if isinstance(item, str):
            count += len(item)
        elif isinstance(item, list | tuple | set):
            if len(item) > MOST_ITEMS:
                return MOST_ITEMS + 1
            left.extend(item)
        elif isinstance(item, range):
            count += len(item)
        elif isinstance(item, dict):
            left.extend(item.keys())
            left.extend(item.values())
    return count


def _is_sane(value: float) -> bool:
    return (isinstance(value, int) or math.isfinite(value)) and abs(value) <= LARGEST_NUMBER


def is_numeric(value: Any) -> bool:
    """A whole or decimal number or a truth value."""
    return isinstance(value, int | float)


def is_text(value: Any) -> bool:
    """A text that is no name."""
    return isinstance(value, str) and not isinstance(value, NameValue)


def as_literal(value: Any, *, keeps_arrays: bool = False) -> Any:
    """A result as a configuration holds it: lists for tuples and arrays, the described object for what holds it.

    Args:
        value: The result.
        keeps_arrays: Whether another expression takes it.

    Raises:
        NotUnderstood: It is a set or a range, or contains a text that a configuration would read as a reference.
    """
    if isinstance(value, Held):
        return value.node
    if isinstance(value, list | tuple | range):
        return [as_literal(item, keeps_arrays=keeps_arrays) for item in value]
    if isinstance(value, dict):
        if not all(isinstance(key, str | int) for key in value):
            raise NotUnderstood("", "gives an object whose keys are not words or numbers")
        return {key: as_literal(item, keeps_arrays=keeps_arrays) for key, item in value.items()}
    if hasattr(value, "tolist") and not keeps_arrays:
        if value.size > MOST_ITEMS:
            raise NotUnderstood("", f"gives an array of more than {MOST_ITEMS} numbers")
        return value.tolist()
    if isinstance(value, set):
        raise NotUnderstood("", "gives a set")
    if is_text(value) and value[:1] in ("@", "$", "%"):
        raise NotUnderstood("", f"gives a text that begins with {value[0]}")
    return value
