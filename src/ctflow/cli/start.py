"""`ctflow` as a program: the packages under it are checked before one of them is imported."""

from __future__ import annotations

import sys

from ctflow.core.entry_point import exit_code_of, interrupted_by_signals, open_standard_streams
from ctflow.core.requirements import check_requirements


def main() -> int:
    """Run the command line, or say in one line which package keeps it from running.

    Returns:
        The exit code by ctflow's table (`ctflow.core.errors`).
    """
    open_standard_streams()
    with interrupted_by_signals():  # from here on, as what is imported takes a second
        return exit_code_of(_run, say=_say)


def _say(message: str) -> None:
    sys.stderr.write(f"ctflow: {message}\n")


def _run() -> int:
    check_requirements()
    from ctflow.cli.main import main as run  # noqa: PLC0415  # imports what was checked

    return run()
