"""What every door does with an error: one message for the person, one exit code for the script."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from ctflow.errors import EXIT_INTERRUPTED, EXIT_UNEXPECTED, CtflowError


def exit_code_of(main: Callable[[], int], *, say: Callable[[str], None], debug: bool = False) -> int:
    """Run a door's work and turn whatever it raises into a message and an exit code.

    Args:
        main: The work; returns its exit code.
        say: Shows one message to the person.
        debug: Whether an unexpected error also shows its traceback.

    Returns:
        The exit code by ctflow's table (`ctflow.errors`).
    """
    try:
        return main()
    except CtflowError as error:
        say(f"{type(error).__name__}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  # a door is the last place that can name an unexpected error
        # Its text may hold anything the input held, so only its type is shown unless the person asks for more.
        say(traceback.format_exc() if debug else f"unexpected {type(error).__name__}; --debug shows where")
        return EXIT_UNEXPECTED


def set_up_logging(level: str | None) -> None:
    """Send log lines to standard error, one a line with its time.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL (WARN is accepted); None means WARNING.
    """
    name = {"WARN": "WARNING", None: "WARNING"}.get(level, level)
    logging.basicConfig(level=name, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
