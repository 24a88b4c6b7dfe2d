"""Charts as inline SVG: colours are the page's, in light, dark and print; each bar says its figure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

_WIDTH, _HEIGHT = 620, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 34
_MOST_TICKS = 6
_NICE = (1, 2, 5, 10)
_DAY_S = 86400
_LETTER = 6.6  # pixels, of 12 pixels' type


class _Frame:
    """A chart's area: a scale of heights with its lines, and places along it.

    Args:
        count: How many places there are.
        top: The largest value.
        width: Of the whole chart.
        percent: Whether values are shares.
    """

    def __init__(self, count: int, top: float, width: int = _WIDTH, *, percent: bool = False) -> None:
        self.count, self.width, self.percent = max(count, 1), width, percent
        self.step = 0.25 if percent else _nice_step(top)
        self.top = 1.0 if percent else max(self.step * math.ceil(top / self.step), self.step)
        self.room = width - _LEFT - _RIGHT

    def x(self, place: float) -> float:
        return _LEFT + self.room * place / self.count

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value / self.top

    def lines(self) -> Iterator[Markup]:
        for number in range(round(self.top / self.step) + 1):
            value = number * self.step
            y = self.y(value)
            label = f"{100 * value:.0f} %" if self.percent else number_in_words(value)
            kind = "axis" if not number else "grid"
            yield Markup('<line class="{}" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                kind, _LEFT, self.width - _RIGHT, y, y
            )
            yield _text(_LEFT - 7, y + 4, label, "end")

    def bar(self, place: float, low: float, high: float, kind: str, title: str) -> Markup:
        gap = min(1.5, self.room / self.count * 0.15)
        width = self.room / self.count - gap
        return Markup(
            '<rect class="{}" x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"><title>{}</title></rect>'
        ).format(kind, self.x(place) + gap / 2, self.y(high), width, self.y(low) - self.y(high), title)


def commits_chart(timeline: Mapping[str, Any], *, is_wide: bool) -> Markup:
    """Rows committed over time, those without a result on top.

    Args:
        timeline: `ctflow.cohort.report.timeline.Timeline.document`.
        is_wide: Whether it takes the page's whole width.
    """
    bins = timeline["bins"]
    highest = max((each["good"] + each["other"] for each in bins if each), default=1)
    frame = _Frame(len(bins), highest, 2 * _WIDTH if is_wide else _WIDTH)
    parts = list(frame.lines())
    for place, each in enumerate(bins):
        if each is None:
            parts.append(_pause(frame, place))
            continue
        at, good, total = _moment(each["at"]), each["good"], each["good"] + each["other"]
        said = f"{at}: {good} segmented, {each['other']} not"
        if good:
            parts.append(frame.bar(place, 0, good, "good", said))
        if each["other"]:
            parts.append(frame.bar(place, good, total, "bad", said))
    return _svg(frame, [*parts, *_time_ticks(frame, timeline)], "Series over time; the table below has the figures")


def busy_chart(timeline: Mapping[str, Any]) -> Markup | None:
    """GPU busy over time; None if nothing is known of it.

    Args:
        timeline: As `commits_chart`.
    """
    bins = timeline["bins"]
    if not any(each and each["gpu_busy"] is not None for each in bins):
        return None
    frame = _Frame(len(bins), 1.0, percent=True)
    parts = list(frame.lines())
    for place, each in enumerate(bins):
        if each is None:
            parts.append(_pause(frame, place))
        elif each["gpu_busy"] is not None:
            said = f"{_moment(each['at'])}: GPU busy {100 * each['gpu_busy']:.0f} %"
            parts.append(frame.bar(place, 0, each["gpu_busy"], "accent", said))
    return _svg(frame, [*parts, *_time_ticks(frame, timeline)], "GPU busy over time; the table below has the figures")


def distribution_chart(bins: Sequence[Mapping[str, Any]], unit: str, what: str, width: int = _WIDTH) -> Markup:
    """A distribution over a logarithmic scale.

    Args:
        bins: `ctflow.cohort.report.distribution.LogDistribution.bins`.
        unit: Of its edges.
        what: What is counted.
        width: Of the chart.
    """
    frame = _Frame(len(bins), max((each["count"] for each in bins), default=1), width)
    parts = list(frame.lines())
    for place, each in enumerate(bins):
        if each["count"]:
            said = f"{number_in_words(each['low'])} to {number_in_words(each['high'])} {unit}: {each['count']} {what}"
            parts.append(frame.bar(place, 0, each["count"], "accent", said))
    parts += _logarithmic_ticks(frame, bins)
    parts.append(_text(width - _RIGHT, _HEIGHT - 2, unit, "end"))
    return _svg(frame, parts, f"Distribution of {what}; the table has the figures")


def _logarithmic_ticks(frame: _Frame, bins: Sequence[Mapping[str, Any]]) -> Iterator[Markup]:
    """1, 2 and 5 of each power of ten where there is room, else the powers alone."""
    if not bins:
        return
    low, high = math.log10(bins[0]["low"]), math.log10(bins[-1]["high"])
    powers = range(math.floor(low), math.ceil(high) + 1)
    for factors in ((1, 2, 5), (1,)):
        values = [factor * 10.0**power for power in powers for factor in factors]
        shown = [value for value in values if low - 1e-9 <= math.log10(value) <= high + 1e-9]
        widest = max((len(number_in_words(value)) for value in shown), default=1) + 1.5
        if widest * _LETTER < frame.room * 0.3 / (high - low) or factors == (1,):
            break
    step = max(1, math.ceil(widest * _LETTER * len(shown) / frame.room))
    for value in shown[::step] if len(shown) > 1 else [each["low"] for each in bins[:: max(len(bins) // 3, 1)]]:
        place = (math.log10(value) - low) / (high - low) * frame.count
        yield _tick(frame, place, number_in_words(value))


def share_bar(share: float) -> Markup:
    """A bar beside a figure in a table."""
    return Markup(
        '<svg class="share" viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true" focusable="false">'
        '<rect class="track" width="100" height="8"/><rect class="accent" width="{:.1f}" height="8"/></svg>'
    ).format(100 * min(max(share, 0.0), 1.0))


def number_in_words(value: float) -> str:
    """A number with two to three digits that matter: 0.046, 1.5, 320, 12,000."""
    if value == 0:
        return "0"
    if abs(value) >= 100:
        return f"{float(f'{value:.3g}'):,.0f}"
    return f"{float(f'{value:.2g}'):g}"


def _nice_step(top: float) -> float:
    power = 10 ** math.floor(math.log10(max(top, 1) / 4 + 1e-9)) if top > 4 else 1
    return float(next(nice * power for nice in _NICE if top / (nice * power) <= 4.5))


def _svg(frame: _Frame, parts: Sequence[Markup], name: str) -> Markup:
    wide = " wide" if frame.width > _WIDTH else ""
    return Markup('<svg class="chart{}" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        wide, frame.width, _HEIGHT, name, Markup("").join(parts)
    )


def _text(x: float, y: float, words: str, anchor: str = "middle") -> Markup:
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}">{}</text>').format(x, y, anchor, words)


def _tick(frame: _Frame, place: float, words: str, below: str = "") -> Markup:
    x, y = frame.x(place), _HEIGHT - _BOTTOM
    mark = Markup('<line class="axis" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x, y, y + 4)
    return mark + _text(x, y + 17, words) + (_text(x, y + 31, below) if below else Markup(""))


def _pause(frame: _Frame, place: int) -> Markup:
    x = frame.x(place + 0.5)
    return Markup(
        '<line class="pause" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"><title>a pause is left out</title></line>'
    ).format(x, _TOP, _HEIGHT - _BOTTOM)


def _time_ticks(frame: _Frame, timeline: Mapping[str, Any]) -> Iterator[Markup]:
    bins, width_s = timeline["bins"], timeline["width_s"]
    step, day = max(1, math.ceil(len(bins) / _MOST_TICKS)), ""
    form: Callable[[datetime], str] = _clock if width_s >= 60 else _clock_with_seconds
    last = -step
    for place, each in enumerate(bins):
        is_first = each is not None and (place == 0 or bins[place - 1] is None)
        if each is None or not (place - last >= step or (is_first and place - last > step / 2)):
            continue
        last, at = place, _time(each["at"])
        date = f"{at.day} {at:%b}"
        if width_s >= _DAY_S:
            yield _tick(frame, place, date)
        else:
            yield _tick(frame, place, form(at), date if date != day else "")
        day = date


def _clock(at: datetime) -> str:
    return f"{at:%H:%M}"


def _clock_with_seconds(at: datetime) -> str:
    return f"{at:%H:%M:%S}"


def _time(text: str) -> datetime:
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)


def _moment(text: str) -> str:
    at = _time(text)
    return f"{at.day} {at:%b %Y %H:%M:%S}"
