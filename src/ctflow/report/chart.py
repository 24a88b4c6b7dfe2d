"""evaluation.png: Dice of every true lesion over its size, with the size classes and what was missed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctflow.report.pen import DIM, FRAME, GRID, PAPER, Pen

WIDTH_PX, HEIGHT_PX = 1200, 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 1164, 196, 640  # the plot's frame
_MISSED_PX = 22  # missed lesions stand this far below the line of Dice 0
_TICKS_MM = (2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200)
_LEAST_MM, _MOST_MM = 5.2, 69.0  # shown even if no lesion is that small or large

_BAND, _BAND_OTHER = (238, 243, 249), (247, 249, 252)
_FOUND, _MISSED, _MEAN, _ALARM = (20, 110, 180), (205, 52, 48), (206, 112, 0), (178, 70, 0)


@dataclass(frozen=True)
class _Scale:
    """Where a diameter (mm, logarithmic) and a Dice lie on the picture, in its pixels."""

    low_mm: float
    high_mm: float

    def x(self, diameter_mm: float) -> float:
        share = math.log(diameter_mm / self.low_mm) / math.log(self.high_mm / self.low_mm)
        return _LEFT + min(max(share, 0.0), 1.0) * (_RIGHT - _LEFT)

    def y(self, dice: float) -> float:
        floor = _BOTTOM - 2 * _MISSED_PX
        return floor - dice * (floor - _TOP)


def write_exactness_chart(document: Mapping[str, Any], path: Path) -> None:
    """Draw an evaluation.

    Args:
        document: What `ctflow.bench.evaluate.evaluate_folder` returns.
        path: The PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    lesions = [lesion for case in document["cases"] for lesion in case["lesions"]]
    diameters = [lesion["equivalent_diameter_mm"] for lesion in lesions]
    scale = _Scale(
        min([_LEAST_MM, *(mm / 1.08 for mm in diameters)]), max([_MOST_MM, *(mm * 1.08 for mm in diameters)])
    )
    pen = Pen(WIDTH_PX, HEIGHT_PX)
    _draw_head(pen, document)
    _draw_bands(pen, scale, document["summary"]["by_size"])
    _draw_axes(pen, scale)
    _draw_means(pen, scale, document["summary"]["by_size"])
    _draw_lesions(pen, scale, lesions)
    _draw_legend(pen)
    pen.save(path)


def _draw_head(pen: Pen, document: Mapping[str, Any]) -> None:
    notice = document["research_only"] or ""
    pen.words(_RIGHT, 48, notice, 17, "rs", _ALARM, bold=True)
    room = _RIGHT - _LEFT - pen.room(notice, 17) - 40
    model, engine, summary = document["model"], document["engine"], document["summary"]
    title = pen.fitted(f"{model['name']} {model['version']}", 26, room)
    pen.words(_LEFT, 50, title, 26, bold=True)
    parts = [f"{engine['backend']} {engine['precision']} on {engine['device']}"] if engine else []
    overall, free = summary["overall"], summary["tumour_free"]
    parts.append(f"{overall['lesions']} lesions in {summary['cases_with_truth']} cases")
    if summary["mean_dice"] is not None:
        parts.append(f"mean Dice of these cases {summary['mean_dice']:.3f}")
    _draw_facts(pen, 80, parts)
    false = overall["false_positives_a_case"]
    parts = [] if false is None else [f"{false:.2f} false positives per case"]
    if free["cases"]:
        parts.append(
            f"{free['clean']} of {free['cases']} cases without lesions show nothing above {free['limit_ml']} ml"
        )
    _draw_facts(pen, 102, parts)


def _draw_facts(pen: Pen, y: float, parts: Sequence[str]) -> None:
    pen.words(_LEFT, y, pen.fitted("   |   ".join(parts), 15, _RIGHT - _LEFT), 15, fill=DIM)


