"""A cohort on a Ray cluster with the segmenter that marks a box. Also a program: the driver, which tests kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from cohort_support import SETTINGS
from ctflow.cohort.cluster.driver import Cluster
from ctflow.cohort.destinations.folder import FolderDestination
from ctflow.cohort.manifest.rows import manifest_from_file
from ctflow.cohort.shares.share import CohortReport, run_cohort
from ctflow.cohort.watch import UNWATCHED, CohortWatcher
from ctflow.core.entry_point import exit_code_of, interrupted_by_signals, set_up_logging
from ctflow.core.progress import Progress, silent
from ctflow.settings.run import Settings
from marking_support import MarkingSegmenter, marking_model


class StandIn(MarkingSegmenter):
    """Marks a box after a wait, as a GPU would; volumes of 7 columns kill the worker (`CASES` of the proof)."""

    wait_s = 0.0

    def segment(self, volume, progress=silent, meanwhile=lambda: None):
        if volume.array.shape[2] == POISONED:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.wait_s)
        return super().segment(volume, progress, meanwhile)


ONE = replace(SETTINGS, cases_in_flight=1)  # several workers share this machine's CPUs
POISONED = 28  # columns of a volume at which the worker is killed


@dataclass(frozen=True)
class OpenedStandIn:
    """Stands in for `OpenedBundle`."""

    wait_s: float = 0.0

    def __call__(self, settings: Settings):
        segmenter = StandIn(marking_model(), settings)
        segmenter.wait_s = self.wait_s
        return segmenter.model, segmenter


def run_on_cluster(
    manifest: Path,
    output: Path,
    *,
    address: str | None = None,
    gpus: int | None = 0,
    wait_s: float = 0.0,
    progress: Progress = silent,
    settings: Settings = ONE,
    watcher: CohortWatcher = UNWATCHED,
    retry_failed: bool = False,
) -> CohortReport:
    cluster = Cluster(str(output.absolute()), OpenedStandIn(wait_s), address, gpus)
    with FolderDestination(output, "driver") as destination:
        return run_cohort(
            manifest_from_file(manifest),
            destination,
            marking_model(),
            settings,
            progress=progress,
            watcher=watcher,
            retry_failed=retry_failed,
            compute=cluster,
        )


def main(manifest: str, output: str, address: str, wait_s: str) -> int:
    set_up_logging("INFO")
    with interrupted_by_signals():
        settings = replace(ONE, cases_in_flight=3 if float(wait_s) >= 1 else 1)  # those that wait overlap
        return run_on_cluster(
            Path(manifest), Path(output), address=address or None, wait_s=float(wait_s), settings=settings
        ).exit_code


if __name__ == "__main__":
    sys.exit(exit_code_of(lambda: main(*sys.argv[1:]), say=lambda message: sys.stderr.write(f"{message}\n")))
