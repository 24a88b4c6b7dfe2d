"""Progress bars and the closing summary on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from ctflow.core.errors import counted
from ctflow.core.progress import Progress
from ctflow.report.tables import console_on, new_table

_BAD = ("damaged", "foreign")  # states of stored engines that persist without action
_MOST_NAMED = 5  # unreadable files named for each reason
_LONGEST = 300  # characters of a text from a stored file
_STAGES = {
    "phantom": "drawing phantoms",
    "prepare engine": "preparing the engine",
    "export network": "exporting the network",
    "divide network": "dividing the network",
    "build engine": "building the engine",
    "measure engines": "measuring engines",
    "draw phantom": "drawing the phantom",
    "measure configurations": "measuring configurations",
    "evaluate": "evaluating cases",
    "rows": "segmenting rows",
    "scan": "reading headers",
    "read": "reading slices",
    "segment": "segmenting windows",
    "compare": "comparing the engine with PyTorch",
    "restore": "back to the source grid",
    "write": "writing results",
}


class LineProgress:
    """Writes a line at each quarter of a stage, for logs and pipes.

    Args:
        stream: Gets the lines.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._quarter: dict[str, int] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take an advance; see `ctflow.core.progress.Progress`."""
        quarter = 4 if done >= total else 4 * done // total
        if done == 0:
            self._quarter[stage] = 0
        elif quarter > self._quarter.get(stage, 0):
            self._quarter[stage] = quarter
            self._stream.write(f"{_STAGES.get(stage, stage)}: {done} of {total}\n")
            self._stream.flush()


class BarProgress:
    """Draws one bar per stage.

    Args:
        bars: The live display.
    """

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take an advance; see `ctflow.core.progress.Progress`."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(_STAGES.get(stage, stage), total=total)
        elif done == 0:
            self._bars.reset(self._tasks[stage], total=total)
        self._bars.update(self._tasks[stage], completed=done, total=total)


@contextmanager
def progress_on(stream: TextIO) -> Iterator[Progress]:
    """Progress bars if the stream is a terminal, else plain lines."""
    if not stream.isatty():
        yield LineProgress(stream)
        return
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=Console(file=stream), transient=True) as bars:
        yield BarProgress(bars)


def say_error(message: str) -> None:
    """Show an error on standard error."""
    Console(stderr=True, soft_wrap=True).print(Text("ctflow: ", style="bold red") + Text(message))


def say_report(document: Mapping[str, Any], output: Path, stream: TextIO | None = None) -> None:
    """Show the outcome of every series.

    Args:
        document: The run's result (`ctflow.report.result.run_result`).
        output: The output folder.
        stream: Gets the text; None takes standard output.
    """
    console = console_on(stream)
    if document.get("research_only"):
        console.print(Text(str(document["research_only"]), style="bold yellow"))
    for series in document["series"]:
        _say_series(console, series, output)


def _say_series(console: Console, result: Mapping[str, Any], output: Path) -> None:
    series = result["series"]
    colour = {"done": "green"}.get(result["status"], "red")
    head = Text.assemble("series ", (series["digest"], "bold"), ": ", (result["status"], colour))
    if result["status"] == "done":
        shape, spacing = series["shape"], series["spacing_mm"]
        head.append(f"  {' x '.join(map(str, shape))} voxels of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm")
        head.append(f"  in {sum(result['stage_seconds'].values()):.1f} s")
    console.print(head)
    if result["status"] != "done":
        console.print(Text(f"  {result['error']['message']}"))
        return
    if result["statement"]:
        console.print(Text(f"  {result['statement']}"))
    else:
        console.print(_table_of_segments(result["segments"]))
    for warning in result["warnings"]:
        console.print(Text(f"  warning: {warning}", style="yellow"))
    console.print(Text(f"  {_files_of(output / result['folder'])}"))


def _files_of(folder: Path) -> str:
    """The SEG with its path, then the names of the other files in its folder."""
    seg = "segmentation.dcm"
    others = sorted(path.name for path in folder.glob("[!.]*") if path.name != seg)
    return ", ".join([f"{folder}/{seg}", *others])


def _table_of_segments(segments: Sequence[Mapping[str, Any]]) -> Table:
    headings = ("segment", "volume ml", "longest diameter mm", "components", "centroid mm (L, P, S)")
    table = new_table(headings, left=("segment",))
    for segment in segments:
        if not segment["voxels"]:
            continue
        table.add_row(
            str(segment["label"]),
            f"{segment['volume_ml']:.2f}",
            f"{segment['longest_diameter_mm']:.1f}",
            str(segment["components"]),
            ", ".join(f"{mm:.1f}" for mm in segment["centroid_mm"]),
        )
    return table


def say_inspection(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show every series of a folder, selected or rejected and why (`ctflow inspect`)."""
    console = console_on(stream)
    for entry in document["series"]:
        verdict = ("selected", "green") if entry["selected"] else (f"rejected ({entry['reason']})", "red")
        console.print(Text.assemble("series ", (entry["digest"], "bold"), ": ", verdict, f"  {entry['message']}"))
        facts = [f"{key.replace('_', ' ')} {value}" for key, value in entry["description"].items() if value is not None]
        console.print(Text(f"  {', '.join(facts)}"))
        if entry["geometry"]:
            shape, spacing = entry["geometry"]["shape"], entry["geometry"]["spacing_mm"]
            console.print(
                Text(f"  {' x '.join(map(str, shape))} voxels of {' x '.join(f'{mm:.4g}' for mm in spacing)} mm")
            )
        for warning in entry["warnings"]:
            console.print(Text(f"  warning: {warning}", style="yellow"))
    _say_unreadable(console, document["unreadable"])
    if not document["series"]:
        console.print("no DICOM series found")
    others = counted(document["ignored"], "file that is", "files that are")
    unreadable = f", {len(document['unreadable'])} unreadable" if document["unreadable"] else ""
    console.print(f"{len(document['series'])} series, {others} not DICOM{unreadable}")


