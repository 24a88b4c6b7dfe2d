"""What `ctflow serve` does: settings from the file and the command line, then a node until a signal ends it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctflow.core.errors import SettingsInvalid
from ctflow.core.requirements import check_requirements
from ctflow.node.log import close_node_log, set_up_node_log
from ctflow.node.settings import ServiceSettings, explain_settings, read_settings
from ctflow.settings.run import Settings, settings_from_values


def node_settings(config: Path | None, given: Mapping[str, Any], environment: Mapping[str, str]) -> ServiceSettings:
    """The site's settings; what was typed takes the place of what the file says.

    Args:
        config: The node's YAML file, or None.
        given: Fields of `ServiceSettings` as typed; None and False mean "not given".
        environment: Environment variables.

    Raises:
        SettingsInvalid: The file is wrong, or what was typed does not go with it.
    """
    settings = read_settings(config, environment)
    typed = {name: value for name, value in given.items() if value not in (None, False)}
    try:
        return replace(settings, **typed)
    except ValueError as error:
        words = ", ".join(f"--{name.replace('_', '-')}" for name in typed)
        raise SettingsInvalid(f"{words}: {error}: give another, or change the file", reason="invalid-value") from None


def check_command(
    config: Path | None, given: Mapping[str, Any], environment: Mapping[str, str], say: Callable[[str], None]
) -> int:
    """Say what the settings mean, in lines for a person, and open what they name.

    Raises:
        CtflowError: The file is wrong, or something cannot be opened: the error that the node would end with.
    """
    check_requirements("serve")
    from ctflow.node.check import opened  # noqa: PLC0415  # packages of the extra `serve`

    settings = node_settings(config, given, environment)
    run = _settings_of_runs(settings, environment)
    say(explain_settings(replace(settings, roi=run.roi)))
    for line in opened(settings, run):
        say(line)
    return 0


def _settings_of_runs(settings: ServiceSettings, environment: Mapping[str, str]) -> Settings:
    """How each series is run: what the file says, and else the environment."""
    device = None if len(settings.devices) != 1 else settings.devices[0]
    return settings_from_values({"engine": settings.engine, "device": device, "roi": settings.roi}, environment)


def serve_command(config: Path | None, given: Mapping[str, Any], environment: Mapping[str, str]) -> int:
    """Be a node until SIGTERM or SIGINT.

    Raises:
        CtflowError: The node cannot start, or its model cannot be opened.
    """
    stop = threading.Event()
    before = {each: signal.signal(each, lambda *_: stop.set()) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        check_requirements("serve")
        from ctflow.node.node import run_node  # noqa: PLC0415  # packages of the extra `serve`

        settings = node_settings(config, given, environment)
        run = _settings_of_runs(settings, environment)
        handler = set_up_node_log(settings.log)
        try:
            if not stop.is_set():
                run_node(settings, run, stop)
        finally:
            close_node_log(handler)
    finally:
        for each, handled in before.items():
            signal.signal(each, handled)
    return 0
