"""Error handling of every entry point: one message for the user, one exit code for the script."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ctflow.core.errors import EXIT_INTERRUPTED, EXIT_UNEXPECTED, CtflowError, Unexpected

log = logging.getLogger(__name__)
_QUOTING = frozenset({"pydicom", "pynetdicom", "highdicom", "pylibjpeg", "openjpeg", "rle", "jpeg_ls"})


def exit_code_of(main: Callable[[], int], *, say: Callable[[str], None], debug: bool = False) -> int:
    """Run an entry point's work and turn any exception into a message and an exit code.

    Args:
        main: The work; returns its exit code.
        say: Shows one message to the user.
        debug: Whether an unexpected error also shows its traceback.

    Returns:
        The exit code by ctflow's table (`ctflow.core.errors`).
    """
    try:
        return main()
    except CtflowError as error:
        say(error.described)
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # an entry point is the last place that can name an unexpected error
        # Its text may hold anything from the input, so only its type and place are ever shown.
        say(
            traceback_without_texts(error)
            if debug
            else f"unexpected {type(error).__name__}; run again with --debug to see where"
        )
        return EXIT_UNEXPECTED


def unexpected(error: Exception, what: str) -> Unexpected:
    """The named error for an unexpected one, which ends only one series; its traceback goes to the log.

    Args:
        error: Its text may hold anything from the input, and is never shown.
        what: What it ended, without patient data: "series" and a digest.

    Returns:
        The error to record for the series. `show_tracebacks` decides whether the log shows its place.
    """
    log.debug("%s: %s", what, traceback_without_texts(error))
    kind = type(error).__name__
    return Unexpected(f"{what}: unexpected {kind}, a bug in ctflow: --debug, or the node's log, shows where")


def show_tracebacks() -> None:
    """Let the log, with `--debug` and in the node, show the place of `unexpected` errors at any level."""
    log.setLevel(logging.DEBUG)


def traceback_without_texts(error: BaseException) -> str:
    """The traceback of an error and its causes, without the errors' texts."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    parts = [f"{''.join(traceback.format_tb(each.__traceback__))}{type(each).__name__}" for each in chain]
    return "\n\n".join(["Traceback (without the errors' texts, which may hold patient data):", *parts])


def keep_values_out(handler: logging.Handler) -> None:
    """Make a handler drop the log of libraries that quote values of data sets, at any level that a user may set."""
    handler.addFilter(lambda record: record.name.partition(".")[0] not in _QUOTING)


def set_up_logging(level: str | None, *, debug: bool = False) -> None:
    """Send log records to standard error, one per line with its time, without libraries' warnings, which quote values.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL (WARN is accepted); None means WARNING.
        debug: Whether the log shows tracebacks of unexpected errors at any level.
    """
    name = {"WARN": "WARNING", None: "WARNING"}.get(level, level)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=name, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
    for handler in logging.getLogger().handlers:
        keep_values_out(handler)
    log.setLevel(logging.NOTSET)
    if debug:
        show_tracebacks()


def ending_signals() -> frozenset[signal.Signals]:
    """SIGTERM (docker, Slurm, systemd), and SIGHUP (a closed terminal) unless nohup has it ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return frozenset({signal.SIGTERM} if ignored else {signal.SIGTERM, signal.SIGHUP})


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let `ending_signals` end the work as Ctrl-C does: with a cleanup and a note in result.json."""
    if threading.current_thread() is not threading.main_thread():  # Python handles signals only there
        yield
        return
    before = {each: signal.signal(each, signal.default_int_handler) for each in ending_signals()}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def open_standard_streams() -> None:
    """Open those that were closed at the start: no result may get the number that libraries print to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it has this number, the lowest free one
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
