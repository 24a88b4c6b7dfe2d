from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.text import Text

import ctflow
from ctflow.report.terminal import (
    _STAGES,
    BarProgress,
    LineProgress,
    progress_on,
    say_engines,
    say_error,
    say_inspection,
    say_report,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_pipe_gets_a_line_a_quarter():
    stream = io.StringIO()
    with progress_on(stream) as progress:
        for done in range(101):
            progress("segment", done, 100)
    assert stream.getvalue().splitlines() == [f"segmenting windows: {n} of 100" for n in (25, 50, 75, 100)]


def test_a_stage_of_nothing_and_a_second_series_are_told():
    stream = io.StringIO()
    progress = LineProgress(stream)
    for _ in range(2):
        progress("write", 0, 1)
        progress("write", 1, 1)
    progress("other", 0, 0)
    assert stream.getvalue() == "writing results: 1 of 1\n" * 2


def test_every_stage_of_the_sources_is_told_in_words():
    sources = [file.read_text() for file in Path(ctflow.__file__).parent.rglob("*.py")]
    told = {name for text in sources for name in re.findall(r'(?:\bprogress\(|\b_STAGE = )"([^"]+)"', text)}
    assert {"scan", "read", "segment", "write", "measure configurations", "prepare engine"} <= told
    assert told <= _STAGES.keys()


def test_a_terminal_gets_bars():
    stream = Terminal()
    with progress_on(stream) as progress:
        progress("segment", 0, 4)
        progress("segment", 4, 4)
    assert "segmenting windows" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_a_bar_starts_again_for_the_next_series():
    with RichProgress(console=Console(file=io.StringIO())) as bars:
        progress = BarProgress(bars)
        progress("read", 0, 3)
        progress("read", 3, 3)
        progress("read", 0, 5)
        (task,) = bars.tasks
        assert (task.completed, task.total) == (0, 5)


def test_an_error_goes_to_standard_error(capsys):
    say_error("BrokenSeries [gap]: series 0123: a slice is missing")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "ctflow: BrokenSeries [gap]: series 0123: a slice is missing\n"


def series(**changes):
    segment = {
        "number": 1, "label": "tumour", "voxels": 10, "volume_ml": 1.234, "longest_diameter_mm": 15.55,
        "centroid_mm": [1.0, -2.0, 3.5], "components": 2,
    }  # fmt: skip
    result = {
        "status": "done",
        "series": {"digest": "abc123", "shape": [20, 64, 64], "spacing_mm": [2.5, 0.7, 0.7]},
        "stage_seconds": {"read": 0.5, "segment": 1.0},
        "segments": [segment, {**segment, "number": 2, "label": "cyst", "voxels": 0}],
        "statement": None,
        "warnings": ["lossy"],
        "folder": "1.2.3",
        "error": None,
    }
    return {**result, **changes}


def test_a_report_names_findings_folder_and_warnings(tmp_path):
    stream = io.StringIO()
    (tmp_path / "1.2.3").mkdir()
    for name in ("segmentation.dcm", "preview.png", "report.html"):
        (tmp_path / "1.2.3" / name).touch()
    refused = series(status="refused", error={"message": "series def456: gap"})
    empty = series(statement="The algorithm marked nothing, which does not exclude disease.")
    document = {"research_only": "RESEARCH ONLY - NOT FOR CLINICAL USE", "series": [series(), refused, empty]}
    say_report(document, tmp_path, stream)
    shown = stream.getvalue()
    assert shown.startswith("RESEARCH ONLY")
    for expected in (
        "tumour",
        "1.23",
        "15.6",
        "1.0, -2.0, 3.5",
        "warning: lossy",
        f"{tmp_path}/1.2.3/segmentation.dcm, preview.png, report.html\n",
    ):
        assert expected in shown
    assert "cyst" not in shown
    assert "series def456: gap" in shown
    assert "marked nothing" in shown
    assert "20 x 64 x 64 voxels of 2.5 x 0.7 x 0.7 mm  in 1.5 s" in shown


def test_an_inspection_shows_verdict_geometry_and_unreadable_files():
    stream = io.StringIO()
    entry = {
        "digest": "abc", "selected": True, "reason": "selected", "message": "eligible",
        "warnings": ["a localizer omitted"],
        "description": {"modality": "CT", "body_part": None},
        "geometry": {"shape": [20, 64, 64], "spacing_mm": [2.5, 0.7, 0.7]},
    }  # fmt: skip
    refused = {**entry, "selected": False, "reason": "gap", "message": "a slice is missing", "geometry": None}
    say_inspection(
        {
            "series": [entry, refused],
            "unreadable": [{"file": "x", "reason": "damaged", "message": "cut short"}],
            "ignored": 3,
        },
        stream,
    )
    shown = stream.getvalue()
    for expected in (
        "selected",
        "rejected (gap)",
        "modality CT",
        "20 x 64 x 64",
        "unreadable: x: cut short",
        "2 series, 3 files",
    ):
        assert expected in shown
    assert "None" not in shown


def test_an_empty_folder_is_said():
    stream = io.StringIO()
    say_inspection({"series": [], "unreadable": [], "ignored": 0}, stream)
    assert "no DICOM series found" in stream.getvalue()


def test_engines_and_the_script_are_shown():
    stream = io.StringIO()
    backends = [
        {"name": "eager", "available": True, "reason": "torch"},
        {"name": "x", "available": False, "reason": "no"},
    ]
    say_engines({"backends": backends, "monai_deploy": {"has_exec": False, "reason": "repair: pip"}}, stream)
    assert "needs repair" in stream.getvalue()
    assert "unavailable" in stream.getvalue()
    say_engines({"backends": [], "monai_deploy": {"has_exec": True, "reason": "fine"}}, stream)
    assert "ready" in stream.getvalue()


def engines_of_a_cache(**change):
    engine = {
        "name": "plan-" + "0" * 32, "state": "ready", "reason": None, "bytes": 31_400_000, "kind": "plan",
        "made": "2026-11-21T12:53:30+00:00", "version": "torch 2.13.0+cpu, opset 20, monai 1.6.1, onnx 1.23.2, more 1",
        "network": "SwinUNETR", "weights_digest": "d" * 64, "precision": "fp16", "roi": [96, 96, 96],
        "batch_range": [1, 8], "device": "NVIDIA H200, compute capability 9.0, driver 580.159.04",
    }  # fmt: skip
    choice = {
        "name": "choice-" + "0" * 32,
        "state": "ready",
        "reason": None,
        "backend": "openvino",
        "precision": "fp32",
        "made": "2026-11-21T12:53:30+00:00",
        "model": "Spleen 1.2",
        "device": "AMD EPYC, 2 CPUs",
    }
    return {
        "backends": [
            {"name": "tensorrt", "available": False, "reason": "the package is not installed: " + "pip " * 20}
        ],
        "monai_deploy": {"has_exec": True, "reason": "fine"},
        "cache": {"folder": "/cache", "problem": None},
        "engines": [engine, {**engine, "state": "unreadable", "reason": "because " * 12, "kind": None}],
        "choices": [{**choice, "window_seconds": {"openvino fp32": 0.7}}, {**choice, "window_seconds": {}}],
        **change,
    }


def test_engines_fit_a_terminal(monkeypatch):
    for width in (80, 120):
        monkeypatch.setenv("COLUMNS", str(width))
        stream = Terminal()
        say_engines(engines_of_a_cache(), stream)
        lines = [Text.from_ansi(line).plain.rstrip() for line in stream.getvalue().splitlines()]
        assert max(map(len, lines)) <= width
        assert all(line.startswith("  ") or not line or line[0] != " " for line in lines)
        assert sum("because" in line for line in lines) == (2 if width == 80 else 1)
        assert f"plan-{'0' * 32}  ready          31.4 MB  2026-11-21" in lines


def test_engines_in_a_pipe_keep_a_line_for_each_fact():
    stream = io.StringIO()
    say_engines(engines_of_a_cache(), stream)
    lines = stream.getvalue().splitlines()
    assert "  " + "because " * 12 in lines
    assert "  by torch 2.13.0+cpu, opset 20, monai 1.6.1, onnx 1.23.2, more 1" in lines
    assert "  for NVIDIA H200, compute capability 9.0, driver 580.159.04" in lines
    assert "remove" not in stream.getvalue()
