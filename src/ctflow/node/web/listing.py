"""The list of series that an address asks for: a state, a search, a time, a study, a page of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from urllib.parse import urlencode

from ctflow.node.journal.records import SeriesRecord, SeriesState
from ctflow.node.journal.search import SeriesSearch
from ctflow.node.web import views

_ATTENTION = "attention"  # set aside or failed
SINCE: Mapping[str, tuple[str, float | None]] = {
    "": ("At any time", None),
    "hour": ("In the last hour", 3600.0),
    "day": ("In the last day", 86400.0),
    "week": ("In the last week", 7 * 86400.0),
}
LONGEST_TEXT = 64  # as many letters as DICOM allows an ID


@dataclass(frozen=True)
class Listing:
    """What an address asks for; every field is a parameter of it, and empty if absent.

    Attributes:
        state: A state of the journal, or "attention" for those that a person has to look at.
        q: Text that is searched for.
        since: A key of `SINCE`.
        study: Digest of a study's UID.
        model: Name of a model in the settings.
        before: Where a page of the list begins.
        refresh: "1" where the page loads itself again.
    """

    state: str = ""
    q: str = ""
    since: str = ""
    study: str = ""
    model: str = ""
    before: str = ""
    refresh: str = ""

    @classmethod
    def from_query(cls, query: Mapping[str, str]) -> Listing | None:
        """What the parameters of an address ask for; None if one of them has no meaning."""
        found = cls(**{each.name: query.get(each.name, "") for each in fields(cls)})
        found = replace(found, q=" ".join(found.q.split())[:LONGEST_TEXT], refresh="1" if found.refresh == "1" else "")
        known = found.state in ("", _ATTENTION, *views.STATES) and found.since in SINCE
        named = re.fullmatch("[0-9a-f]{0,12}", found.study) and re.fullmatch("[A-Za-z0-9_-]{0,32}", found.model)
        plain = named and found.place is not None
        return found if known and plain else None

    @property
    def label(self) -> str:
        """The state in words."""
        return label_of_state(self.state)

    @property
    def is_search(self) -> bool:
        """Whether only some of the series in a state are wanted."""
        return bool(self.q or self.since or self.study or self.model)

    @property
    def place(self) -> tuple[float, str] | tuple[()] | None:
        """Time and key after which the page begins; empty for the first page, None if the address is invalid."""
        if not self.before:
            return ()
        match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,12})?)_([0-9a-f]{32})", self.before, re.ASCII)
        return (float(match[1]), match[2]) if match else None

    def search(self, now: float) -> SeriesSearch:
        """What the journal is asked."""
        states: tuple[SeriesState, ...] = views.ATTENTION
        if self.state != _ATTENTION:
            states = tuple(state for state in views.STATES if state == self.state)
        seconds = SINCE[self.since][1]
        return SeriesSearch(states, self.q, None if seconds is None else now - seconds, self.study, self.model)

    def href(self, **changes: str) -> str:
        """The address of this list with other parameters, from its first page on."""
        changed = replace(self, **{"before": "", **changes})
        values = {each.name: getattr(changed, each.name) for each in fields(changed)}
        query = urlencode({name: value for name, value in values.items() if value})
        return f"/?{query}" if query else "/"


def label_of_state(state: str) -> str:
    """A state of the list in words; "All" for none."""
    if state == _ATTENTION:
        return "Need a look"
    return next((shown.label for shown in views.STATES.values() if shown.name == state), "All")


def place_after(series: SeriesRecord) -> str:
    """The place after a series, for `Listing.place`; `repr` keeps each time exact."""
    return f"{series.last_at!r}_{series.key}"
