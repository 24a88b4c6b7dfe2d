"""What `ctflow serve` does: settings from the file and the command line, then a node until a signal ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctflow.core.entry_point import ending_signals
from ctflow.core.requirements import check_requirements
from ctflow.node.log import close_node_log, set_up_node_log
from ctflow.node.settings import ServiceSettings, explain_settings, given_settings, values_and_origins


def check_command(
    config: Path | None, given: Mapping[str, Any], environment: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Say what the settings mean, each value and where it comes from, and open what they name.

    Args:
        config: The node's YAML file, or None.
        given: Fields of `ServiceSettings` as typed; None and False mean "not given".
        environment: Environment variables.
        say: Shows a line.

    Raises:
        CtflowError: The file is wrong, or something cannot be opened: the error that the node would end with.
    """
    check_requirements("serve")
    from ctflow.node.check import opened  # noqa: PLC0415  # packages of the extra `serve`

    found = given_settings(config, environment, given)
    settings = found.read(ServiceSettings)
    for line in (explain_settings(settings), *values_and_origins(settings, found)):
        say(line)
    for line in opened(settings, settings.run):
        say(line)
    return 0


def serve_command(config: Path | None, given: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """Be a node until SIGTERM or SIGINT.

    Raises:
        CtflowError: The node cannot start, or its model cannot be opened.
    """
    stop = threading.Event()
    before = {each: signal.signal(each, lambda *_: stop.set()) for each in {signal.SIGINT, *ending_signals()}}
    try:
        check_requirements("serve")
        from ctflow.node.node import run_node  # noqa: PLC0415  # packages of the extra `serve`

        settings = given_settings(config, environment, given).read(ServiceSettings)
        handler = set_up_node_log(settings.log)
        try:
            if not stop.is_set():
                run_node(settings, settings.run, stop)
        finally:
            close_node_log(handler)
    finally:
        for each, handled in before.items():
            signal.signal(each, handled)
    return 0
