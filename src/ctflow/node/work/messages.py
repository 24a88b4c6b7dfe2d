"""What the node and a worker's process say to each other, and what a worker needs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ctflow.core.errors import CtflowError
from ctflow.node.journal.records import DecidedRun, Job, Why, WorkerResult
from ctflow.node.rules import Rule
from ctflow.settings.run import Settings


@dataclass(frozen=True)
class ModelChoice:
    """A model as the settings name it.

    Attributes:
        name: Its name; "" for the only one.
        bundle: None is the demonstration bundle.
        settings: How it runs a series without options of a rule.
    """

    name: str
    bundle: Path | None
    settings: Settings


@dataclass(frozen=True)
class Setup:
    """Everything that a worker needs.

    Attributes:
        bundle: Of the only model; None is the demonstration bundle.
        settings: The node's, for the only model and for what is the same for all.
        rules: The site's.
        log_level: The node's.
        models: Where there are several; else the bundle is the only one.
        engines_open: Most models that are open at a time; None leaves it to the device.
    """

    bundle: Path | None
    settings: Settings
    rules: tuple[Rule, ...] = ()
    log_level: int = logging.INFO
    models: tuple[ModelChoice, ...] = ()
    engines_open: int | None = None

    @property
    def choices(self) -> tuple[ModelChoice, ...]:
        """Its models: those that are named, or the only one."""
        return self.models or (ModelChoice("", self.bundle, self.settings),)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of its models."""
        return tuple(each.name for each in self.choices)

    @property
    def decides(self) -> bool:
        """Whether models and priority of a series are decided before it runs."""
        return bool(self.models) or any(rule.priority == "urgent" for rule in self.rules)

    def choice(self, name: str) -> ModelChoice | None:
        """A model by its name; None if the settings do not have it."""
        return next((each for each in self.choices if each.name == name), None)

    def on(self, device: str | None) -> Setup:
        """The same on a device."""
        models = tuple(replace(each, settings=replace(each.settings, device=device)) for each in self.models)
        return replace(self, settings=replace(self.settings, device=device), models=models)


@dataclass(frozen=True)
class Ready:
    """A worker's first message: what it opened.

    Attributes:
        model: Its name.
        version: Its version.
        demonstration: Whether it is a demonstration model.
        gpus: How many there are, even if only one is used.
        tasks: How many tasks the worker takes at a time.
        models: Names of the open models, where the settings name them.
        failed: Those that could not be read or opened, and why.
        demonstrations: Names of those that are for demonstration only.
    """

    model: str
    version: str
    demonstration: bool
    gpus: int
    tasks: int = 1
    models: tuple[str, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)
    demonstrations: tuple[str, ...] = ()


@dataclass(frozen=True)
class HeldModels:
    """The models that a worker has open now, and those that could not be opened, and why."""

    models: tuple[str, ...]
    failed: Mapping[str, str]


@dataclass(frozen=True)
class NotReady:
    """A worker's first message if it could not open: the reason."""

    error: CtflowError


@dataclass(frozen=True)
class Task:
    """One series to run.

    Attributes:
        job: From the journal.
        inbox: Folder of its files.
        results: Gets the result, under `<key>/<set digest>-<basis digest>` (see `basis_of_result`).
        scratch: A folder for links to the files; made and removed.
        calling_ae: AE title of the sender.
    """

    job: Job
    inbox: Path
    results: Path
    scratch: Path
    calling_ae: str


_DONE = Why("done", "")


@dataclass(frozen=True)
class TaskOutcome:
    """A task's outcome: done, set aside (a retry changes nothing), to be retried, or `decided`: its models are known.

    After an unexpected error a worker is no longer sound (its process may have lost the GPU) and is replaced.
    """

    kind: Literal["done", "aside", "again", "decided"]
    why: Why = _DONE
    result: WorkerResult | None = None
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    is_sound: bool = True
    decided: tuple[DecidedRun, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The outcome of the task with this job's key."""

    key: str
    outcome: TaskOutcome
