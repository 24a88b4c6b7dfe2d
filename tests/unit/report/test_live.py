"""A cohort's run on a terminal and in a log."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest
from rich.console import Console

from cohort_rows import DONE, FAILED, REJECTED
from ctflow.cohort.watch import NodeState
from ctflow.report.cohort import live
from ctflow.report.cohort.live import Rate, RowBars, RowLines, RowsShown, rate_in_words, rows_display, time_in_words


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_each_quarter_and_each_minute(monkeypatch):
    stream, clock = io.StringIO(), Clock()
    lines = RowLines(stream, clock)
    lines("rows", 0, 8)  # the pipeline's own count says nothing
    lines("prepare engine", 0, 1)
    lines("prepare engine", 1, 1)
    lines.shown.began(8, {"done": 3, "failed": 0})
    lines.shown.committed(FAILED)
    lines.shown.node(NodeState("a", 2, 1, 0.93))
    clock.now = 61
    lines.shown.node(NodeState("b", 4, 1))
    for outcome in (DONE, DONE, DONE, REJECTED):
        lines.shown.committed(outcome)
    said = stream.getvalue().splitlines()
    assert said[0] == "preparing the engine: 1 of 1"
    assert [line.split(";")[0] for line in said if line.startswith("segmenting rows")] == [
        "segmenting rows: 3 of 8",
        "segmenting rows: 4 of 8",
        "segmenting rows: 4 of 8",
        "segmenting rows: 6 of 8",
        "segmenting rows: 8 of 8",
    ]
    assert "; 1 failed" in said[2]
    assert said[-3].startswith("segmenting rows: 8 of 8; 1 failed, 1 rejected; ")
    assert said[-2:] == ["  a: 2 under way, 1 done, GPU 93 %", "  b: 4 under way, 1 done"]


def test_rate_and_time_left_follow_the_last_commits():
    clock = Clock()
    rate = Rate(clock)
    assert rate.a_second is None
    for _ in range(1000):
        clock.now += 2
        rate.add()
    assert rate.a_second == pytest.approx(0.5)
    assert rate.left_s(100) == pytest.approx(200)
    for _ in range(1000):  # faster now: what was long ago counts no more
        clock.now += 0.1
        rate.add()
    assert rate.a_second == pytest.approx(10, rel=0.01)
    clock.now += 60  # nothing is committed any longer
    assert rate.a_second < 4


@pytest.mark.parametrize(
    ("a_second", "words"),
    [(None, ""), (0.0, ""), (4.06, "4.1 CT/s"), (0.5, "30.0 CT/min"), (0.01, "36.0 CT/h"), (1e-4, "0.4 CT/h")],
)
def test_a_rate_is_told_in_a_unit_that_fits(a_second, words):
    assert rate_in_words(a_second) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59, "59 s"), (100, "2 min"), (7100, "118 min"), (12_000, "3 h 20 min"), (190_000, "2 d 4 h")],
)
def test_a_time_is_told_in_units_that_fit(seconds, words):
    assert time_in_words(seconds) == words


def drawn(width: int, machines: int) -> list[str]:
    stream = io.StringIO()
    bars = live._Bars(Console(file=stream, width=width, force_terminal=True, color_system=None))
    shown = RowBars(bars).shown
    shown.began(100_000, {"done": 25_000})
    for outcome in (DONE, FAILED, REJECTED):
        shown.committed(outcome)
    for number in range(machines):
        shown.node(NodeState(f"gpu-node-{number:02d}.cluster.example.org", 5, 1200, 0.97))
    with bars.console.capture() as capture:
        for each in bars.get_renderables():
            bars.console.print(each)
    return [line.rstrip() for line in capture.get().splitlines() if line.strip()]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_gets_a_bar_and_a_line_a_machine(width):
    first, second, *machines = drawn(width, 2)
    assert first.startswith("segmenting rows ")
    assert first.endswith(" 25,003/100,000")
    assert "1 failed, 1 rejected" in second
    assert len(machines) == 2
    assert machines[0].startswith("  gpu-node")
    assert machines[0].split("5 under way")[1].split() == ["1,200", "done", "GPU", "97", "%"]
    assert all(len(line) <= width for line in (first, second, *machines))


def test_hundred_machines_do_not_fill_the_terminal():
    lines = drawn(80, 100)
    assert len(lines) == 11
    assert lines[-1] == "  and 92 machines more"


def test_a_machine_that_is_gone_is_not_shown():
    shown = RowsShown(lambda: None)
    shown.node(NodeState("a", 3, 1))
    shown.node(NodeState("b", 3, 1))
    shown.node(NodeState("a", 0, 1, is_gone=True))
    assert [machine[0] for machine in shown.machines] == ["b"]


def test_a_name_of_a_machine_draws_nothing_itself():
    shown = RowsShown(lambda: None)
    shown.node(NodeState("\x1b[2J[red]a", 0, 0))
    assert shown.machines[0][0] == "?[2J[red]a"


def test_a_display_is_drawn_from_several_threads_and_goes_at_the_end():
    stream = Terminal()
    with rows_display(stream) as display:
        display("prepare engine", 0, 1)
        display("prepare engine", 1, 1)
        display.shown.began(400, {})
        threads = [
            threading.Thread(target=lambda: [display.shown.committed(DONE) for _ in range(100)]) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert display.shown.done == 400
    assert "400/400" in stream.getvalue()


def test_the_log_scrolls_above_the_display_and_is_as_before_afterwards(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "__stderr__", stream)
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with rows_display(stream) as display:
            display.shown.began(4, {})
            assert handler.stream is not stream
            logging.getLogger("ctflow.test").warning("row 1 fails")
        assert handler.stream is stream
        assert "row 1 fails\n" in stream.getvalue()
    finally:
        logging.getLogger().removeHandler(handler)
