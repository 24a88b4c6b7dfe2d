"""A distribution of positive numbers in bounded memory, whatever their order."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from typing import Any

_A_DECADE = 24  # bins: a value is known to within 5 %
_MOST_SHOWN = 28  # bars of a chart


class LogDistribution:
    """Counts in bins of equal width on a logarithmic scale."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()
        self.count = 0
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value; 0 and less only in `count`."""
        self.count += 1
        if value > 0:
            self.total += value
            self._counts[math.floor(math.log10(value) * _A_DECADE + 1e-9)] += 1

    def quantile(self, share: float) -> float | None:
        """The value below which a share of the positive values lie, to within 5 %; None without any."""
        wanted, seen = share * self._counts.total(), 0
        for place in sorted(self._counts):
            seen += self._counts[place]
            if seen >= wanted:
                return float(f"{10 ** ((place + 0.5) / _A_DECADE):.2g}")
        return None

    @property
    def bins(self) -> list[dict[str, Any]]:
        """The bins of a chart, as wide as they must be and without gaps: "low", "high", "count"."""
        if not self._counts:
            return []
        first, last = min(self._counts), max(self._counts)
        joined = 2
        while last // joined - first // joined >= _MOST_SHOWN:
            joined *= 2
        merged: Counter[int] = Counter()
        for place, count in self._counts.items():
            merged[place // joined] += count
        step = joined / _A_DECADE
        return [
            {"low": 10 ** (n * step), "high": 10 ** ((n + 1) * step), "count": merged[n]}
            for n in range(first // joined, last // joined + 1)
        ]

    @property
    def document(self) -> dict[str, Any]:
        """What a page says of it."""
        return {
            "count": self._counts.total(),
            "median": self.quantile(0.5),
            "low": self.quantile(0.05),
            "high": self.quantile(0.95),
            "bins": self.bins,
        }


class Smallest:
    """The smallest entries of those that were added.

    Args:
        limit: How many are kept.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.entries: list[Any] = []

    def add(self, entry: Any) -> None:
        """Keep an entry, if it is one of the smallest."""
        if len(self.entries) < self._limit or entry < self.entries[-1]:
            insort(self.entries, entry)
            del self.entries[self._limit :]