def _say_unreadable(console: Console, files: Sequence[Mapping[str, str]]) -> None:
    """Show unreadable files by message: a few names, and how many more there are."""
    names: dict[str, list[str]] = {}
    for file in files:
        names.setdefault(file["message"], []).append(file["file"])
    for message, those in names.items():
        more = len(those) - _MOST_NAMED
        listed = ", ".join(those[:_MOST_NAMED]) + (f" and {more} more (--json lists all)" if more > 0 else "")
        console.print(Text(f"unreadable: {listed}: {message}", style="yellow"))
    if len(files) > _MOST_NAMED:
        console.print(Text(f"{len(files)} files could not be read", style="yellow"))


def say_model(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show what a model is and every part of it, understood or not and why (`ctflow inspect-model`)."""
    console = Console(file=stream or sys.stdout, soft_wrap=True)
    console.print(Text.assemble((_plain(document["name"]), "bold"), f": {document['kind']}"))
    width = max((len(part["part"]) for part in document["parts"]), default=0)
    for part in document["parts"]:
        mark = ("yes", "green") if part["understood"] else (f"no ({part['reason']})", "red")
        lead = Text.assemble(f"  {part['part']:<{width}}  ", mark, "  ")
        _say_beside(console, lead, part["what"])
    for note in document["notes"]:
        _say_beside(console, Text("  note: "), note, style="yellow")
    console.print("ctflow runs it" if document["runs"] else "ctflow does not run it")


def say_verdicts(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show what the node would do with each series (`ctflow rules test`).

    Args:
        document: "series", "unreadable" and "ignored" (`ctflow.cli.serve.rules_document`).
        stream: Gets the text; None takes standard output.
    """
    console = console_on(stream)
    for entry in document["series"]:
        verdict = ("would be segmented", "green") if entry["run"] else ("would not be segmented", "red")
        console.print(Text.assemble("series ", (entry["digest"], "bold"), ": ", verdict, f"  {entry['message']}"))
        facts = [f"{name.replace('_', ' ')} {value}" for name, value in entry["facts"].items() if value is not None]
        console.print(Text(f"  {', '.join(facts)}"))
        urgent = " (urgent)" if entry["priority"] == "urgent" else ""
        for name, each in entry["models"].items():
            told = f"runs{urgent}" if each["run"] else f"does not run: {each['message']}"
            console.print(Text(f"  model {name}: {told}"))
        if entry["options"] and entry["run"]:
            console.print(
                Text(f"  options: {', '.join(f'{name} {value}' for name, value in entry['options'].items())}")
            )
    for file in document["unreadable"]:
        console.print(Text(f"unreadable: {file['file']}: {file['message']}", style="yellow"))
    run = sum(entry["run"] for entry in document["series"])
    console.print(f"{run} of {len(document['series'])} series would be segmented")


def say_engines(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show the backends of this machine, the engines made for them and the choice of `auto` (`ctflow engines`).

    Args:
        document: "backends" and "monai_deploy"; "installed", "cache", "engines" and "choices" if they were looked for
            (`ctflow.cli.engines.engines_document`).
        stream: Gets the text; None takes standard output.
    """
    console = Console(file=stream or sys.stdout, soft_wrap=True)
    for backend in document["backends"]:
        verdict = ("available", "green") if backend["available"] else ("unavailable", "red")
        _say_beside(console, _named(backend["name"], *verdict), backend["reason"])
    owner = document["monai_deploy"]
    verdict = ("ready", "green") if owner["has_exec"] else ("needs repair", "red")
    _say_beside(console, _named("monai-deploy", *verdict), owner["reason"])
    if document.get("installed"):
        console.print()
        console.print(Text("engines that came with the installation"))
    for engine in document.get("installed", ()):
        _say_engine(console, engine)
    if "cache" in document:
        _say_cache(console, document)


def _named(name: str, verdict: str, colour: str) -> Text:
    return Text.assemble((f"{name:<16}", "bold"), (verdict, colour), "  ")


def _say_cache(console: Console, document: Mapping[str, Any]) -> None:
    cache, engines, choices = document["cache"], document["engines"], document["choices"]
    console.print()
    if cache["folder"] is None:
        console.print(Text("no cache folder for engines: give --cache DIR or set CTFLOW_CACHE"))
        return
    if cache["problem"]:
        console.print(Text(f"engines in {_plain(cache['folder'])}: {_plain(cache['problem'])}", style="yellow"))
        return
    if not engines:
        console.print(Text(f"no engines in {_plain(cache['folder'])}"))
        console.print(Text("build one with `ctflow export`, for another model with `ctflow export -m MODEL`"))
    else:
        console.print(Text(f"engines in {_plain(cache['folder'])}"))
    for engine in engines:
        _say_engine(console, engine)
    if any(engine["state"] in _BAD for engine in engines):
        _say_beside(console, Text(), f"remove what is {' or '.join(_BAD)}, and run `ctflow export`")
    if choices:
        console.print()
        console.print(Text("what `auto` selected, by measurement"))
    for choice in choices:
        _say_choice(console, choice)


def _say_engine(console: Console, engine: Mapping[str, Any]) -> None:
    colour = {"ready": "green", "being made": "cyan"}.get(engine["state"], "red")
    console.print(
        Text.assemble(
            (f"{_plain(engine['name']):<37}", "bold"),
            "  ",
            (f"{engine['state']:<10}", colour),
            f"{engine['bytes'] / 1e6:>9.1f} MB  {(engine['made'] or '')[:10]}".rstrip(),
        )
    )
    if engine["reason"]:
        _say_beside(console, Text("  "), engine["reason"], style="yellow")
    if engine["kind"] is None:
        return
    low, high = engine["batch_range"]
    network = engine["network"].rpartition(".")[2]
    facts = (
        f"{engine['kind']} in {engine['precision']}, windows of {' x '.join(map(str, engine['roi']))}, batch "
        f"{low if low == high else f'{low} to {high}'}, {network} {engine['weights_digest'][:12]}"
    )
    _say_beside(console, Text("  "), facts)
    _say_beside(console, Text("  "), f"for {'any device' if engine['device'] == 'any' else engine['device']}")
    _say_beside(console, Text("  "), f"by {engine['version']}")


def _say_choice(console: Console, choice: Mapping[str, Any]) -> None:
    name = Text(f"{_plain(choice['name']):<39}  ", style="bold")
    if choice["state"] != "ready":
        _say_beside(console, name, f"{choice['state']}: {choice['reason']}", style="yellow")
        return
    engine = f"{choice['backend']} {choice['precision']}"
    seconds = choice["window_seconds"].get(engine)
    speed = "" if seconds is None else f"  {seconds:.3f} s per window"
    _say_beside(console, name, f"{engine}{speed}  {(choice['made'] or '')[:10]}".rstrip())
    for what in ("model", "device"):
        if choice[what]:
            _say_beside(console, Text("  "), f"for {choice[what]}")


def _say_beside(console: Console, lead: Text, text: str, style: str = "") -> None:
    """Print a line; on a narrow terminal its text continues to the right of the lead, not below it."""
    shown = Text(_plain(text), style=style)
    if not console.is_terminal:
        console.print(lead + shown)
        return
    grid = Table.grid()
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(lead, shown)
    console.print(grid, soft_wrap=False)


def _plain(text: str) -> str:
    """Text of a stored file without control characters for a terminal."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: _LONGEST + 1])
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def say_measured(document: Mapping[str, Any], stream: TextIO | None = None) -> None:
    """Show how fast and how exact engines are (`ctflow export`)."""
    console = Console(file=stream or sys.stdout, soft_wrap=True)
    table = new_table(("engine", "s per window", "Dice to PyTorch", "relative error", ""), left=("engine", ""))
    for entry in document["measured"]:
        parity, seconds = entry["parity"], entry["window_seconds"]
        chosen = all(entry[key] == document[key] for key in ("backend", "precision"))
        table.add_row(
            f"{entry['backend']} {entry['precision']}",
            "" if seconds is None else f"{seconds:.3f}",
            _dice(parity),
            f"{parity['relative_error']:.1e}" if parity else "",
            "selected" if chosen and not entry["reason"] else "",
        )
    console.print(table)
    for entry in document["measured"]:
        if entry["reason"]:
            console.print(f"{entry['backend']} {entry['precision']}: {entry['reason']}", markup=False, highlight=False)


def _dice(parity: Mapping[str, Any] | None) -> str:
    if parity is None:
        return ""
    return "nothing segmented" if parity["dice"] is None else f"{parity['dice']:.5f}"
