"""When rows were committed, and how busy GPUs were: counts of a few seconds, joined to as many bins as fit."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

_GRAIN_S = 5  # what is kept; a cohort of a day has 17,000 of them
_PAUSE_S = 3600  # a longer one is left out of the axis: the cohort was not being computed
_MOST_PAUSES = 8
_MOST_BINS = 96
_WIDTHS_S = (5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400, 7 * 86400)


class Timeline:
    """Commits over time."""

    def __init__(self) -> None:
        self._grains: dict[int, list[float]] = {}  # good rows, other rows, sum of GPU shares, how many of them

    def add(self, finished: str, gpu_busy: float | None, *, is_good: bool) -> None:
        """Count a commit.

        Args:
            finished: As of `RowOutcome.finished`; another text is not counted.
            gpu_busy: As of `RowOutcome.gpu_busy`.
            is_good: Whether the row has a result.
        """
        at = seconds_of_utc(finished)
        if at is None:
            return
        grain = self._grains.setdefault(at // _GRAIN_S, [0, 0, 0, 0])
        grain[0 if is_good else 1] += 1
        if gpu_busy is not None:
            grain[2] += gpu_busy
            grain[3] += 1

    @property
    def active_s(self) -> float:
        """Seconds from the first commit to the last, without pauses."""
        return float(sum(last - first for first, last in self._sessions()) * _GRAIN_S)

    @property
    def document(self) -> dict[str, Any]:
        """What a page draws: "width_s" and "bins", in which None stands for a pause."""
        sessions = list(self._sessions())
        span = sum(last - first + 1 for first, last in sessions) * _GRAIN_S
        rest = max(_MOST_BINS - 2 * len(sessions), 1)
        width = next((each for each in _WIDTHS_S if span / each <= rest), _WIDTHS_S[-1])
        while span / width > rest:
            width *= 2
        return {"width_s": width, "bins": list(self._bins(sessions, width))}

    def _sessions(self) -> Iterator[tuple[int, int]]:
        """First and last grain of each time without a long pause."""
        places = sorted(self._grains)
        if not places:
            return
        gaps = [(later - earlier, earlier, later) for earlier, later in pairwise(places)]
        pauses = [each for each in gaps if each[0] * _GRAIN_S > _PAUSE_S]
        cut = sorted(sorted(pauses, reverse=True)[:_MOST_PAUSES], key=lambda each: each[1])
        first = places[0]
        for _, earlier, later in cut:
            yield first, earlier
            first = later
        yield first, places[-1]

    def _bins(self, sessions: list[tuple[int, int]], width: int) -> Iterator[dict[str, Any] | None]:
        sums: dict[int, list[float]] = {}
        for grain, counts in self._grains.items():
            at = grain * _GRAIN_S // width
            sums[at] = [one + other for one, other in zip(sums.get(at, [0, 0, 0, 0]), counts, strict=True)]
        before: int | None = None
        for first, last in [tuple(each * _GRAIN_S // width for each in session) for session in sessions]:
            if before is not None and first > before + 1:
                yield None
            for at in range(first if before is None else max(first, before + 1), last + 1):
                good, other, busy, known = sums.get(at, [0, 0, 0, 0])
                mean = round(busy / known, 4) if known else None
                yield {"at": utc_of_seconds(at * width), "good": int(good), "other": int(other), "gpu_busy": mean}
            before = last


def seconds_of_utc(text: str) -> int | None:
    """Seconds since 1970 of a time such as 2026-01-31T12:00:00Z; None of another text."""
    try:
        return int(datetime.fromisoformat(text.removesuffix("Z")).replace(tzinfo=UTC).timestamp())
    except ValueError:
        return None


def utc_of_seconds(seconds: int) -> str:
    """The time of seconds since 1970, as of `RowOutcome.finished`."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
