"""Conditions on the measurements of a result."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ctflow.settings.schema import Group, Key, Text, real, whole

_MOST_ML = 100_000.0
_MOST_FINDINGS = 1_000_000


@dataclass(frozen=True)
class Millilitres(Group):
    """Millilitres, from `min` to `max`, both included."""

    min: Annotated[float, real(0, _MOST_ML), Key("At least this.")] = 0.0
    max: Annotated[float, real(0, _MOST_ML), Key("At most this.")] = _MOST_ML

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")


@dataclass(frozen=True)
class NumberOfFindings(Group):
    """A number of findings, from `min` to `max`, both included."""

    min: Annotated[int, whole(0, _MOST_FINDINGS), Key("At least this.")] = 0
    max: Annotated[int, whole(0, _MOST_FINDINGS), Key("At most this.")] = _MOST_FINDINGS

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"min {self.min} is above max {self.max}")


@dataclass(frozen=True)
class When(Group):
    """Which results go to a destination: all whose measurements meet every condition."""

    volume_ml: Annotated[
        Millilitres | None, Key("Marked volume of the result, all segments together, such as `{min: 1}`.")
    ] = None
    findings: Annotated[NumberOfFindings | None, Key("Number of its findings, such as `{min: 1}`.")] = None
    segments: Annotated[
        tuple[Text, ...],
        Key("Only segments with one of these labels count; without other conditions, one of them must be marked."),
    ] = ()
    model: Annotated[tuple[Text, ...], Key("The model has one of these names.")] = ()
