"""What the rules say of a task's series: the models that it runs with, and the volumes that a model computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ctflow.node.journal.records import DecidedRun, Why
from ctflow.node.rules import OTHER_MODELS, RULE_IGNORE, Asking, Rule, Verdict, verdicts_of_scan
from ctflow.node.settings.models import with_options
from ctflow.node.work.messages import ModelChoice, Setup, Task, TaskOutcome
from ctflow.settings.run import Settings

if TYPE_CHECKING:
    from ctflow.dicom.read.scan import Scan


def settings_of(choice: ModelChoice, rule: Rule | None) -> Settings:
    """How a model runs the series of a rule."""
    return with_options(choice.settings, rule.options if rule is not None else None)


def asking_of(choice: ModelChoice, body_parts: Sequence[str]) -> Asking:
    """A model, for which the rules are asked."""
    return Asking(choice.name, body_parts, lambda rule: settings_of(choice, rule).volume)


def verdicts_on(
    task: Task, folder: Path, setup: Setup, choice: ModelChoice, body_parts: Sequence[str]
) -> tuple[Verdict, ...] | TaskOutcome:
    """A model's verdicts on the volumes of a folder's series, of which at least one runs; else the outcome."""
    scan = _scanned(folder)
    if isinstance(scan, TaskOutcome):
        return scan
    verdicts = _verdicts(task, scan, setup, choice, body_parts)
    mixed = _mixed(verdicts)
    if mixed is not None:
        return mixed
    if any(verdict.run for verdict in verdicts):
        return verdicts
    return TaskOutcome("aside", Why(verdicts[0].reason, verdicts[0].message))


def decided(task: Task, folder: Path, setup: Setup, body_parts: Callable[[ModelChoice], Sequence[str]]) -> TaskOutcome:
    """The models that a folder's series runs with, in the order of the settings."""
    scan = _scanned(folder)
    if isinstance(scan, TaskOutcome):
        return scan
    runs = []
    for choice in setup.choices:
        verdicts = _verdicts(task, scan, setup, choice, body_parts(choice))
        mixed = _mixed(verdicts)
        if mixed is not None:
            return mixed
        if verdicts[0].reason == RULE_IGNORE and all(each.reason == RULE_IGNORE for each in verdicts):
            return TaskOutcome("aside", Why(RULE_IGNORE, verdicts[0].message))
        named = [each for each in verdicts if each.reason not in (OTHER_MODELS, RULE_IGNORE)]
        if not named:
            continue
        running = [each for each in named if each.run]
        is_urgent = any(each.by.by is not None and each.by.by.priority == "urgent" for each in running)
        why = None if running else Why(named[0].reason, named[0].message)
        runs.append(DecidedRun(choice.name, int(is_urgent), why))
    return TaskOutcome("decided", decided=tuple(runs))


def _scanned(folder: Path) -> Scan | TaskOutcome:
    from ctflow.dicom.read.scan import scan_folder  # noqa: PLC0415

    scan = scan_folder(folder)
    if scan.unreadable or scan.ignored:
        flaw = scan.unreadable[0].message if scan.unreadable else "not DICOM"
        text = f"{len(scan.unreadable) + scan.ignored} instances cannot be read ({flaw})"
        return TaskOutcome("aside", Why("unreadable", text))
    return scan


def _mixed(verdicts: Sequence[Verdict]) -> TaskOutcome | None:
    """The outcome of a task whose instances belong to several series; None for one."""
    series = {(each.candidate.series.study_uid, each.candidate.series.uid) for each in verdicts}
    if len(series) == 1:  # one SeriesInstanceUID and study give one, unless readers differ on what a UID is
        return None
    return TaskOutcome("aside", Why("mixed-series", f"its instances belong to {len(series)} series"))


def _verdicts(
    task: Task, scan: Scan, setup: Setup, choice: ModelChoice, body_parts: Sequence[str]
) -> tuple[Verdict, ...]:
    return verdicts_of_scan(
        scan,
        setup.rules,
        calling_ae=task.calling_ae,
        asking=asking_of(choice, body_parts),
        names=setup.names,
    )
