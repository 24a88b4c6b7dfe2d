"""Display of a comparison: a table of configurations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from rich.table import Table
from rich.text import Text

from ctflow.report.tables import console_on, new_table, number_text

_GIB = 2**30


def say_comparison(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show a comparison.

    Args:
        document: The result of `ctflow.bench.compare.compare_configurations`.
        stream: Gets the text; None takes standard output.
    """
    console = console_on(stream)
    console.print(head_of_comparison(document), markup=False, highlight=False)
    for index, overlap in enumerate(overlaps_of(document)):
        console.print(Text(f"\noverlap {overlap['overlap']:g}, {overlap['windows']} windows", style="bold"))
        console.print(_table(document["configurations"], index))
    for configuration in document["configurations"]:
        for words in _reasons(configuration):
            console.print(f"{configuration['id']} ({configuration['text']}) {words}", markup=False, highlight=False)


def line_of_configuration(configuration: Mapping[str, Any]) -> str:
    """A configuration in one line, for a log.

    Args:
        configuration: One of the document's.
    """
    seconds = [f"{result['median_s']:.3f} s at overlap {result['overlap']:g}" for result in _measured(configuration)]
    return f"{configuration['id']} ({configuration['text']}): {', '.join([*seconds, *_reasons(configuration)])}"


def _measured(configuration: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [result for result in configuration.get("results", ()) if not result["reason"]]


def _reasons(configuration: Mapping[str, Any]) -> list[str]:
    """Why a configuration, or one of its overlaps, has no seconds."""
    if configuration["reason"]:
        return [f"{'crashed' if configuration['status'] == 'crashed' else 'not run'}: {configuration['reason']}"]
    results = configuration.get("results", ())
    return [f"not run at overlap {each['overlap']:g}: {each['reason']}" for each in results if each["reason"]]


def head_of_comparison(document: Mapping[str, Any]) -> str:
    """Machine, network and case in a line or two."""
    machine, model, case = document["machine"], document["model"], document["case"]
    gpus = [name if times == 1 else f"{times} x {name}" for name, times in Counter(machine["gpus"]).items()]
    where = ", ".join(gpus) or f"{machine['processors']} processors, no GPU"
    size = model["arguments"].get("feature_size")
    network = f"{model['network']}{f' feature_size {size}' if size else ''}"
    shape = " x ".join(map(str, case["shape"]))
    return f"{network} on a phantom of {shape}, {where}, torch {machine['torch']}, {document['date']}"


def overlaps_of(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The first measured configuration's results, which hold the facts shared by all."""
    return next((each["results"] for each in document["configurations"] if "results" in each), [])


def _table(configurations: Sequence[Mapping[str, Any]], index: int) -> Table:
    texts = ("configuration", "what")
    numbers = ("seconds", "spread", "x 0a", "x 0c", "x 1", "Dice to 0a", "Dice to 1", "Dice to truth", "GPU GiB")
    table = new_table((*texts, *numbers), left=texts)
    for configuration in configurations:
        if "results" in configuration and not configuration["results"][index]["reason"]:
            table.add_row(configuration["id"], configuration["text"], *_cells(configuration["results"][index]))
    return table


def _cells(result: Mapping[str, Any]) -> tuple[str, ...]:
    memory = result["memory_bytes"]
    return (
        f"{result['median_s']:.3f}",
        f"{result['spread_s']:.3f}" if len(result["seconds"]) > 1 else "-",
        *(number_text(result[f"factor_to_{other}"], 2) for other in ("stock", "stock_half", "article")),
        *(number_text(result[f"dice_to_{other}"], 4) for other in ("stock", "article", "truth")),
        "-" if memory is None else " + ".join(f"{taken / _GIB:.1f}" for taken in memory),
    )
