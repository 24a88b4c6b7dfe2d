"""`ctflow evaluate`: cases with a known truth to a table, a chart and a JSON document."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from ctflow.core.atomic import make_output_folder
from ctflow.report.evaluation import say_evaluation
from ctflow.report.terminal import progress_on
from ctflow.settings.run import model_path_from_value, read_environment, settings_from_values


def evaluate_command(
    folder: Path,
    model_path: str | None,
    given_options: Mapping[str, str | bool | None],
    output: Path | None,
    *,
    reference: bool = False,
    results: Path | None = None,
    rois: Sequence[str] = (),
    least_dice: float | None = None,
) -> int:
    """Evaluate a model on a folder of cases; the last line on standard output is the result as one JSON document.

    Args:
        folder: One case, or a folder of cases.
        model_path: Bundle; None takes the environment's or the demonstration bundle.
        given_options: Settings as typed (`ctflow.settings.run.OPTIONS`).
        output: Gets evaluation.json and evaluation.png, unless every case failed.
        reference: Whether results are also compared with those of the fp32 eager engine.
        results: Output folder of an earlier run, whose SEGs are compared instead of segmenting.
        rois: Names of a truth's regions, if it is an RT Structure Set.
        least_dice: What every case must reach; None asks for nothing.

    Returns:
        0, 6 if some cases failed, or the first failure's exit code if all did.

    Raises:
        AccuracyFailed: A case does not reach `least_dice`, or a lesion of at least 10 mm was missed.
        CtflowError: No case could be tried, or the output cannot be written.
    """
    environment = read_environment()
    settings = settings_from_values(given_options, environment)
    # Only the model may come from the environment: the variables of input and output belong to `run`.
    model_folder = model_path_from_value(model_path, environment)
    # Late: torch and MONAI take seconds to import, which --help and usage errors should not cost.
    from ctflow.bench.evaluate import evaluate_folder, require_accuracy  # noqa: PLC0415
    from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle  # noqa: PLC0415
    from ctflow.report.charts import can_draw  # noqa: PLC0415

    model = read_bundle(find_bundle(Path(model_folder)) if model_folder else demonstration_bundle())
    if output is not None:
        make_output_folder(output)  # before the work, which may take hours
    draws = output is not None and can_draw("evaluation.png")
    with progress_on(sys.stderr) as progress:
        document = evaluate_folder(
            folder, model, settings, reference=reference, results=results, rois=rois, progress=progress
        )
    say_evaluation(document)
    # Before the files, so that a full disk does not lose the result.
    click.echo(json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")))
    if output is not None and document["summary"]["cases"]:
        _write(document, output, draws=draws)
    if least_dice is not None:
        require_accuracy(document, least_dice)
    return int(document["exit_code"])


def _write(document: Mapping[str, Any], output: Path, *, draws: bool) -> None:
    from ctflow.report.charts import exactness_figure, write_chart  # noqa: PLC0415
    from ctflow.report.result import write_result  # noqa: PLC0415

    write_result(document, output / "evaluation.json")
    if draws:
        write_chart(exactness_figure(document), output / "evaluation.png")
