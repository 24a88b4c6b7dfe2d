"""A site's settings of what is removed from the data folder, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ctflow.settings.schema import Group, Key, Switch, real, size

_TB = 10**12
_CENTURY_DAYS = 36_500


@dataclass(frozen=True)
class Retention(Group):
    """What is removed from the data folder, and when; nothing unless a key says so."""

    instances_days: Annotated[
        float | None,
        real(0, _CENTURY_DAYS),
        Key("Days after which the received instances of a finished series are removed; never if omitted."),
    ] = None
    results_days: Annotated[
        float | None, real(0, _CENTURY_DAYS), Key("The same for the files of its results; never if omitted.")
    ] = None
    only_delivered: Annotated[
        Switch,
        Key(
            "Only series that are delivered or discarded; else also those that are set aside, have failed without a "
            "result, or have results that are sent nowhere."
        ),
    ] = True
    free_disk: Annotated[
        int | None,
        size(0, 1000 * _TB),
        Key(
            "Free disk space below which finished series are removed before their time, the oldest delivered first; "
            "more than `limits.free_disk`."
        ),
    ] = None
    events_days: Annotated[
        float | None,
        real(1, _CENTURY_DAYS),
        Key(
            "Days after which the journal forgets events, and series whose files are all removed; never if omitted. "
            "The log keeps its own copy."
        ),
    ] = None

    @property
    def removes(self) -> bool:
        """Whether anything is ever removed."""
        return any(
            each is not None for each in (self.instances_days, self.results_days, self.free_disk, self.events_days)
        )
