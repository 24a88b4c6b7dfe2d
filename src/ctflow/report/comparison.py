"""What a person sees of a comparison: a table of configurations, and a picture of their seconds."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctflow.report.pen import DIM, FRAME, GRID, Pen

WIDTH_PX = 1280
_TOP, _ROW, _BAR = 150, 34, 20  # heights in pixels
_NAMES, _LEFT, _RIGHT = 40, 470, 1130  # where names and bars begin, and the longest bar ends
_STOCK, _ARTICLE, _OWN = (150, 158, 170), (206, 112, 0), (20, 110, 180)
_COLOURS = {"stock": _STOCK, "article": _ARTICLE, "article, one channel": _ARTICLE, "ctflow": _OWN}
_GIB = 2**30
_REFERENCES = (("0c", "factor_to_stock_half"), ("0a", "factor_to_stock"), ("1", "factor_to_article"))


def say_comparison(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show a comparison.

    Args:
        document: What `ctflow.bench.compare.compare_configurations` returns.
        stream: Gets the text; None takes standard output.
    """
    stream = stream or sys.stdout
    console = Console(file=stream, soft_wrap=True, width=None if stream.isatty() else 180)
    console.print(_head(document), markup=False, highlight=False)
    for number, overlap in enumerate(_overlaps(document)):
        console.print(Text(f"\noverlap {overlap['overlap']:g}, {overlap['windows']} windows", style="bold"))
        console.print(_table(document["configurations"], number))
    for configuration in document["configurations"]:
        for words in _reasons(configuration):
            console.print(f"{configuration['id']} ({configuration['text']}) {words}", markup=False, highlight=False)


def line_of_configuration(configuration: Mapping[str, Any]) -> str:
    """A configuration in one line, for a log.

    Args:
        configuration: One of the document's.
    """
    seconds = [f"{result['median_s']:.3f} s at overlap {result['overlap']:g}" for result in _measured(configuration)]
    return f"{configuration['id']} ({configuration['text']}): {', '.join([*seconds, *_reasons(configuration)])}"


