"""`ctflow bench compare`: a table, a chart and a JSON document of every configuration on this machine."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctflow.core.atomic import make_output_folder, output_error_from_oserror
from ctflow.core.entry_point import interrupted_by_signals
from ctflow.core.errors import EXIT_DONE, EXIT_PARTLY, SettingsInvalid
from ctflow.report.terminal import progress_on
from ctflow.settings.run import model_path_from_value, read_environment, settings_from_values

if TYPE_CHECKING:
    from ctflow.bench.compare import Comparison

log = logging.getLogger(__name__)


def compare_command(
    model_path: str | None,
    given_options: Mapping[str, str | bool | None],
    output: Path | None,
    *,
    shape: tuple[int, int, int],
    seed: int,
    overlaps: Sequence[float],
    repeats: int,
    configurations: str | None,
    pythons: Sequence[str],
    limit_s: float,
    measure: bool,
) -> int:
    """Compare configurations; the last line on standard output is the result as one JSON document.

    Args:
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        given_options: Settings as typed (`ctflow.settings.run.OPTIONS`); device and cache are used.
        output: Gets compare.json after each configuration, compare.png, and configurations/ with each one's words and
            masks: the same command goes on where it was ended.
        shape: Voxels of the phantom.
        seed: Of the phantom.
        overlaps: Each is measured.
        repeats: Timed volumes of each configuration and overlap.
        configurations: Ids with commas; None measures all.
        pythons: ID=PATH each.
        limit_s: A configuration that takes longer is ended.
        measure: Whether to measure configurations that are not in the output's configurations/ yet.

    Returns:
        0, also where this machine cannot run a configuration: the document says why; 6 if a configuration crashed.

    Raises:
        CtflowError: An argument is wrong, the bundle cannot be read, or the output cannot be written.
    """
    environment = read_environment()
    settings = settings_from_values(given_options, environment)
    folder = model_path_from_value(model_path, environment)
    if output is None and not measure:
        what = "--only-kept shows the stored results of an earlier comparison: name its folder with -o"
        raise SettingsInvalid(what, reason="nothing-kept")
    from ctflow.bench.compare import Comparison, all_devices, check_comparison  # noqa: PLC0415  # torch: seconds
    from ctflow.bundle import demonstration_bundle, find_bundle  # noqa: PLC0415
    from ctflow.report.comparison import say_comparison  # noqa: PLC0415

    comparison = Comparison(
        model=find_bundle(Path(folder)) if folder else demonstration_bundle(),
        devices=all_devices(settings.device),
        shape=shape,
        seed=seed,
        overlaps=tuple(overlaps),
        repeats=repeats,
        only=tuple(name.strip() for name in configurations.split(",")) if configurations else (),
        pythons=_interpreters(pythons, check=measure),
        cache=settings.cache,
        limit_s=limit_s,
        kept=None if output is None else output / "configurations",
        measure=measure,
    )
    check_comparison(comparison)  # before anything is made
    if output is not None and measure:
        make_output_folder(output)  # before the work
    draw = _chart_in(output)
    document = _compared(comparison, output)
    say_comparison(document)
    draw(document)
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    crashed = any(each["status"] == "crashed" for each in document["configurations"])
    return EXIT_PARTLY if crashed else EXIT_DONE


def _compared(comparison: Comparison, output: Path | None) -> dict[str, Any]:
    """The result; each configuration is shown, and written, when it is done."""
    from ctflow.bench.compare import compare_configurations  # noqa: PLC0415
    from ctflow.report.comparison import line_of_configuration  # noqa: PLC0415
    from ctflow.report.result import write_result  # noqa: PLC0415

    def heard(document: Mapping[str, Any]) -> None:
        log.info(line_of_configuration(document["configurations"][-1]))
        if output is not None:
            write_result(document, output / "compare.json")

    try:
        with progress_on(sys.stderr) as progress, interrupted_by_signals():  # no measurement outlives its comparison
            return compare_configurations(comparison, progress, heard)
    except OSError as error:  # phantom and configurations lie in files
        raise output_error_from_oserror(error, "the comparison's files") from error


def _chart_in(output: Path | None) -> Callable[[Mapping[str, Any]], None]:
    """What draws a comparison where there is a folder and matplotlib; made before the work, so that the log says so."""
    from ctflow.report.charts import can_draw, comparison_figure, write_chart  # noqa: PLC0415

    if output is None or not can_draw("compare.png"):
        return lambda _: None
    return lambda document: write_chart(comparison_figure(document), output / "compare.png")


def _interpreters(texts: Sequence[str], *, check: bool) -> dict[str, str]:
    """Configuration -> program, by its absolute path: each configuration is measured in a folder of its own."""
    found = {}
    for text in texts:
        configuration, sign, path = text.partition("=")
        if not (configuration and sign and path):
            raise SettingsInvalid(f"--python: {text!r} is not ID=PATH", reason="invalid-value")
        program = shutil.which(path)
        if program is None and check:
            raise SettingsInvalid(f"--python: {path!r} is not a program that starts here", reason="invalid-value")
        found[configuration] = str(Path(program or path).absolute())
    return found
