"""evaluation.png and compare.png, drawn by matplotlib: Dice over lesion size, and the seconds of configurations."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctflow.core.atomic import write_atomically
from ctflow.report.comparison import head_of_comparison, overlaps_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 100
_LEFT, _RIGHT = 0.07, 0.97  # of the figure's width
_INK, _DIM, _GRID, _FRAME, _ALARM = "#1c212a", "#68707c", "#e0e4ea", "#969eaa", "#b24600"
_FOUND, _MISSED, _MEAN = "#146eb4", "#cd3430", "#ce7000"
_BANDS = ("#eef3f9", "#f7f9fc")
_LEAST_MM, _MOST_MM = 5.2, 69.0  # shown even if no lesion is that small or large
_TICKS_MM = (2, 3, 4, 6, 8, 10, 15, 20, 30, 40, 60, 80, 100, 150, 200)
_ROOM_FOR_NAMES_PX = 460  # of a configuration
_MISSED_AT = -0.06  # missed lesions are drawn this far below a Dice of 0
_REFERENCES = (("0c", "factor_to_stock_half"), ("0a", "factor_to_stock"), ("1", "factor_to_article"))
_COLOURS = {"stock": "#969eaa", "article": _MEAN, "article, one channel": _MEAN, "ctflow": _FOUND}

log = logging.getLogger(__name__)


def can_draw(name: str) -> bool:
    """Whether matplotlib is installed; if not, the log says that a chart is left out, and what to do."""
    if find_spec("matplotlib") is not None:
        return True
    log.warning("%s is not drawn: the package matplotlib is not installed: pip install 'ctflow[bench]'", name)
    return False


def write_chart(figure: Figure, path: Path) -> None:
    """Write a figure as PNG: the same figure gives the same file.

    Raises:
        OutputError: The file cannot be written.
    """
    picture = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        figure.savefig(picture, format="png", dpi=_DPI, metadata={"Software": None})
    write_atomically(path, lambda stream: stream.write(picture.getvalue()))


def exactness_figure(document: Mapping[str, Any]) -> Figure:
    """Dice of every true lesion over its size, with the size classes and missed lesions.

    Args:
        document: The result of `ctflow.bench.evaluate.evaluate_folder`.
    """
    figure = _figure(12, 7.6)
    axes = _axes(figure, (_LEFT, 0.17, _RIGHT - _LEFT, 0.57))
    lesions = [lesion for case in document["cases"] for lesion in case["lesions"]]
    diameters = [lesion["equivalent_diameter_mm"] for lesion in lesions]
    low, high = min([_LEAST_MM, *(mm / 1.08 for mm in diameters)]), max([_MOST_MM, *(mm * 1.08 for mm in diameters)])
    axes.set(xscale="log", xlim=(low, high), ylim=(2 * _MISSED_AT, 1.0))
    axes.set_xticks([mm for mm in _TICKS_MM if low <= mm <= high], minor=False)
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks([_MISSED_AT, *(tenths / 10 for tenths in range(0, 11, 2))])
    axes.set_yticklabels(["missed", *(f"{tenths / 10:.1f}" for tenths in range(0, 11, 2))])
    axes.set_xlabel("equivalent diameter of the true lesion (of the sphere of its volume), mm")
    axes.set_ylabel("Dice", labelpad=-8)
    axes.grid(axis="y", color=_GRID)
    for index, row in enumerate(document["summary"]["by_size"]):
        _draw_class(axes, row, _BANDS[index % 2])
    found = [lesion for lesion in lesions if lesion["hit"]]
    sizes = [[each["equivalent_diameter_mm"] for each in lesions if each["hit"] is hit] for hit in (True, False)]
    axes.scatter(  # overlapping points deepen the colour
        sizes[0], [each["dice"] for each in found], s=60, c=_FOUND, edgecolors="white", alpha=0.8, zorder=3,
        label="a lesion that was found",
    )  # fmt: skip
    axes.scatter(sizes[1], [_MISSED_AT] * len(sizes[1]), s=60, c=_MISSED, marker="x", zorder=3, label="missed (Dice 0)")
    if not lesions:
        _say(axes, 0.5, 0.5, "no true lesions", 15, _DIM, transform=axes.transAxes, ha="center")
    axes.plot([], [], color=_MEAN, lw=2.6, label="mean Dice of the size class, a missed lesion counting as 0")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False)
    _draw_head(figure, document)
    return figure


def _draw_class(axes: Axes, row: Mapping[str, Any], shade: str) -> None:
    """A size class: its band, its figures above it, and its mean."""
    low, high = row["from_mm"], row["to_mm"]
    axes.axvspan(low, high, color=shade, lw=0, zorder=0)
    lines = [(f"{low:.0f} to {high:.0f} mm", _INK, "bold")]
    if row["lesions"]:
        axes.hlines(row["mean_dice"], low, high, color=_MEAN, lw=2.6, zorder=2)
        lines += [
            (f"{row['hits']} of {row['lesions']} found ({100 * row['sensitivity']:.0f} %)", _INK, "normal"),
            (f"mean Dice {row['mean_dice']:.2f}", _MEAN, "normal"),
        ]
    else:
        lines.append(("no lesions", _DIM, "normal"))
    for place, (words, colour, weight) in enumerate(lines):
        where = ((low * high) ** 0.5, 1.115 - 0.048 * place)
        _say(axes, *where, words, 11, colour, transform=axes.get_xaxis_transform(), ha="center", weight=weight)


def _draw_head(figure: Figure, document: Mapping[str, Any]) -> None:
    model, engine, summary = document["model"], document["engine"], document["summary"]
    notice = _say(figure, _RIGHT, 0.935, document["research_only"] or "", 12, _ALARM, ha="right", weight="bold")
    title = _say(figure, _LEFT, 0.935, f"{model['name']} {model['version']}", 18, _INK, weight="bold")
    _fit(title, _width(figure) - _extent(notice) - 40)
    overall, free = summary["overall"], summary["tumour_free"]
    parts = [f"{engine['backend']} {engine['precision']} on {engine['device']}"] if engine else []
    parts.append(f"{overall['lesions']} lesions in {summary['cases_with_truth']} cases")
    if summary["mean_dice"] is not None:
        parts.append(f"mean Dice of these cases {summary['mean_dice']:.3f}")
    false = overall["false_positives_a_case"]
    more = [] if false is None else [f"{false:.2f} false positives per case"]
    if free["cases"]:
        more.append(
            f"{free['clean']} of {free['cases']} cases without lesions show nothing above {free['limit_ml']} ml"
        )
    for place, line in enumerate((parts, more)):
        _fit(_say(figure, _LEFT, 0.895 - 0.03 * place, "   |   ".join(line), 11, _DIM), _width(figure))


def comparison_figure(document: Mapping[str, Any]) -> Figure:
    """The seconds of every configuration at the first overlap, on a logarithmic scale.

    Args:
        document: The result of `ctflow.bench.compare.compare_configurations`.
    """
    rows = [each for each in document["configurations"] if "results" in each and not each["results"][0]["reason"]]
    height = 2.2 + 0.34 * max(len(rows), 1)
    figure = _figure(12.8, height)
    _say(figure, 0.03, 1 - 0.5 / height, "Seconds for a whole CT, from stock MONAI to ctflow", 18, _INK, weight="bold")
    _fit(_say(figure, 0.03, 1 - 0.82 / height, head_of_comparison(document), 11, _DIM), _width(figure))
    if not rows:
        _say(figure, 0.03, 0.3, "no configuration could run here", 13, _DIM)
        return figure
    first, (name, key) = overlaps_of(document)[0], _reference(rows)
    how = f"overlap {first['overlap']:g}, {first['windows']} windows; median of {document['repeats']}"
    how += f"; 2 x: twice as fast as configuration {name}" if name else ""
    _say(figure, 0.03, 1 - 1.06 / height, how, 11, _DIM)
    axes = _axes(figure, (0.4, 0.75 / height, 0.49, 1 - 2.0 / height))
    _draw_bars(axes, rows, key)
    return figure


def _reference(configurations: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """The reference of speed-ups and its key: stock in fp16, in fp32, or the article's; no text without one."""
    known = [each["id"] for each in configurations]
    return next(((name, key) for name, key in _REFERENCES if name in known), ("", _REFERENCES[-1][1]))