def _measured(configuration: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [result for result in configuration.get("results", ()) if not result["reason"]]


def _reasons(configuration: Mapping[str, Any]) -> list[str]:
    """Why a configuration, or one of its overlaps, has no seconds."""
    if configuration["reason"]:
        return [f"{'crashed' if configuration['status'] == 'crashed' else 'not run'}: {configuration['reason']}"]
    results = configuration.get("results", ())
    return [f"not run at overlap {each['overlap']:g}: {each['reason']}" for each in results if each["reason"]]


def _head(document: Mapping[str, Any]) -> str:
    """Machine, network and case in a line or two."""
    machine, model, case = document["machine"], document["model"], document["case"]
    gpus = [name if times == 1 else f"{times} x {name}" for name, times in Counter(machine["gpus"]).items()]
    where = ", ".join(gpus) or f"{machine['processors']} processors, no GPU"
    size = model["arguments"].get("feature_size")
    network = f"{model['network']}{f' feature_size {size}' if size else ''}"
    shape = " x ".join(map(str, case["shape"]))
    return f"{network} on a phantom of {shape}, {where}, torch {machine['torch']}, {document['date']}"


def _overlaps(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first measured configuration's results, which have what is the same for all."""
    return next((each["results"] for each in document["configurations"] if "results" in each), [])


def _table(configurations: Sequence[Mapping[str, Any]], number: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("configuration", "what"):
        table.add_column(heading)
    for heading in ("seconds", "spread", "x 0a", "x 0c", "x 1", "Dice to 0a", "Dice to 1", "Dice to truth", "GPU GiB"):
        table.add_column(heading, justify="right")
    for configuration in configurations:
        if "results" in configuration and not configuration["results"][number]["reason"]:
            table.add_row(configuration["id"], configuration["text"], *_cells(configuration["results"][number]))
    return table


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    memory = result["memory_bytes"]
    return (
        f"{result['median_s']:.3f}",
        f"{result['spread_s']:.3f}" if len(result["seconds"]) > 1 else "-",
        *(_number(result[f"factor_to_{other}"], 2) for other in ("stock", "stock_half", "article")),
        *(_number(result[f"dice_to_{other}"], 4) for other in ("stock", "article", "truth")),
        "-" if memory is None else " + ".join(f"{taken / _GIB:.1f}" for taken in memory),
    )


def _number(value: float | None, decimals: int) -> str:
    return "-" if value is None else f"{value:.{decimals}f}"


def write_comparison_chart(document: Mapping[str, Any], path: Path) -> None:
    """Draw the seconds of every configuration at the first overlap, on a logarithmic scale.

    Args:
        document: What `ctflow.bench.compare.compare_configurations` returns.
        path: The PNG.

    Raises:
        OutputError: The file cannot be written.
    """
    rows = [each for each in document["configurations"] if "results" in each and not each["results"][0]["reason"]]
    bottom = _TOP + _ROW * max(len(rows), 1)
    pen = Pen(WIDTH_PX, bottom + 70)
    pen.words(_NAMES, 52, "Seconds for a whole CT, from stock MONAI to ctflow", 26, bold=True)
    pen.words(_NAMES, 84, pen.fitted(_head(document), 15, WIDTH_PX - 2 * _NAMES), 15, fill=DIM)
    if not rows:
        pen.words(_NAMES, _TOP + 20, "no configuration could run here", 18, fill=DIM)
        pen.save(path)
        return
    first = _overlaps(document)[0]
    cut = f"overlap {first['overlap']:g}, {first['windows']} windows"
    name, key = _reference(rows)
    how = f"{cut}; median of {document['repeats']}" + (f"; 2 x: twice as fast as configuration {name}" if name else "")
    pen.words(_NAMES, 108, how, 15, fill=DIM)
    seconds = [row["results"][0]["median_s"] for row in rows]
    scale = _Scale(min(seconds), max(seconds))
    _draw_axis(pen, scale, bottom)
    for place, row in enumerate(rows):
        _draw_row(pen, scale, _TOP + _ROW * place, row, key)
    pen.save(path)


def _reference(configurations: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    """What factors are to, and their key: stock in fp16, in fp32, or the article's; no words where none is."""
    known = [each["id"] for each in configurations]
    return next(((name, key) for name, key in _REFERENCES if name in known), ("", _REFERENCES[-1][1]))


class _Scale:
    """Where seconds lie on the picture: logarithmic, from half of the least to a little more than the most.

    Args:
        least_s: The quickest configuration.
        most_s: The slowest.
    """

    def __init__(self, least_s: float, most_s: float) -> None:
        self.low, self.high = max(least_s, 1e-4) / 2, max(most_s, 1e-4) * 1.1

    def x(self, seconds: float) -> float:
        share = math.log(max(seconds, self.low) / self.low) / math.log(self.high / self.low)
        return _LEFT + share * (_RIGHT - _LEFT)

    def ticks(self) -> list[float]:
        """1, 2, 3 and 5 of each power of ten: at least one lies between any seconds and twice as many."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        marks = [factor * 10.0**power for power in powers for factor in (1, 2, 3, 5)]
        return [mark for mark in marks if self.low <= mark <= self.high]


def _draw_axis(pen: Pen, scale: _Scale, bottom: float) -> None:
    for seconds in scale.ticks():
        x = scale.x(seconds)
        pen.line([(x, _TOP - 8), (x, bottom)], GRID)
        pen.words(x, bottom + 10, f"{seconds:g}", 14, "mt", DIM)
    pen.line([(_LEFT, _TOP - 8), (_LEFT, bottom), (_RIGHT, bottom)], FRAME, 1.3)
    pen.words((_LEFT + _RIGHT) / 2, bottom + 34, "seconds, logarithmic", 15, "mt")


def _draw_row(pen: Pen, scale: _Scale, top: float, row: Mapping[str, Any], key: str) -> None:
    result = row["results"][0]
    middle, end = top + _BAR / 2, scale.x(result["median_s"])
    own = row["method"] == "ctflow"
    name = pen.fitted(row["text"] if own else f"{row['id']}  {row['text']}", 15, _LEFT - _NAMES - 16)
    pen.words(_NAMES, middle, name, 15, "lm")
    pen.box(_LEFT, top, end, top + _BAR, _COLOURS[row["method"]])
    factor = result[key]
    words = f"{result['median_s']:.2f} s" + ("" if factor is None else f"   {factor:.{2 if factor < 1 else 1}f} x")
    pen.words(end + 8, middle, words, 15, "lm", bold=own)
