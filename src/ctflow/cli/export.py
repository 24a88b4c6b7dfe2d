"""`ctflow export`: make engines before they are needed, and show how fast and how exact they are here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctflow.core.errors import SettingsInvalid
from ctflow.core.progress import Progress
from ctflow.report.terminal import progress_on, say_measured
from ctflow.settings.run import Settings, model_path_from_value, read_environment, settings_from_values

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
    environment = read_environment()
    settings = settings_from_values({**given, "cache": output}, environment)
    if settings.cache is None:
        raise SettingsInvalid("no folder for engines: give -o DIR or set CTFLOW_CACHE", reason="missing-folder")
    model_folder = model_path_from_value(model_path, environment)
    # Late: torch and MONAI take seconds to import, which --help and usage errors should not cost.
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415

    bundle = find_bundle(Path(model_folder)) if model_folder else demonstration_bundle()
    model = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
    with progress_on(sys.stderr) as progress:
        _, choice = measured_engine(settings, model, make=True, progress=progress)
    document = asdict(choice)
    say_measured(document)
    click.echo(json.dumps(document, allow_nan=False, separators=(",", ":")))
    return 0


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
