"""`ctflow bench ladder`: a table, a chart and a JSON document of every way to segment a volume on this machine."""

from __future__ import annotations

import json
import logging
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ctflow.core.atomic import make_output_folder, output_error_from_oserror
from ctflow.core.errors import EXIT_DONE, EXIT_PARTLY, SettingsInvalid
from ctflow.report.terminal import progress_on
from ctflow.settings.run import model_path_from_value, read_environment, settings_from_values

log = logging.getLogger(__name__)


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
    limit_s: float,
    measure: bool,
) -> int:
    """Measure a ladder; the last line on standard output is the result as one JSON document.

    Args:
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        given_options: Settings as typed (`ctflow.settings.run.OPTIONS`); device and cache are used.
        output: Gets ladder.json after each row, ladder.png, and rows/ with each row's words and masks: the same command
            goes on where it was ended.
        shape: Voxels of the phantom.
        seed: Of the phantom.
        overlaps: Each is measured.
        repeats: Timed volumes of each row and overlap.
        rows: Ids with commas; None measures all.
        pythons: ROW=PATH each.
        limit_s: A row that takes longer is ended.
        measure: Whether to measure rows that are not in the output's rows/ yet.

    Returns:
        0, also where this machine cannot run a row: the document says why; 6 if a row crashed.

    Raises:
        CtflowError: An argument is wrong, the bundle cannot be read, or the output cannot be written.
    """
    environment = read_environment()
    settings = settings_from_values(given_options, environment)
    folder = model_path_from_value(model_path, environment)
    interpreters = _pairs(pythons)
    if output is None and not measure:
        raise SettingsInvalid("--only-kept shows rows that an earlier ladder kept: name its folder with -o")
    from ctflow.bench.ladder import Plan, all_devices, run_ladder  # noqa: PLC0415  # torch takes seconds to import
    from ctflow.bundle import demonstration_bundle, find_bundle  # noqa: PLC0415
    from ctflow.report.ladder import line_of_row, say_ladder, write_ladder_chart  # noqa: PLC0415
    from ctflow.report.result import write_result  # noqa: PLC0415

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
        limit_s=limit_s,
        kept=None if output is None else output / "rows",
        measure=measure,
    )
    if output is not None:
        make_output_folder(output)  # before the work

    def heard(document: Mapping[str, Any]) -> None:
        log.info(line_of_row(document["rows"][-1]))
        if output is not None:
            write_result(document, output / "ladder.json")

    try:
        with progress_on(sys.stderr) as progress, _sigterm_as_interrupt():
            document = run_ladder(plan, progress, heard)
    except OSError as error:  # phantom and rows lie in files
        raise output_error_from_oserror(error, "the ladder's files") from error
    say_ladder(document)
    if output is not None:
        write_ladder_chart(document, output / "ladder.png")
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    return EXIT_PARTLY if any(row["status"] == "crashed" for row in document["rows"]) else EXIT_DONE


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A row's process must not outlive its ladder: it would disturb what is measured next."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for row, sign, path in pairs:
        if not (row and sign and path):
            raise SettingsInvalid(f"--python: {row + sign + path!r} is not ROW=PATH")
    return {row: path for row, _, path in pairs}
