from __future__ import annotations

import io

from comparison_support import ROWS, comparison_document, comparison_row
from ctflow.report.comparison import line_of_configuration, say_comparison


def test_the_table_has_a_row_each_and_reasons_below():
    stream = io.StringIO()
    say_comparison(comparison_document(*ROWS), stream)
    text = stream.getvalue()
    assert "SwinUNETR feature_size 48 on a phantom of 300 x 512 x 512, NVIDIA H200" in text
    assert text.index("overlap 0, 144 windows") < text.index("overlap 0.25")
    (first, second) = [line.split() for line in text.splitlines() if line.startswith(" eager-fp16")]
    assert first[4:] == ["1.250", "0.010", "3.36", "-", "4.00", "0.9987", "0.9991", "0.9100", "1.0", "+", "2.0"]
    assert second[4] == "2.500"
    assert "4 (text of 4) not run: tensorrt: not installed [bold]" in text


def test_equal_gpus_are_counted():
    document = comparison_document(*ROWS)
    document["machine"]["gpus"] = ["NVIDIA H200", "NVIDIA A100", "NVIDIA H200"]
    stream = io.StringIO()
    say_comparison(document, stream)
    assert "300 x 512 x 512, 2 x NVIDIA H200, NVIDIA A100, torch 2.11" in stream.getvalue()


def test_a_crash_and_a_missing_overlap_are_told():
    crashed = {**comparison_row("2", "article", None, "its process ended with -9: x"), "status": "crashed"}
    partly = comparison_row("3", "article", 2.0)
    partly["results"][1] = {"overlap": 0.25, "windows": 196, "reason": "too little memory"}
    stream = io.StringIO()
    say_comparison(comparison_document(partly, crashed), stream)
    assert "2 (text of 2) crashed: its process ended with -9: x" in stream.getvalue()
    assert "3 (text of 3) not run at overlap 0.25: too little memory" in stream.getvalue()
    assert (
        line_of_configuration(partly)
        == "3 (text of 3): 2.000 s at overlap 0, not run at overlap 0.25: too little memory"
    )
    assert stream.getvalue().count("2.000") == 1


def test_one_volume_has_no_spread():
    single, several = comparison_row("0a", "stock", 4.0), comparison_row("1", "article", 5.0)
    single["results"][0]["seconds"] = [4.0]
    stream = io.StringIO()
    say_comparison(comparison_document(single, several), stream)
    lines = [line.split() for line in stream.getvalue().splitlines() if "text of" in line]
    assert [line[5] for line in lines[:2]] == ["-", "0.010"]


def test_nothing_measured_is_said():
    stream = io.StringIO()
    say_comparison(comparison_document(ROWS[2]), stream)
    assert "not run" in stream.getvalue()
