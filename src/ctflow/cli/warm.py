"""`ctflow warm`: prepare ahead what a first run waits for."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import click

from ctflow.cli.export import measured_engine
from ctflow.core.bytecode import compile_imported
from ctflow.core.errors import BackendUnavailable, SettingsInvalid
from ctflow.report.terminal import progress_on
from ctflow.settings.run import model_path_from_value, read_environment, settings_from_values

_WRITING = "ctflow.pipeline.write"  # imported last by a run


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
    environment = read_environment()
    settings = settings_from_values(given, environment)
    if settings.cache is None:
        raise SettingsInvalid("no folder for engines: give --cache DIR or set CTFLOW_CACHE", reason="missing-folder")
    path = model_path_from_value(model_path, environment)
    # Late: torch takes seconds to import, which --help and usage errors should not cost.
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415
    from ctflow.engines.registry import open_engine  # noqa: PLC0415
    from ctflow.export.prepare import prepare_to_open  # noqa: PLC0415

    bundle = find_bundle(Path(path)) if path else demonstration_bundle()
    model = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
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
