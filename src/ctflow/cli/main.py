"""`ctflow`: the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ctflow import __version__
from ctflow.bundle import demonstration_bundle, find_bundle, read_body_parts
from ctflow.cli.administration.users import user
from ctflow.cli.cohort import cohort
from ctflow.cli.monai_deploy import exec_application
from ctflow.compat.monai import import_lean
from ctflow.core.entry_point import exit_code_of, interrupted_by_signals, set_up_logging
from ctflow.core.errors import BundleInvalid, counted
from ctflow.core.progress import startup
from ctflow.core.user import name_user
from ctflow.report.run_record import recorded_run
from ctflow.report.terminal import (
    progress_on,
    say_engines,
    say_error,
    say_inspection,
    say_model,
    say_report,
    say_verdicts,
)
from ctflow.settings.command import (
    DEBUG,
    HELP,
    LOG_LEVEL,
    MODEL,
    GroupedCommand,
    Request,
    exit_code_of_command,
    options,
    run_command,
)
from ctflow.settings.run import OPTIONS, model_path_from_value, read_environment, settings_from_values


@click.group(context_settings=HELP)
@click.version_option(__version__, prog_name="ctflow")
@DEBUG
@LOG_LEVEL
def cli(debug: bool, log_level: str | None) -> None:  # main() reads --debug itself
    """A CT series goes in; a DICOM SEG with measurements comes out."""
    set_up_logging(log_level, debug=debug)


def _run(request: Request) -> int:
    startup.begin()
    paths = request.paths
    with interrupted_by_signals(), recorded_run(paths.output) as record, progress_on(sys.stderr) as progress:
        # Late: pydicom and its decoders take longer to import than all that --help needs.
        from ctflow.pipeline.run import run_bundle  # noqa: PLC0415

        bundle = find_bundle(paths.model) if paths.model else demonstration_bundle()
        report = run_bundle(bundle, paths.input, paths.output, request.settings, progress, record)
    say_report(report.document, paths.output)
    return report.exit_code


cli.add_command(run_command(_run))
cli.add_command(cohort)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@click.option("--names", is_flag=True, help="Show the files' paths, which may contain a patient's name.")
@MODEL
def inspect(folder: Path, as_json: bool, names: bool, model: str | None) -> int:
    """List every series: eligible for the model or not, why, and its geometry."""
    # Late: pydicom and its decoders take longer to import than all that --help needs.
    from ctflow.cli.inspection import inspect_folder, require_series  # noqa: PLC0415

    path = model_path_from_value(model, read_environment())
    bundle = find_bundle(Path(path)) if path else demonstration_bundle()
    document = inspect_folder(folder, names=names, body_parts=read_body_parts(bundle))
    _show(document, say_inspection, as_json=as_json)
    require_series(document)
    return 0


def _show(document: dict[str, Any], say: Callable[[dict[str, Any]], None], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=2, allow_nan=False))
    else:
        say(document)


@cli.command("inspect-model")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of lines.")
@options("config", "allow_code")
def inspect_model_command(model: Path, as_json: bool, **given: Any) -> int:
    """Say what MODEL is (a folder, or a zip of nnU-Net), which parts ctflow understands, and why not the others."""
    from ctflow.cli.inspect_model import inspect_model  # noqa: PLC0415  # torch and MONAI take seconds

    settings = settings_from_values(given, read_environment())
    document = inspect_model(model, settings.config, allow_code=settings.allow_code)
    _show(document, say_model, as_json=as_json)
    return 0 if document["runs"] else BundleInvalid.exit_code


def _shape(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, int, int]:
    words = text.split(",")
    if len(words) != 3 or not all(word.strip().isdecimal() for word in words):
        raise click.BadParameter(f"{text!r} is not three numbers D,H,W")
    d, h, w = (int(word) for word in words)
    return d, h, w


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed; each draws another chest."
)
@click.option("--shape", metavar="D,H,W", default="160,256,256", show_default=True, callback=_shape)
@click.option("--tumours", type=click.IntRange(0, 5), help="Number of tumours (default: drawn from the seed).")
@click.option(
    "--count", type=click.IntRange(min=1), help="Write this many phantoms, one folder per seed, for `ctflow evaluate`."
)
@click.option(
    "--varied",
    is_flag=True,
    help="Vary the phantom as real scans do: parts of the chest, padding, tables, metal, arms.",
)
def phantom(
    folder: Path, seed: int, shape: tuple[int, int, int], tumours: int | None, count: int | None, varied: bool
) -> int:
    """Write a synthetic chest CT series (FOLDER/ct) and its truth (FOLDER/truth.dcm)."""
    from ctflow.cli.phantom import write_phantom, write_phantoms  # noqa: PLC0415

    if count is None:
        found = write_phantom(folder, seed, shape, tumours=tumours, varied=varied)
        click.echo(
            f"{shape[0]} slices in {folder / 'ct'}, truth with {counted(found, 'tumour')} in {folder / 'truth.dcm'}"
        )
        return 0
    with progress_on(sys.stderr) as progress:
        counts = write_phantoms(folder, seed, count, shape, tumours=tumours, varied=varied, progress=progress)
    click.echo(f"{counted(count, 'phantom')} with {counted(sum(counts), 'tumour')} in {folder}")
    return 0


@cli.command(cls=GroupedCommand)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for evaluation.json and evaluation.png.")
@MODEL
@click.option("--reference", is_flag=True, help="Also compare with PyTorch in fp32 on the same cases (slow on a CPU).")
@click.option(
    "--results",
    type=click.Path(path_type=Path),
    help="Compare the results that `run` or `cohort run` wrote to this folder, instead of segmenting.",
)
@click.option(
    "--truth-roi",
    metavar="NAME",
    multiple=True,
    help="Region that is meant in a truth that is an RT Structure Set: its name, or a pattern such as 'GTV*'."
    " What one pattern matches is one label; may be repeated.",
)
@click.option(
    "--least-dice", type=click.FloatRange(0, 1), help="Fail below this Dice, or if a lesion of 10 mm is missed."
)
@options(*(option.name for option in OPTIONS if not option.key.of_files and option.name != "cases_in_flight"))
def evaluate(
    folder: Path,
    output: Path | None,
    model: str | None,
    reference: bool,
    results: Path | None,
    truth_roi: tuple[str, ...],
    least_dice: float | None,
    **given: Any,
) -> int:
    """Compare a model's marks with the truth: FOLDER contains cases of ct/ and truth.dcm, a SEG or RT Structure Set."""
    from ctflow.cli.evaluation import evaluate_command  # noqa: PLC0415

    return evaluate_command(
        folder, model, given, output, reference=reference, results=results, rois=truth_roi, least_dice=least_dice
    )


