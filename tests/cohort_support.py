"""A cohort of tiny series whose result needs no network: what is tested is that each row ends once. Also a program."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

from ctflow.cohort.destinations.contract import RowDestination
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.destinations.from_text import destination_from_text
from ctflow.cohort.manifest.rows import (
    WHOLE,
    CohortRow,
    ManifestPart,
    manifest_from_file,
    part_from_text,
    write_manifest,
)
from ctflow.cohort.shares.share import CohortReport, run_cohort
from ctflow.cohort.watch import UNWATCHED, CohortWatcher
from ctflow.core.entry_point import exit_code_of, interrupted_by_signals
from ctflow.core.progress import Progress, silent
from ctflow.dicom.write.ct_series import write_ct_series
from ctflow.settings.run import Settings
from dicom_support import small_volume
from marking_support import MarkingSegmenter, marking_model

SETTINGS = Settings(device="cpu", cache=None, cases_in_flight=2, force=True, report="none")  # the series are small


def write_cohort(folder: Path, count: int) -> Path:
    """Series of eight slices and their manifest."""
    for number in range(count):
        write_ct_series(small_volume(seed=number, shape=(8, 32, 32)), folder / f"s{number}", seed=number)
    path = folder / "manifest.csv"
    write_manifest([CohortRow(f"row-{number}", f"s{number}") for number in range(count)], path)
    return path


def run_marking(
    manifest: Path,
    output: Path,
    part: ManifestPart = WHOLE,
    progress: Progress = silent,
    *,
    settings: Settings = SETTINGS,
    model=None,
    retry_failed: bool = False,
    watcher: CohortWatcher = UNWATCHED,
    destination: RowDestination | None = None,
) -> CohortReport:
    """Run a cohort with a segmenter that marks a box."""
    read = manifest_from_file(manifest, part)
    with destination or FolderDestination(output, part.name) as entered, mock.patch(
        "ctflow.pipeline.segmenter.Segmenter", MarkingSegmenter
    ):  # fmt: skip
        loaded = model or marking_model()
        return run_cohort(read, entered, loaded, settings, part, progress, retry_failed=retry_failed, watcher=watcher)


def main(manifest: str, output: str, part: str) -> int:
    with interrupted_by_signals():
        share = part_from_text(part)
        destination = destination_from_text(output, share.name)
        return run_marking(Path(manifest), Path(output), share, destination=destination).exit_code


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(*sys.argv[1:]), say=lambda message: sys.stderr.write(f"{message}\n")))