def _draw_bands(pen: Pen, scale: _Scale, classes: Sequence[Mapping[str, Any]]) -> None:
    """Shades each size class and writes its figures above it."""
    for index, row in enumerate(classes):
        left, right = scale.x(row["from_mm"]), scale.x(row["to_mm"])
        pen.box(left, _TOP, right, _BOTTOM, (_BAND, _BAND_OTHER)[index % 2])
        middle = (left + right) / 2
        pen.words(middle, 142, f"{row['from_mm']:.0f} to {row['to_mm']:.0f} mm", 17, "ms", bold=True)
        if not row["lesions"]:
            pen.words(middle, 164, "no lesions", 14, "ms", DIM)
            continue
        pen.words(middle, 164, f"{row['hits']} of {row['lesions']} found ({100 * row['sensitivity']:.0f} %)", 14, "ms")
        pen.words(middle, 184, f"mean Dice {row['mean_dice']:.2f}", 15, "ms", _MEAN)


def _draw_axes(pen: Pen, scale: _Scale) -> None:
    for tenths in range(0, 11, 2):
        y = scale.y(tenths / 10)
        pen.line([(_LEFT, y), (_RIGHT, y)], GRID)
        pen.words(_LEFT - 10, y, f"{tenths / 10:.1f}", 14, "rm", DIM)
    pen.words(_LEFT - 10, _BOTTOM - _MISSED_PX, "missed", 14, "rm", _MISSED)
    for millimetres in _TICKS_MM:
        if scale.low_mm <= millimetres <= scale.high_mm:
            x = scale.x(millimetres)
            pen.line([(x, _BOTTOM), (x, _BOTTOM + 6)], FRAME)
            pen.words(x, _BOTTOM + 12, str(millimetres), 14, "mt", DIM)
    pen.line([(_LEFT, _TOP), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], FRAME, 1.3)
    pen.words(_LEFT - 10, _TOP - 18, "Dice", 15, "rs")
    label = "equivalent diameter of the true lesion (of the sphere of its volume), mm"
    pen.words((_LEFT + _RIGHT) / 2, _BOTTOM + 38, label, 15, "mt")


def _draw_lesions(pen: Pen, scale: _Scale, lesions: Sequence[Mapping[str, Any]]) -> None:
    for lesion in lesions:
        x = scale.x(lesion["equivalent_diameter_mm"])
        if lesion["hit"]:
            _dot(pen, x, scale.y(lesion["dice"]))
        else:
            _cross(pen, x, _BOTTOM - _MISSED_PX)
    if not lesions:
        middle = ((_LEFT + _RIGHT) / 2, scale.y(0.5))
        pen.words(*middle, "no true lesions", 20, "mm", DIM)


def _draw_means(pen: Pen, scale: _Scale, classes: Sequence[Mapping[str, Any]]) -> None:
    for row in classes:
        if row["mean_dice"] is not None:
            y = scale.y(row["mean_dice"])
            pen.line([(scale.x(row["from_mm"]), y), (scale.x(row["to_mm"]), y)], _MEAN, 2.6)


def _dot(pen: Pen, x: float, y: float, radius: float = 6.0) -> None:
    """A found lesion; where several lie together the colour deepens."""
    pen.disc(x, y, radius, (*PAPER, 235))
    pen.disc(x, y, radius - 1.2, (*_FOUND, 190))


def _cross(pen: Pen, x: float, y: float, reach: float = 5.5) -> None:
    """A missed lesion."""
    pen.line([(x - reach, y - reach), (x + reach, y + reach)], _MISSED, 2.4)
    pen.line([(x - reach, y + reach), (x + reach, y - reach)], _MISSED, 2.4)


def _draw_legend(pen: Pen) -> None:
    """One row below the axis, in its middle."""
    entries = (
        "a lesion that was found",
        "missed (Dice 0)",
        "mean Dice of the size class, a missed lesion counting as 0",
    )
    mark, gap, y = 34.0, 44.0, _BOTTOM + 86.0
    lengths = [mark + pen.room(words, 14) for words in entries]
    x = (_LEFT + _RIGHT - sum(lengths) - gap * (len(entries) - 1)) / 2
    for index, (words, length) in enumerate(zip(entries, lengths, strict=True)):
        if index == 0:
            _dot(pen, x + 12, y)
        elif index == 1:
            _cross(pen, x + 12, y)
        else:
            pen.line([(x, y), (x + 24, y)], _MEAN, 2.6)
        pen.words(x + mark, y, words, 14, "lm", DIM)
        x += length + gap
