"""`ctflow export` and `ctflow warm`: make engines before they are needed, and show how fast and how exact they are."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.core.progress import Progress
from ctflow.core.requirements import compile_imported
from ctflow.report.terminal import progress_on, say_measured
from ctflow.settings.run import Settings, model_path_from_value, read_environment, settings_from_values

_WRITING = "ctflow.pipeline.write"  # imported last by a run

if TYPE_CHECKING:
    from ctflow.core.model import Model
    from ctflow.engines.request import EngineRequest
    from ctflow.export.selection import Choice


def export_engines(model_path: str | None, output: str | None, given: Mapping[str, str | bool | None]) -> int:
    """Make an engine, compare it with PyTorch in fp32, and time it; "auto" does so with all and keeps the choice.

    Args:
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        output: Folder that keeps the engine; None takes the user's cache.
        given: engine, precision and device as typed.

    Returns:
        The exit code 0.

    Raises:
        CtflowError: The engine cannot be made or used here, or computes something else.
    """
    settings, model = _settings_and_model(model_path, {**given, "cache": output}, "-o")
    with progress_on(sys.stderr) as progress:
        _, choice = measured_engine(settings, model, make=True, progress=progress)
    document = asdict(choice)
    say_measured(document)
    click.echo(json.dumps(document, allow_nan=False, separators=(",", ":")))
    return 0


def _settings_and_model(
    model_path: str | None, given: Mapping[str, str | bool | None], flag: str
) -> tuple[Settings, Model]:
    """What was asked for; the settings have a cache, which `flag` names."""
    environment = read_environment()
    settings = settings_from_values(given, environment)
    if settings.cache is None:
        raise SettingsInvalid(f"no folder for engines: give {flag} DIR or set CTFLOW_CACHE", reason="missing-folder")
    path = model_path_from_value(model_path, environment)
    # Late: torch takes seconds to import, which --help and usage errors should not cost.
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415

    bundle = find_bundle(Path(path)) if path else demonstration_bundle()
    return settings, read_bundle(bundle, settings.config, allow_code=settings.allow_code)


def measured_engine(
    settings: Settings, model: Model, *, make: bool, progress: Progress
) -> tuple[EngineRequest, Choice]:
    """The engine of some settings, made, timed and compared; of "auto" the fastest, whose choice is kept.

    Args:
        settings: Engine, precision, device and cache, which is not None.
        model: The model.
        make: Whether "auto" makes engines that take minutes.
        progress: Receives what is made and measured.

    Returns:
        The request, and the choice.

    Raises:
        CtflowError: The engine cannot be made or used here, or computes something else.
    """
    from ctflow.engines.contract import precision_from_name  # noqa: PLC0415
    from ctflow.engines.registry import batch_range_for, device_from_setting  # noqa: PLC0415
    from ctflow.engines.request import EngineRequest  # noqa: PLC0415
    from ctflow.export.measure import measure_engine  # noqa: PLC0415
    from ctflow.export.prepare import is_made_anywhere  # noqa: PLC0415
    from ctflow.export.selection import Choice, choose_fastest  # noqa: PLC0415

    device = device_from_setting(settings.device)
    # What is made for another machine must be what that machine's GPU will look for.
    elsewhere = settings.engine != "auto" and is_made_anywhere(settings.engine)
    batches = batch_range_for(model.spec, "cuda" if elsewhere else device)
    precision = precision_from_name(settings.precision)
    wanted = EngineRequest(settings.engine, device, precision, model.spec.roi, batches, settings.cache)
    if settings.engine == "auto":
        return wanted, choose_fastest(wanted, model, make=make, progress=progress)
    measured = measure_engine(wanted, model, progress=progress)
    return wanted, Choice(measured.backend, measured.precision, (measured,), measured.batch)


def warm(model_path: str | None, given: Mapping[str, str | bool | None]) -> int:
    """Make the engine of a model, compare it with PyTorch in fp32, open it, and compile byte code that is missing.

    Args:
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        given: engine, precision, device, cache, config and allow_code as typed.

    Returns:
        The exit code 0.

    Raises:
        CtflowError: The model or its engine cannot be used here.
    """
    settings, model = _settings_and_model(model_path, given, "--cache")
    from ctflow.engines.registry import open_engine  # noqa: PLC0415
    from ctflow.export.prepare import prepare_to_open  # noqa: PLC0415

    click.echo(f"model: {model.spec.name} {model.spec.version}, weights {model.weights_digest[:12]}")
    with progress_on(sys.stderr) as progress:
        wanted, choice = measured_engine(settings, model, make=False, progress=progress)
        chosen = choice.of(wanted)
        prepare_to_open(chosen, model, progress=progress)
    name = f"{chosen.backend} {choice.precision}"
    own = [each for each in choice.measured if (each.backend, each.precision) == (chosen.backend, choice.precision)]
    for each in own:
        if each.reason is not None:
            click.echo(f"engine: {name} in {settings.cache}: {each.reason}")
        elif each.parity is not None:
            dice = "nothing marked" if each.parity.dice is None else f"Dice {each.parity.dice:.5f}"
            what = f"{dice}, relative error {each.parity.relative_error:.1e}"
            click.echo(f"agreement: {name} with PyTorch in fp32 on {each.parity.windows} windows of a phantom: {what}")
    start = time.perf_counter()
    try:
        with closing(open_engine(chosen, model)) as engine:
            click.echo(f"engine: {name} on {engine.info.device}, opened in {time.perf_counter() - start:.1f} s")
    except BackendUnavailable:
        if not any(each.reason for each in own):  # else it was made for another machine
            raise
    importlib.import_module(_WRITING)
    compiled, failed = compile_imported()
    unwritable = f"; {failed} have none, and their folders cannot be written" if failed else ""
    click.echo(f"byte code: {compiled} modules compiled{unwritable}")
    return 0
