"""`ctflow cohort`: a manifest of series, and its run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ctflow.bundle import demonstration_bundle, find_bundle
from ctflow.core.entry_point import interrupted_by_signals
from ctflow.core.errors import NoUsableSeries, SettingsInvalid
from ctflow.settings.command import MODEL, options
from ctflow.settings.run import OPTIONS, model_path_from_value, read_environment, settings_from_values

if TYPE_CHECKING:
    from ctflow.cohort.cluster.driver import Cluster
    from ctflow.cohort.manifest.tree import Survey
    from ctflow.cohort.shares.share import CohortReport
    from ctflow.cohort.watch import CohortWatcher
    from ctflow.core.progress import Progress
    from ctflow.settings.run import Settings

_OF_ROWS = frozenset({"series", "pick"})  # each row names its own series


@click.group()
def cohort() -> None:
    """Thousands of series: a manifest names them, each is segmented once."""


@cohort.command("manifest")
@click.argument("source")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="The manifest: ends in .csv or .parquet."
)
@click.option("--relative", is_flag=True, help="Locations relative to the manifest's folder, not absolute ones.")
@click.option("--digests", is_flag=True, help="Read every file whole and add the digest that a run checks.")
@click.option("--where", metavar="COLUMN=VALUE", multiple=True, help="Of an index table: rows with this value only.")
@click.option("--location", metavar="COLUMN", default="", help="Of an index table: the column of the locations.")
def manifest_command(
    source: str, output: Path, relative: bool, digests: bool, where: tuple[str, ...], location: str
) -> int:
    """Write a manifest: a row for each CT series of SOURCE.

    SOURCE is a folder tree, a DICOMweb server (dicomweb+https://SERVER), or an index table (ends in .csv or .parquet).
    """
    is_server, is_index = "://" in source, Path(source).suffix.lower() in (".csv", ".parquet")
    if (relative or digests) and (is_server or is_index):
        raise SettingsInvalid("--relative and --digests: only of a folder tree", reason="conflict")
    if (where or location) and not is_index:
        raise SettingsInvalid("--where and --location: only of an index table", reason="conflict")
    if not is_server and not is_index:
        return _manifest_of_tree(Path(source), output, relative=relative, digests=digests)
    # Late: pydicom and its decoders take longer to import than all that --help needs.
    from ctflow.cohort.manifest.rows import write_manifest  # noqa: PLC0415
    from ctflow.cohort.manifest.source import rows_from_source  # noqa: PLC0415

    count = write_manifest(rows_from_source(source, where, location), output)
    click.echo(f"{count} series in {output}")
    return 0


def _manifest_of_tree(folder: Path, output: Path, *, relative: bool, digests: bool) -> int:
    from ctflow.cohort.manifest.rows import write_manifest  # noqa: PLC0415
    from ctflow.cohort.manifest.tree import rows_from_survey, survey_tree  # noqa: PLC0415

    found = survey_tree(folder, digests=digests)
    if not found.series:
        raise NoUsableSeries(f"the folder contains no CT series ({_others(found)})", reason="no-dicom")
    base = output.absolute().parent if relative else None
    count = write_manifest(rows_from_survey(found, base), output)
    click.echo(f"{count} series in {output} ({_others(found)})")
    if found.spread:
        click.echo(f"{found.spread} series lie in several folders: their rows name the folder above them")
    return 0


def _others(found: Survey) -> str:
    unreadable = f"{found.unreadable} that cannot be read"
    return f"files left out: {found.others} of other objects, {unreadable}, {found.ignored} that are not DICOM"


@cohort.command("run")
@click.argument("manifest", type=click.Path(path_type=Path))
@click.option("-o", "--output", metavar="DEST", required=True, help="A folder, s3://, gs:// or dicomweb+https://.")
@click.option("--journal", metavar="DIR", help="Beside a DICOMweb server as DEST: folder or s3:// for markers.")
@MODEL
@click.option("--part", metavar="I/N", help="The share of rows to segment in this process, without Ray.")
@click.option("--address", metavar="ADDRESS", help="Of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT.")
@click.option("--gpus", metavar="N", type=click.IntRange(0), help="With Ray: a worker for each of N GPUs; 0 for CPUs.")
@click.option("--retry-failed", is_flag=True, help="Segment rows again that failed, or are done only partly.")
@click.option("--metrics", metavar="HOST:PORT|FILE", help="Prometheus metrics to scrape, or in a file FILE.prom.")
@options(*(option.name for option in OPTIONS if option.name not in _OF_ROWS))
def run_command_of_cohort(
    manifest: Path,
    output: str,
    journal: str | None,
    model: str | None,
    part: str | None,
    address: str | None,
    gpus: int | None,
    retry_failed: bool,
    metrics: str | None,
    **given: Any,
) -> int:
    """Segment every row of MANIFEST that the destination does not have yet."""
    from ctflow.cohort.destinations.from_text import destination_from_text, text_of_destination  # noqa: PLC0415
    from ctflow.cohort.manifest.rows import manifest_from_file, part_from_text  # noqa: PLC0415

    environment = read_environment()
    settings, share = settings_from_values(given, environment), part_from_text(part or "1/1")
    on_cluster = address is not None or gpus is not None or (part is None and _has_several_gpus(settings))
    if on_cluster and part is not None:
        raise SettingsInvalid("--part: is computed without Ray: leave out --address and --gpus", reason="conflict")
    place = text_of_destination(output, journal)
    chosen = destination_from_text(place, "driver" if on_cluster else share.name)
    if settings.series is not None or settings.pick != "all":
        raise SettingsInvalid(
            "CTFLOW_SERIES or CTFLOW_PICK is set, and each row names its series: unset it", reason="conflict"
        )
    path = model_path_from_value(model, environment)
    with interrupted_by_signals(), _watched(metrics) as (progress, watcher):
        read = manifest_from_file(manifest, share)
        bundle = find_bundle(Path(path)) if path else demonstration_bundle()
        compute = _cluster(place, bundle, address, gpus) if on_cluster else None
        from ctflow.bundle import read_bundle  # noqa: PLC0415  # torch takes seconds
        from ctflow.cohort.report.keep import kept_report  # noqa: PLC0415
        from ctflow.cohort.shares.share import run_cohort  # noqa: PLC0415
        from ctflow.cohort.watch import Watchers  # noqa: PLC0415

        loaded = read_bundle(bundle, settings.config, allow_code=settings.allow_code)
        with chosen as destination, kept_report(destination, read, share) as keeper:
            report = run_cohort(
                read,
                destination,
                loaded,
                settings,
                share,
                progress,
                retry_failed=retry_failed,
                watcher=Watchers(watcher, keeper),
                compute=compute,
            )
    _say(report)
    if keeper.files:
        click.echo(f"{', '.join(keeper.files)} in {output}")
    return report.exit_code


def _has_several_gpus(settings: Settings) -> bool:
    """Whether this machine has GPUs that one process would leave idle."""
    if settings.device is not None:
        return False
    import torch  # noqa: PLC0415  # seconds, which a check of the arguments need not wait for

    return torch.cuda.device_count() > 1


@contextmanager
def _watched(metrics: str | None) -> Iterator[tuple[Progress, CohortWatcher]]:
    """What is to be seen of a run on the terminal, and its metrics if they are asked for."""
    from ctflow.cohort.report.metrics import metrics_at  # noqa: PLC0415
    from ctflow.cohort.watch import Watchers  # noqa: PLC0415
    from ctflow.report.cohort.live import rows_display  # noqa: PLC0415

    with ExitStack() as stack:
        watchers: list[CohortWatcher] = [stack.enter_context(metrics_at(metrics))] if metrics is not None else []
        display = stack.enter_context(rows_display(sys.stderr))
        yield display, Watchers(display.shown, *watchers)


def _cluster(place: str, bundle: Path, address: str | None, gpus: int | None) -> Cluster:
    from ctflow.cohort.cluster.connection import check_ray  # noqa: PLC0415
    from ctflow.cohort.cluster.driver import Cluster, OpenedBundle  # noqa: PLC0415

    check_ray()
    return Cluster(place, OpenedBundle(bundle.absolute()), address, gpus)


@cohort.command("report")
@click.argument("destination")
@click.option("--tables", type=click.Choice(["parquet", "csv"]), help="Default: parquet if pyarrow is installed.")
def report_command(destination: str, tables: str | None) -> int:
    """Write cohort.html and the tables of the rows that DESTINATION has, as a run does at its end."""
    from ctflow.cohort.destinations.from_text import destination_from_text  # noqa: PLC0415
    from ctflow.cohort.report.make import make_report  # noqa: PLC0415

    with interrupted_by_signals():
        names = make_report(destination_from_text(destination, "report"), tables)
    click.echo(f"{', '.join(names)} in {destination}")
    return 0


def _say(report: CohortReport) -> None:
    counts = ", ".join(f"{count} {status}" for status, count in sorted(report.counts.items()))
    before = f" ({report.skipped} before this run)" if report.skipped else ""
    click.echo(f"{report.rows} rows: {counts or 'none in this part'}{before}")