def _draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str) -> None:
    seconds = [max(row["results"][0]["median_s"], 1e-4) for row in rows]
    bars = axes.barh(range(len(rows)), seconds, 0.6, color=[_COLOURS[row["method"]] for row in rows], zorder=2)
    axes.set(xscale="log", xlim=(min(seconds) / 2, max(seconds) * 1.1), ylim=(len(rows) - 0.5, -0.6))
    axes.set_yticks([])
    axes.set_xticks([factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 3, 5)], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlim(min(seconds) / 2, max(seconds) * 1.1)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("seconds, logarithmic")
    axes.grid(axis="x", color=_GRID)
    names = axes.get_yaxis_transform()
    for place, (bar, row) in enumerate(zip(bars, rows, strict=True)):
        result, mine = row["results"][0], row["method"] == "ctflow"
        name = (row["text"] if mine else f"{row['id']}  {row['text']}") + _version(row)
        _fit(_say(axes, -0.75, place, name, 11, _INK, transform=names, va="center"), _ROOM_FOR_NAMES_PX)
        factor = result[key]
        words = f"{result['median_s']:.2f} s" + ("" if factor is None else f"   {factor:.{2 if factor < 1 else 1}f} x")
        axes.annotate(
            words, (bar.get_width(), bar.get_y() + bar.get_height() / 2), (8, 0), textcoords="offset points",
            va="center", color=_INK, weight="bold" if mine else "normal", annotation_clip=False,
        )  # fmt: skip


