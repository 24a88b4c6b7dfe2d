"""What `ctflow serve` and `ctflow rules test` do: a node until a signal ends it, or what one would do with a folder."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctflow.bundle import demonstration_bundle, find_bundle
from ctflow.core.entry_point import ending_signals
from ctflow.core.errors import NoUsableSeries
from ctflow.core.requirements import check_requirements
from ctflow.dicom.read.scan import scan_folder
from ctflow.node.log import close_node_log, set_up_node_log
from ctflow.node.rules import Verdict, verdicts_of_scan
from ctflow.node.settings.explain import explain_settings, values_and_origins
from ctflow.node.settings.service import ServiceSettings, given_settings, read_settings


def check_command(
    config: Path | None,
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    say: Callable[[str], None],
    *,
    network: bool = False,
) -> int:
    """Say what the settings mean, each value and where it comes from, and open what they name.

    Args:
        config: The node's YAML file, or None.
        given: Fields of `ServiceSettings` as typed; None and False mean "not given".
        environment: Environment variables.
        say: Shows a line.
        network: Whether to ask the destinations.

    Raises:
        CtflowError: The file is wrong, or something cannot be opened: the error that the node would end with.
    """
    check_requirements("serve")
    from ctflow.node.check import answers, opened  # noqa: PLC0415  # packages of the extra `serve`

    found = given_settings(config, environment, given)
    settings = found.read(ServiceSettings)
    for line in (explain_settings(settings), *values_and_origins(settings, found)):
        say(line)
    for line in opened(settings, settings.run):
        say(line)
    for line in answers(settings) if network else ():
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


def rules_document(
    folder: Path, config: Path | None, calling_ae: str | None, environment: Mapping[str, str]
) -> dict[str, Any]:
    """Ask the rules about every series of a folder, as the node does.

    Args:
        folder: Searched with all its subfolders.
        config: The node's YAML file; None has no rules.
        calling_ae: AE title of whom the series would come from.
        environment: Environment variables.

    Returns:
        {"series": [...], "unreadable": [...], "ignored": number of files that are not DICOM}; no patient data and no
        free text of the headers.

    Raises:
        SettingsInvalid: The file is wrong.
        BundleInvalid: The file's bundle is; its body parts take part.
        NoUsableSeries: The folder cannot be read, or holds no series to ask about.
    """
    settings = read_settings(config, environment)
    bundle = find_bundle(settings.bundle) if settings.bundle else demonstration_bundle()
    from ctflow.bundle import read_spec  # noqa: PLC0415  # torch, which the node itself never needs

    spec = read_spec(bundle, settings.config, allow_code=settings.allow_code)
    scan = scan_folder(folder)
    verdicts = verdicts_of_scan(
        scan, settings.rules, calling_ae=calling_ae, body_parts=spec.body_parts, volume=settings.volume
    )
    if not verdicts:
        damaged = f" ({len(scan.unreadable)} damaged)" if scan.unreadable else ""
        raise NoUsableSeries(
            f"the folder contains no DICOM series{damaged}: give a folder with series to try the rules on",
            reason="no-dicom",
        )
    return {
        "series": [_entry(verdict) for verdict in verdicts],
        "unreadable": [file.facts for file in scan.unreadable],
        "ignored": scan.ignored,
    }


def _entry(verdict: Verdict) -> dict[str, Any]:
    candidate = verdict.candidate
    known = ("modality", "slices", "slice_spacing_mm", "body_part")
    return {
        "digest": candidate.series.digest,
        "series_instance_uid": candidate.series.uid,
        "run": verdict.run,
        "force": verdict.force,
        "reason": verdict.reason,
        "message": verdict.message,
        "facts": {name: candidate.description[name] for name in known} | {"thickness_mm": verdict.thickness_mm},
    }