@cli.command()
@click.option("-o", "--output", metavar="DIR", help="Folder for the engine (default: the user's cache folder).")
@MODEL
@options("engine", "precision", "device", "config", "allow_code")
def export(model: str | None, output: str | None, **given: Any) -> int:
    """Build an engine, compare it with PyTorch and time it; `auto` selects the fastest that agrees."""
    from ctflow.cli.export import export_engines  # noqa: PLC0415

    return export_engines(model, output, given)


@cli.command("warm")
@MODEL
@options("engine", "precision", "device", "cache", "config", "allow_code")
def warm_command(model: str | None, **given: Any) -> int:
    """Prepare what a first run waits for: engine, comparison with PyTorch, byte code; also in an image build."""
    from ctflow.cli.export import warm  # noqa: PLC0415

    return warm(model, given)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of lines.")
@options("cache")
def engines(as_json: bool, **given: Any) -> int:
    """List this machine's backends, why others are missing, and the engines in the cache."""
    from ctflow.cli.engines import engines_document  # noqa: PLC0415

    settings = settings_from_values(given, read_environment())
    document = engines_document(settings.cache)
    _show(document, say_engines, as_json=as_json)
    return 0


@cli.command()
@click.option("-c", "--config", type=click.Path(path_type=Path), help="The node's YAML file (docs/node.md).")
@click.option("--check", is_flag=True, help="Show the effective settings, open everything that they name, and exit.")
@click.option("--network", is_flag=True, help="With --check: also ask each destination whether it answers.")
@click.option("--data", metavar="DIR", help="Folder of received instances, journal and results.")
@click.option("--port", type=click.IntRange(1, 65535), help="Port of the DICOM node.")
@click.option("--allow-demonstration", is_flag=True, help="Also send results of a demonstration model.")
def serve(config: Path | None, check: bool, network: bool, data: str | None, **given: Any) -> int:
    """Run a DICOM node: receive CT series over C-STORE, segment them, send SEG and SR."""
    from ctflow.cli.serve import check_command, serve_command  # noqa: PLC0415

    given["data"] = str(Path(data).absolute()) if data else data  # an empty one is refused, not this folder
    if network and not check:
        raise click.UsageError("--network asks what --check does not: give both")
    if check:
        return check_command(config, given, read_environment(), click.echo, network=network)
    return serve_command(config, given, read_environment())


