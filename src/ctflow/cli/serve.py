"""What `ctflow serve`, `ctflow rules test` and `ctflow node` do: a node, or what belongs to its data folder."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctflow.bundle import demonstration_bundle, find_bundle
from ctflow.core.entry_point import ending_signals
from ctflow.core.errors import NoUsableSeries, counted
from ctflow.core.requirements import check_requirements
from ctflow.dicom.read.scan import Scan, scan_folder
from ctflow.node.log import close_node_log, set_up_node_log
from ctflow.node.rules import OTHER_MODELS, Asking, Verdict, verdicts_of_scan
from ctflow.node.settings.explain import explain_settings, values_and_origins
from ctflow.node.settings.models import NodeModel, given_options
from ctflow.node.settings.service import ServiceSettings, given_settings, read_settings

PARTLY = 6  # a backup without files that the journal names


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
    for line in opened(settings, settings.run, lambda loc: found.where(loc)[1]):
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
    scan = scan_folder(folder)
    verdicts = {model: _verdicts(scan, settings, model, calling_ae) for model in settings.models or (None,)}
    if not all(verdicts.values()):
        unreadable = f" ({len(scan.unreadable)} cannot be read)" if scan.unreadable else ""
        raise NoUsableSeries(
            f"the folder contains no DICOM series{unreadable}: give a folder with series to try the rules on",
            reason="no-dicom",
        )
    return {
        "series": [_entry(dict(zip(verdicts, each, strict=True))) for each in zip(*verdicts.values(), strict=True)],
        "unreadable": [file.facts for file in scan.unreadable],
        "ignored": scan.ignored,
    }


def _verdicts(
    scan: Scan, settings: ServiceSettings, model: NodeModel | None, calling_ae: str | None
) -> tuple[Verdict, ...]:
    """A model's verdict on every series."""
    from ctflow.bundle import read_spec  # noqa: PLC0415  # torch, which the node itself never needs

    given = (model and model.bundle) or settings.bundle
    bundle, run = find_bundle(given) if given else demonstration_bundle(), settings.run_of(model)
    spec = read_spec(bundle, run.config, allow_code=run.allow_code)
    asking = Asking(model.name if model else "", spec.body_parts, lambda rule: settings.run_of(model, rule).volume)
    names = [each.name for each in settings.models]
    return verdicts_of_scan(scan, settings.rules, calling_ae=calling_ae, asking=asking, names=names)


def _entry(verdicts: Mapping[NodeModel | None, Verdict]) -> dict[str, Any]:
    """What becomes of a series: of the model that runs it first, or else of the first that is named."""
    named = [each for each in verdicts.values() if each.reason != OTHER_MODELS]
    verdict = next((each for each in named if each.run), named[0])
    candidate, rule = verdict.candidate, verdict.by.by
    known = ("modality", "slices", "slice_spacing_mm", "body_part")
    models = {model.name: each for model, each in verdicts.items() if model and each.reason != OTHER_MODELS}
    return {
        "digest": candidate.series.digest,
        "series_instance_uid": candidate.series.uid,
        "run": verdict.run,
        "force": verdict.force,
        "reason": verdict.reason,
        "message": verdict.message,
        "models": {
            name: {"run": each.run, "reason": each.reason, "message": each.message} for name, each in models.items()
        },
        "priority": rule.priority if rule else "routine",
        "options": given_options(rule.options if rule else None),
        "facts": {name: candidate.description[name] for name in known} | {"thickness_mm": verdict.thickness_mm},
    }


def prune_command(
    config: Path | None,
    environment: Mapping[str, str],
    say: Callable[[str], None],
    *,
    dry_run: bool,
    as_json: bool,
) -> int:
    """Remove what the settings' `retention` says, or show what would be removed.

    Args:
        config: The node's YAML file, or None.
        environment: Environment variables.
        say: Shows a line.
        dry_run: Remove nothing.
        as_json: Show one JSON document.

    Raises:
        CtflowError: The settings are wrong, or the journal cannot be read or written.
    """
    check_requirements("serve")
    from ctflow.node.keeping.pruning import prune  # noqa: PLC0415  # packages of the extra `serve`

    settings = read_settings(config, environment)
    document = prune(settings.data, settings.retention, dry_run=dry_run)
    if as_json:
        say(json.dumps(document, indent=2, allow_nan=False))
        return 0
    for line in _table(document, removes=settings.retention.removes):
        say(line)
    return 0


def _table(document: Mapping[str, Any], *, removes: bool) -> list[str]:
    rows = [
        (
            each["series"], each["state"], each["what"], str(each["count"]), f"{each['bytes'] / 1e6:.1f}",
            f"{each['age_days']:.1f}", each["why"],
        )
        for each in document["removals"]
    ]  # fmt: skip
    lines = []
    if rows:
        rows.insert(0, ("series", "state", "what", "number", "MB", "days", "why"))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        lines = ["  ".join([*map(str.ljust, row[:6], widths), row[6]]) for row in rows]
    verb = "would be removed" if document["dry_run"] else "removed"
    total = (
        f"{len(document['removals'])} {verb}, {document['bytes'] / 1e6:.1f} MB; {document['events']} events forgotten"
    )
    lines.append(total.replace("forgotten", "would be forgotten") if document["dry_run"] else total)
    if document.get("postponed"):
        lines.append("a backup is being made: the rest is removed after it")
    if not removes:
        lines.append("the settings remove nothing: give keys of `retention`")
    return lines


def backup_command(
    target: Path, config: Path | None, environment: Mapping[str, str], say: Callable[[str], None], *, copy: bool
) -> int:
    """Make a backup of the data folder.

    Args:
        target: The backup.
        config: The node's YAML file, or None.
        environment: Environment variables.
        say: Shows a line.
        copy: Copy files that could be linked.

    Returns:
        0, or 6 if files are missing that the journal names.
    """
    check_requirements("serve")
    from ctflow.node.keeping.backup import back_up  # noqa: PLC0415  # packages of the extra `serve`

    document = back_up(read_settings(config, environment).data, target, copy=copy)
    say(
        f"{document['instances']} instances and {document['results']} results, {document['bytes'] / 1e6:.1f} MB, "
        f"{counted(document['hard_links'], 'file')} by hard link"
    )
    if document["missing"]:
        missing = counted(document["missing"], "file or folder is", "files or folders are")
        say(f"{missing} missing that the journal names")
    return PARTLY if document["missing"] else 0
