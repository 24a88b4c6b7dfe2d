from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ctflow.report import comparison
from ctflow.report.comparison import line_of_configuration, say_comparison, write_comparison_chart

GIB = 2**30


def result(seconds: float, overlap: float = 0.0, memory=(3 * GIB,)) -> dict:
    factors = {"factor_to_stock": 4.2 / seconds, "factor_to_stock_half": None, "factor_to_article": 5.0 / seconds}
    measured = {
        "reason": None,
        "memory_bytes": memory,
        "overlap": overlap,
        "windows": 144,
        "seconds": [seconds, seconds + 0.01],
    }
    dice = {"dice_to_stock": 0.9987, "dice_to_article": 0.9991, "dice_to_truth": 0.91}
    return {**measured, **factors, **dice, "median_s": seconds, "spread_s": 0.01}


def row(name: str, method: str, seconds: float | None, reason: str | None = None, memory=(3 * GIB,)) -> dict:
    status = "measured" if reason is None else "refused"
    entry = {"id": name, "text": f"text of {name}", "method": method, "reason": reason, "status": status}
    results = [result(seconds, 0.0, memory), result(2 * seconds, 0.25, memory)] if seconds else None
    return entry if results is None else {**entry, "results": results}


def document_of(*rows: dict) -> dict:
    return {
        "date": "2026-11-21", "repeats": 3, "configurations": list(rows),
        "machine": {"gpus": ["NVIDIA H200"], "torch": "2.11", "processors": 16},
        "model": {"network": "SwinUNETR", "arguments": {"feature_size": 48}}, "case": {"shape": [300, 512, 512]},
    }  # fmt: skip


ROWS = (
    row("0a", "stock", 4.2),
    row("1", "article", 5.0),
    row("4", "article, one channel", None, "tensorrt: not installed [bold]"),
    row("eager-fp16", "ctflow", 1.25, memory=(GIB, 2 * GIB)),
)


def test_the_table_has_a_row_each_and_reasons_below():
    stream = io.StringIO()
    say_comparison(document_of(*ROWS), stream)
    text = stream.getvalue()
    assert "SwinUNETR feature_size 48 on a phantom of 300 x 512 x 512, NVIDIA H200" in text
    assert text.index("overlap 0, 144 windows") < text.index("overlap 0.25")
    (first, second) = [line.split() for line in text.splitlines() if line.startswith(" eager-fp16")]
    assert first[4:] == ["1.250", "0.010", "3.36", "-", "4.00", "0.9987", "0.9991", "0.9100", "1.0", "+", "2.0"]
    assert second[4] == "2.500"
    assert "4 (text of 4) not run: tensorrt: not installed [bold]" in text


def test_equal_gpus_are_counted():
    document = document_of(*ROWS)
    document["machine"]["gpus"] = ["NVIDIA H200", "NVIDIA A100", "NVIDIA H200"]
    stream = io.StringIO()
    say_comparison(document, stream)
    assert "300 x 512 x 512, 2 x NVIDIA H200, NVIDIA A100, torch 2.11" in stream.getvalue()


def test_a_crash_and_a_missing_overlap_are_told():
    crashed = {**row("2", "article", None, "its process ended with -9: x"), "status": "crashed"}
    partly = row("3", "article", 2.0)
    partly["results"][1] = {"overlap": 0.25, "windows": 196, "reason": "too little memory"}
    stream = io.StringIO()
    say_comparison(document_of(partly, crashed), stream)
    assert "2 (text of 2) crashed: its process ended with -9: x" in stream.getvalue()
    assert "3 (text of 3) not run at overlap 0.25: too little memory" in stream.getvalue()
    assert (
        line_of_configuration(partly)
        == "3 (text of 3): 2.000 s at overlap 0, not run at overlap 0.25: too little memory"
    )
    assert stream.getvalue().count("2.000") == 1


def test_nothing_measured_is_said_and_drawn(tmp_path):
    stream = io.StringIO()
    say_comparison(document_of(ROWS[2]), stream)
    assert "not run" in stream.getvalue()
    write_comparison_chart(document_of(ROWS[2]), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as picture:
        assert picture.width == comparison.WIDTH_PX


def test_bars_are_as_long_as_the_logarithm_of_their_seconds(tmp_path):
    write_comparison_chart(document_of(*ROWS), tmp_path / "chart.png")
    with Image.open(tmp_path / "chart.png") as image:
        picture = np.asarray(image.convert("RGB")).astype(int)
    scale = comparison._Scale(1.25, 5.0)
    bars = [(comparison._STOCK, 4.2), (comparison._ARTICLE, 5.0), (comparison._OWN, 1.25)]
    for place, (colour, seconds) in enumerate(bars):
        line = picture[comparison._TOP + comparison._ROW * place + 4]
        bar = np.flatnonzero((np.abs(line - colour) < 6).all(axis=1))
        assert bar[0] == pytest.approx(comparison._LEFT, abs=3)
        assert bar[-1] == pytest.approx(scale.x(seconds), abs=3)


@pytest.mark.parametrize(
    ("ids", "says", "factor"),
    [
        (("0a", "0c", "1"), "twice as fast as configuration 0c", "3.0 x"),
        (("0a", "1"), "twice as fast as configuration 0a", "2.5 x"),
        (("1",), "twice as fast as configuration 1", "4.0 x"),
        ((), None, None),
    ],
)
def test_factors_on_the_chart_are_to_stock_in_half_precision_if_it_was_measured(
    tmp_path, monkeypatch, ids, says, factor
):
    rows = [row(name, "article" if name == "1" else "stock", 4.0) for name in ids] + [row("fused-fp16", "ctflow", 1.0)]
    factors = {"factor_to_stock": 2.5, "factor_to_stock_half": 3.0, "factor_to_article": 4.0}
    rows[-1]["results"][0] |= factors if ids else dict.fromkeys(factors)
    drawn, words = [], comparison.Pen.words
    monkeypatch.setattr(
        comparison.Pen, "words", lambda pen, *given, **more: (drawn.append(given[2]), words(pen, *given, **more))[1]
    )
    write_comparison_chart(document_of(*rows), tmp_path / "chart.png")
    assert [text.partition("; 2 x: ")[2] or None for text in drawn if "median of" in text] == [says]
    assert [text for text in drawn if text.startswith("1.00 s")] == [f"1.00 s   {factor}" if factor else "1.00 s"]


def test_one_volume_has_no_spread():
    single, several = row("0a", "stock", 4.0), row("1", "article", 5.0)
    single["results"][0]["seconds"] = [4.0]
    stream = io.StringIO()
    say_comparison(document_of(single, several), stream)
    lines = [line.split() for line in stream.getvalue().splitlines() if "text of" in line]
    assert [line[5] for line in lines[:2]] == ["-", "0.010"]


@pytest.mark.parametrize(("least", "most"), [(0.3, 5.0), (0.01, 0.02), (4.1, 4.2), (2.0, 2.0), (0.0, 0.0)])
def test_a_scale_has_ticks_and_keeps_inside(least, most):
    scale = comparison._Scale(least, most)
    assert scale.ticks()
    for seconds in (least, most, *scale.ticks()):
        assert comparison._LEFT <= scale.x(seconds) <= comparison._RIGHT
