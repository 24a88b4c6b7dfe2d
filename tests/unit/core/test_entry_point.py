from __future__ import annotations

import logging
import os
import signal
import threading
import warnings

import pytest

from ctflow.core import errors
from ctflow.core.entry_point import exit_code_of, interrupted_by_sigterm, set_up_logging


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
    said, reason = [], min(kind.REASONS)

    def main():
        raise kind("the series is gone", reason=reason)

    assert exit_code_of(main, say=said.append) == code
    assert said == [f"{kind.__name__} [{reason}]: the series is gone"]


def test_every_error_of_the_tree_has_an_exit_code():
    codes = {leaf.__name__: leaf.exit_code for leaf in leaves(errors.CtflowError)}
    assert set(codes.values()) == {64, 2, 3, 4, 5, 7, 70}
    assert [name for name, code in codes.items() if code == errors.EXIT_UNEXPECTED] == ["Unexpected"], "of no kind"


def test_the_work_decides_the_code_when_nothing_is_raised():
    assert exit_code_of(lambda: 6, say=pytest.fail) == 6


def test_an_interrupt_is_130():
    def main():
        raise KeyboardInterrupt

    said = []
    assert exit_code_of(main, say=said.append) == 130
    assert said == ["interrupted"]


def test_an_unexpected_error_shows_its_place_with_debug_and_its_text_never():
    def inner():
        raise ValueError("born 19370213")

    def main():
        try:
            inner()
        except ValueError as error:
            raise RuntimeError("Doe^John") from error

    said = []
    assert exit_code_of(main, say=said.append) == 70
    assert said == ["unexpected RuntimeError; run again with --debug to see where"]
    assert exit_code_of(main, say=said.append, debug=True) == 70
    assert said[1].startswith("Traceback")
    assert "in inner" in said[1]
    assert said[1].index("ValueError") < said[1].rindex("RuntimeError")
    assert "Doe^John" not in said[1].replace('raise RuntimeError("Doe^John")', "")
    assert "19370213" not in said[1].replace('raise ValueError("born 19370213")', "")


def test_log_level_is_set(monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    with warnings.catch_warnings():
        set_up_logging("DEBUG")
        warnings.warn(
            "a library quotes a value: Doe^John", stacklevel=1
        )  # an error in these tests, were it not ignored
    assert root.level == logging.DEBUG
    with warnings.catch_warnings():
        set_up_logging("WARN")
        assert root.level == logging.WARNING
        set_up_logging(None)
        assert root.level == logging.WARNING


def test_sigterm_is_an_interrupt_where_that_is_wanted():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupted_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_than_the_main_one_runs_without_handling_signals():
    ran = []

    def run():
        with interrupted_by_sigterm():
            ran.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGTERM)]
