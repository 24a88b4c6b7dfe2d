"""`ctflow bench ladder`: a table, a chart and a JSON document of every way to segment a volume on this machine."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ctflow.atomic import output_error_from_oserror
from ctflow.config import model_path_from_value, read_environment, settings_from_values
from ctflow.errors import SettingsInvalid
from ctflow.report.terminal import progress_on


def ladder_command(
    model_path: str | None,
    given_options: Mapping[str, str | bool | None],
    output: Path | None,
    *,
    shape: tuple[int, int, int],
    seed: int,
    overlaps: Sequence[float],
    repeats: int,
    rows: str | None,
    pythons: Sequence[str],
) -> int:
    """Measure a ladder; the last line on standard output is the result as one JSON document.

    Args:
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        given_options: Settings as typed (`ctflow.config.OPTIONS`); device and cache are used.
        output: Gets ladder.json and ladder.png.
        shape: Voxels of the phantom.
        seed: Of the phantom.
        overlaps: Each is measured.
        repeats: Timed volumes of each row and overlap.
        rows: Ids with commas; None measures all.
        pythons: ROW=PATH each.

    Returns:
        0, also where rows could not be run: the document says why.

    Raises:
        CtflowError: An argument is wrong, the bundle cannot be read, or the output cannot be written.
    """
    environment = read_environment()
    settings = settings_from_values(given_options, environment)
    folder = model_path_from_value(model_path, environment)
    interpreters = _pairs(pythons)
    from ctflow.bench.ladder import Plan, all_devices, run_ladder  # noqa: PLC0415  # torch takes seconds to import
    from ctflow.bundle import demonstration_bundle, find_bundle  # noqa: PLC0415
    from ctflow.report.ladder import say_ladder  # noqa: PLC0415

    plan = Plan(
        model=find_bundle(Path(folder)) if folder else demonstration_bundle(),
        devices=all_devices(settings.device),
        shape=shape,
        seed=seed,
        overlaps=tuple(overlaps),
        repeats=repeats,
        only=tuple(name.strip() for name in rows.split(",")) if rows else (),
        pythons=interpreters,
        cache=settings.cache,
    )
    if output is not None:
        _make(output)  # before the work
    with progress_on(sys.stderr) as progress:
        document = run_ladder(plan, progress)
    say_ladder(document)
    # Before the files, so that a full disk does not lose the result.
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    if output is not None:
        _write(document, output)
    return 0


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for row, sign, path in pairs:
        if not (row and sign and path):
            raise SettingsInvalid(f"--python: {row + sign + path!r} is not ROW=PATH")
    return {row: path for row, _, path in pairs}


def _make(output: Path) -> None:
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error_from_oserror(error, "the output folder") from error


def _write(document: Mapping[str, Any], output: Path) -> None:
    from ctflow.report.ladder import write_ladder_chart  # noqa: PLC0415
    from ctflow.report.result import write_result  # noqa: PLC0415

    write_result(document, output / "ladder.json")
    write_ladder_chart(document, output / "ladder.png")
