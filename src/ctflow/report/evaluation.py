"""Display of an evaluation: one row per case, and figures by size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ctflow.report.tables import console_on, new_table, number_text

_NONE = "-"


def say_evaluation(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show an evaluation.

    Args:
        document: The result of `ctflow.bench.evaluate.evaluate_folder`.
        stream: Gets the text; None takes standard output.
    """
    console = console_on(stream)
    if document["research_only"]:
        console.print(Text(str(document["research_only"]), style="bold yellow"))
    model, engine = document["model"], document["engine"]
    head = Text.assemble("model ", (f"{model['name']} {model['version']}", "bold"))
    if engine:
        head.append(f", {engine['backend']} {engine['precision']} on {engine['device']}")
    console.print(head)
    console.print(_table_of_cases(document["cases"]))
    for case in document["cases"]:
        if case["error"]:
            console.print(Text.assemble("case ", (case["name"], "bold"), ": ", ("failed", "red")))
            console.print(Text(f"  {case['error']['type']}: {case['error']['message']}"))
    if len(document["cases"]) == 1 and (document["cases"][0]["lesions"] or document["cases"][0]["false_positives"]):
        _say_only_case(console, document["cases"][0])
    elif document["summary"]["cases"]:
        _say_summary(console, document["summary"])


def _table_of_cases(cases: Sequence[Mapping[str, Any]]) -> Table:
    compared = any(case["reference"] for case in cases)
    headings = ["case", "Dice", "HD95 mm", "true ml", "error ml", "found", "false", "seconds"]
    table = new_table([*headings, *(["Dice to fp32", "voxels differing"] if compared else [])], left=("case",))
    for case in cases:
        table.add_row(str(case["name"]), *_cells(case), *(_reference_cells(case["reference"]) if compared else ()))
    return table


def _cells(case: Mapping[str, Any]) -> tuple[str, ...]:
    if case["error"]:
        return (_NONE,) * 7
    lesions = case["lesions"]
    return (
        number_text(case["dice"], 3),
        number_text(case["lesions_hausdorff95_mm"], 1),
        number_text(case["volume_truth_ml"], 2),
        f"{case['volume_error_ml']:+.2f}",
        f"{sum(lesion['hit'] for lesion in lesions)} of {len(lesions)}",
        str(len(case["false_positives"]) + case["false_positives_left_out"]),
        number_text(case["seconds"], 1),
    )


def _reference_cells(reference: Mapping[str, Any] | None) -> tuple[str, str]:
    return (number_text(reference["dice"], 6), str(reference["voxels_differing"])) if reference else (_NONE, _NONE)


def _say_only_case(console: Console, case: Mapping[str, Any]) -> None:
    """Show its lesions and false findings, and the meaning of the distances."""
    if case["lesions"]:
        console.print(_table_of_lesions(case))
    if case["false_positives"]:
        console.print(_table_of_false_findings(case))
    if case["false_positives_left_out"]:
        console.print(f"and {case['false_positives_left_out']} smaller false findings")
    if case["hausdorff95_mm"] is not None:
        console.print(
            "HD95: 95th percentile of surface distances, mean of the lesions that were found; of the whole masks, with "
            f"false findings and missed lesions, {case['hausdorff95_mm']:.1f} mm"
        )


def _table_of_false_findings(case: Mapping[str, Any]) -> Table:
    """The findings where there is no lesion, the largest first."""
    table = new_table(("false finding", "volume ml", "as a sphere, mm", "centroid mm (L, P, S)"))
    for place, found in enumerate(case["false_positives"], start=1):
        volume, diameter = f"{found['volume_ml']:.3f}", f"{found['equivalent_diameter_mm']:.1f}"
        table.add_row(str(place), volume, diameter, ", ".join(f"{mm:.1f}" for mm in found["centroid_mm"]))
    return table


def _table_of_lesions(case: Mapping[str, Any]) -> Table:
    """Each lesion of the only case, the largest first."""
    table = new_table(("true lesion", "volume ml", "longest diameter mm", "found", "Dice", "HD95 mm"))
    lesions = sorted(case["lesions"], key=lambda lesion: -lesion["volume_ml"])
    for place, lesion in enumerate(lesions, start=1):
        verdict = Text("yes", style="green") if lesion["hit"] else Text("no", style="red")
        volume, longest = f"{lesion['volume_ml']:.2f}", f"{lesion['longest_diameter_mm']:.1f}"
        distance = number_text(lesion["hausdorff95_mm"], 1)
        table.add_row(str(place), volume, longest, verdict, number_text(lesion["dice"], 3), distance)
    return table


def _say_summary(console: Console, summary: Mapping[str, Any]) -> None:
    numbers = ("lesions", "found", "sensitivity", "mean Dice", "mean HD95 mm", "false", "false per case")
    table = new_table(("true lesion, mm", *numbers), left=("true lesion, mm",))
    for row in summary["by_size"]:
        table.add_row(f"{row['from_mm']:.0f} to {row['to_mm']:.0f}", *_tally_cells(row))
    table.add_row("all", *_tally_cells(summary["overall"]), style="bold")
    console.print(table)
    console.print(
        f"mean Dice of {summary['cases_with_truth']} cases with lesions: {number_text(summary['mean_dice'], 3)}"
    )
    free = summary["tumour_free"]
    if free["cases"]:
        console.print(
            f"cases without lesions: nothing larger than {free['limit_ml']} ml in {free['clean']} of {free['cases']}"
        )


def _tally_cells(tally: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        str(tally["lesions"]),
        str(tally["hits"]),
        number_text(tally["sensitivity"], 2),
        number_text(tally["mean_dice"], 3),
        number_text(tally["mean_hausdorff95_mm"], 1),
        str(tally["false_positives"]),
        number_text(tally["false_positives_a_case"], 2),
    )
