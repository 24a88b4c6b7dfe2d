"""A start's parts are told once, and only where a start was begun."""

from __future__ import annotations

import logging
import time

from ctflow.core.progress import Startup


def test_parts_are_told_once_in_their_order(caplog):
    caplog.set_level(logging.INFO)
    start = Startup()
    start.begin()
    start.lap("imports")
    time.sleep(0.2)
    start.lap("engine")
    start.lap("imports")
    start.first_window()
    start.first_window()
    (record,) = caplog.records
    text, _, parts = record.message.partition(": ")
    seconds = {part.split()[0]: float(part.split()[1]) for part in parts.split(", ")}
    assert list(seconds) == ["imports", "engine"]
    assert 0.2 <= seconds["engine"] < 5
    assert seconds["imports"] > 0.2, "this process began before the tests"
    assert abs(float(text.split()[2]) - sum(seconds.values())) <= 0.11


def test_a_process_that_never_began_tells_nothing(caplog):
    caplog.set_level(logging.INFO)
    start = Startup()
    start.lap("imports")
    start.first_window()
    assert not caplog.records