@cli.group("node")
def node_group() -> None:
    """The DICOM node's data folder and users: what is removed, backups, who may use the page."""


node_group.add_command(user)

_NODE_CONFIG = click.option(
    "-c", "--config", type=click.Path(path_type=Path), help="The node's YAML file (docs/node.md)."
)


@node_group.command("prune")
@_NODE_CONFIG
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
def node_prune(config: Path | None, dry_run: bool, as_json: bool) -> int:
    """Remove what the settings' `retention` says, now; a running node does the work."""
    from ctflow.cli.serve import prune_command  # noqa: PLC0415

    return prune_command(config, read_environment(), click.echo, dry_run=dry_run, as_json=as_json)


@node_group.command("backup")
@click.argument("folder", type=click.Path(path_type=Path))
@_NODE_CONFIG
@click.option("--copy", is_flag=True, help="Copy every file, also where a hard link would do.")
def node_backup(folder: Path, config: Path | None, copy: bool) -> int:
    """Copy journal, instances and results to FOLDER, which must not exist; the node may run."""
    from ctflow.cli.serve import backup_command  # noqa: PLC0415

    return backup_command(folder, config, read_environment(), click.echo, copy=copy)


@cli.group()
def rules() -> None:
    """The DICOM node's rules, which select series."""


@rules.command("test")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "-c",
    "--config",
    type=click.Path(path_type=Path),
    help="The node's YAML file (default: no rules, every eligible series).",
)
@click.option("--calling-ae", metavar="TITLE", help="AE title of the assumed sender.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of lines.")
def rules_test(folder: Path, config: Path | None, calling_ae: str | None, as_json: bool) -> int:
    """Show what the node would do with each series of FOLDER, and why."""
    from ctflow.cli.serve import rules_document  # noqa: PLC0415

    document = rules_document(folder, config, calling_ae, read_environment())
    _show(document, say_verdicts, as_json=as_json)
    return 0


@cli.group()
def bench() -> None:
    """Measure speed and exactness on this machine."""


@bench.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Folder for compare.json, compare.png and configurations/; an interrupted comparison continues.",
)
@MODEL
@click.option("--shape", metavar="D,H,W", default="300,512,512", show_default=True, callback=_shape)
@click.option("--seed", type=click.IntRange(min=0), default=1000, show_default=True, help="Seed of the phantom.")
@click.option(
    "--overlap", "overlaps", type=click.FloatRange(0, 1, max_open=True), multiple=True, default=(0.0, 0.25),
    show_default=True, help="Overlap of windows; repeat the option for several.",
)  # fmt: skip
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Number of timed volumes per configuration.",
)
@click.option("--configurations", metavar="ID,ID", help="Only these configurations, in this order (default: all).")
@click.option(
    "--python",
    "pythons",
    metavar="ID=PATH",
    multiple=True,
    help="Python interpreter for a configuration (default: this one).",
)
@click.option(
    "--limit", type=click.FloatRange(min=1), default=900.0, show_default=True, help="Most seconds per configuration."
)
@click.option("--only-kept", is_flag=True, help="Measure nothing; show what is stored in -o's configurations/.")
@options("cache", "device")
def compare(
    output: Path | None,
    model: str | None,
    shape: tuple[int, int, int],
    seed: int,
    overlaps: tuple[float, ...],
    repeats: int,
    configurations: str | None,
    pythons: tuple[str, ...],
    limit: float,
    only_kept: bool,
    **given: Any,
) -> int:
    """Segment a phantom with every configuration, from stock MONAI to ctflow's engines, each in its own process."""
    from ctflow.cli.compare import compare_command  # noqa: PLC0415

    return compare_command(
        model,
        given,
        output,
        shape=shape,
        seed=seed,
        overlaps=overlaps,
        repeats=repeats,
        configurations=configurations,
        pythons=pythons,
        limit_s=limit,
        measure=not only_kept,
    )


@cli.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=False
)
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def execute(words: tuple[str, ...]) -> int:
    """Run an application folder through Holoscan: exec app -i DIR -o DIR [-m MODEL]."""
    return exec_application(words, "ctflow exec")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code by ctflow's table (`ctflow.core.errors`).
    """
    if argv is None:  # else it is somebody else's process
        import_lean()
        name_user()
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if debug and "exec" not in words:  # at any place, as the application takes it; `exec` hands its own on
        words = ["--debug", *(word for word in words if word != "--debug")]
    return exit_code_of(lambda: exit_code_of_command(cli, words, "ctflow"), say=say_error, debug=debug)
