"""What every door does with an error: one message for the person, one exit code for the script."""

from __future__ import annotations

import logging
import traceback
import warnings
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
        # Its text may hold anything the input held, so its type and place are all that is ever shown.
        say(traceback_without_texts(error) if debug else f"unexpected {type(error).__name__}; --debug shows where")
        return EXIT_UNEXPECTED


def traceback_without_texts(error: BaseException) -> str:
    """The traceback of an error and of what led to it, without the errors' texts."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.insert(0, link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    parts = [f"{''.join(traceback.format_tb(each.__traceback__))}{type(each).__name__}" for each in chain]
    return "\n\n".join(["Traceback (without the errors' texts, which may hold patient data):", *parts])


def set_up_logging(level: str | None) -> None:
    """Send log lines to standard error, one a line with its time; and no warnings of libraries, which quote values.

    Args:
        level: DEBUG, INFO, WARNING, ERROR or CRITICAL (WARN is accepted); None means WARNING.
    """
    name = {"WARN": "WARNING", None: "WARNING"}.get(level, level)
    warnings.simplefilter("ignore")
    logging.basicConfig(level=name, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True)
