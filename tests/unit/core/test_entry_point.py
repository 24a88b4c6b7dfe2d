from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import warnings

import pytest

from ctflow.core import errors
from ctflow.core.entry_point import exit_code_of, interrupted_by_signals, set_up_logging


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


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_is_an_interrupt_where_that_is_wanted(sent):
    before = signal.getsignal(sent)
    with pytest.raises(KeyboardInterrupt), interrupted_by_signals():
        os.kill(os.getpid(), sent)
    assert signal.getsignal(sent) is before


def test_nohup_keeps_a_closed_terminal_from_ending_the_work():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with interrupted_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_file_never_gets_the_number_of_a_closed_standard_stream(tmp_path):
    code = (
        "import os, subprocess, sys; from ctflow.core.entry_point import open_standard_streams\n"
        "open_standard_streams()\n"
        "print('out'); print('err', file=sys.stderr); sys.stdin.read()\n"
        "assert subprocess.run([sys.executable, '-c', 'import os; [os.fstat(n) for n in range(3)]']).returncode == 0\n"
        f"file = open({str(tmp_path / 'numbers')!r}, 'w'); file.write(str(file.fileno()))\n"
    )
    for closed in ("<&-", ">&-", "2>&-", "<&- >&- 2>&-"):
        subprocess.run(["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, code], check=True)
        assert int((tmp_path / "numbers").read_text()) > 2


def test_another_thread_than_the_main_one_runs_without_handling_signals():
    ran = []

    def run():
        with interrupted_by_signals():
            ran.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert ran == [signal.getsignal(signal.SIGTERM)]
