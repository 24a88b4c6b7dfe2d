from __future__ import annotations

import logging

import pytest

from ctflow import errors
from ctflow.door import exit_code_of, set_up_logging


def leaves(kind):
    children = kind.__subclasses__()
    return [leaf for child in children for leaf in leaves(child)] if children else [kind]


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (errors.SettingsInvalid, 64),
        (errors.NoUsableSeries, 2),
        (errors.UnsupportedPixels, 2),
        (errors.BundleInvalid, 3),
        (errors.ParityFailed, 3),
        (errors.BackendUnavailable, 4),
        (errors.DeviceOutOfMemory, 4),
        (errors.NotWritten, 5),
        (errors.StorageFull, 5),
        (errors.PeerRefused, 7),
    ],
)
def test_a_named_error_has_its_exit_code_and_message(kind, code):
    said = []

    def main():
        raise kind("the series is gone")

    assert exit_code_of(main, say=said.append) == code
    assert said == [f"{kind.__name__}: the series is gone"]


def test_every_error_of_the_tree_has_an_exit_code():
    codes = {leaf.__name__: leaf.exit_code for leaf in leaves(errors.CtflowError)}
    assert len(codes) == 15
    assert set(codes.values()) == {64, 2, 3, 4, 5, 7}


def test_a_broken_series_knows_its_rule():
    assert errors.BrokenSeries("a slice is missing", reason="gap").reason == "gap"
    with pytest.raises(ValueError, match="unknown reason"):
        errors.BrokenSeries("what", reason="odd")


def test_the_work_decides_the_code_when_nothing_is_raised():
    assert exit_code_of(lambda: 6, say=pytest.fail) == 6


def test_an_interrupt_is_130():
    def main():
        raise KeyboardInterrupt

    said = []
    assert exit_code_of(main, say=said.append) == 130
    assert said == ["interrupted"]


def test_an_unexpected_error_shows_its_text_only_with_debug():
    def main():
        raise RuntimeError("Doe^John")

    said = []
    assert exit_code_of(main, say=said.append) == 70
    assert said == ["unexpected RuntimeError; --debug shows where"]
    assert exit_code_of(main, say=said.append, debug=True) == 70
    assert "Traceback" in said[1]


def test_log_level_is_set(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    set_up_logging("DEBUG")
    assert root.level == logging.DEBUG
    set_up_logging("WARN")
    assert root.level == logging.WARNING
    set_up_logging(None)
    assert root.level == logging.WARNING