def _version(row: Mapping[str, Any]) -> str:
    """TensorRT's version, as its versions differ by more than half in speed; empty for other engines."""
    version = ((row.get("engine_info") or {}).get("versions") or {}).get("tensorrt")
    return f" ({'.'.join(str(version).split('.')[:2])})" if version else ""


def _figure(width: float, height: float) -> Figure:
    """An empty figure of a size in inches, without a window system."""
    # Late: only the extra `bench` installs it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: PLC0415
    from matplotlib.figure import Figure  # noqa: PLC0415

    figure = Figure(figsize=(width, height), dpi=_DPI)
    FigureCanvasAgg(figure)
    return figure


def _axes(figure: Figure, place: tuple[float, float, float, float]) -> Axes:
    axes = figure.add_axes(place)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_FRAME)
    axes.tick_params(colors=_FRAME, labelcolor=_DIM)
    return axes


def _say(where: Any, x: float, y: float, words: str, size: float, colour: str, **more: Any) -> Any:
    """Draw any text: dollars start no formula, and control characters are not drawn."""
    return where.text(x, y, _printable(words), fontsize=size, color=colour, parse_math=False, **more)


def _printable(words: str) -> str:
    return "".join(letter if letter.isprintable() else " " for letter in words)


def _extent(text: Any) -> float:
    with warnings.catch_warnings(action="ignore"):  # of letters that the font lacks
        return float(text.get_window_extent().width)


def _width(figure: Figure) -> float:
    return float(figure.bbox.width) * (_RIGHT - _LEFT)


def _fit(text: Any, room_px: float) -> None:
    """Shorten a text to a length."""
    words = text.get_text()
    while words and _extent(text) > room_px:
        words = words[:-1]
        text.set_text(f"{words}...")
