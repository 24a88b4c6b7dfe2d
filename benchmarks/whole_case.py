"""Measure a CT series from its folder to its SEG on disk, repeatedly in one process, stage by stage.

    python benchmarks/whole_case.py CT_FOLDER [--engine fused] [--device cuda] [--repeats 7] [-m BUNDLE]
                              [--overlap 0.25]
                              [--roi body] [--report html] [--cache DIR]

Opening the engine is not counted. A run does everything that `ctflow run` does with the folder: find the series, read
it, segment it and write its result folder. The first run is shown but not counted, because it alone reads files from
the disk, loads libraries' tables and captures graphs. Files are synced; a run ends when the result folder has its final
name.
The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.compat.monai import import_lean
from ctflow.core.errors import SettingsInvalid
from ctflow.pipeline.case import Case, Found, find_cases
from ctflow.pipeline.run import run_case
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings

Seconds = dict[str, float]
_WITH_THE_GPU = ("find", "read", "prepare", "segment", "restore")  # all stages before the mask is in host memory


def time_case(
    folder: Path, output: Path, segmenter: Segmenter, settings: Settings
) -> tuple[Seconds, Mapping[str, Any]]:
    """Seconds of each stage of one run, of `whole`, of `to_seg`, and of `after_mask`: the stages after the mask.

    `to_seg` ends when the SEG is complete on disk, in the folder that is renamed when everything else is also complete.

    Also returns the case's result.json.

    Raises:
        CtflowError: The case's error.
    """
    start = time.perf_counter()
    case = only_case(find_cases(folder, segmenter.model.spec, settings))
    found_s = time.perf_counter() - start
    case = run_case(case, segmenter, settings, output)
    whole_s = time.perf_counter() - start
    if case.document is None:
        raise case.error or ValueError("the case was not written")
    # The first CT on a machine is also compared with PyTorch: once, in the first run, which no median includes.
    seconds = {"find": found_s, **{stage: s for stage, s in case.stage_seconds.items() if stage != "compare"}}
    mask_s = sum(seconds[stage] for stage in _WITH_THE_GPU)
    ends = {"after_mask": whole_s - mask_s, "to_seg": mask_s + seconds["seg"], "whole": whole_s}
    return {**seconds, **ends}, case.document


def only_case(found: Found) -> Case:
    """The case of a folder of one series.

    Raises:
        SettingsInvalid: There are several.
    """
    if len(found.cases) > 1:
        raise SettingsInvalid(
            f"{len(found.cases)} series would be run: name a folder with one", reason="series-not-chosen"
        )
    return found.cases[0]


def time_cases(
    folder: Path, segmenter: Segmenter, settings: Settings, repeats: int
) -> tuple[list[Seconds], Mapping[str, Any]]:
    """A first run and `repeats` more, each into its own folder below the working directory."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        runs = [time_case(folder, Path(scratch) / str(turn), segmenter, settings) for turn in range(repeats + 1)]
    return [seconds for seconds, _ in runs], runs[-1][1]


def medians_of(runs: list[Seconds]) -> Seconds:
    """Median of each stage over all runs except the first."""
    return {stage: round(statistics.median(run[stage] for run in runs[1:]), 4) for stage in runs[0]}


def table_of(runs: list[Seconds]) -> str:
    """One line per run and one of medians, one column per stage."""
    lines = ["case    " + "".join(f"{stage:>11}" for stage in runs[0])]
    named = [*((str(turn), run) for turn, run in enumerate(runs)), ("median", medians_of(runs))]
    lines += [f"{name:<8}" + "".join(f"{seconds:11.3f}" for seconds in run.values()) for name, run in named]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with one CT series")
    parser.add_argument("-m", "--model", type=Path, help="bundle (default: the demonstration bundle)")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--device", default=None)
    parser.add_argument("--overlap", type=float, default=None)
    parser.add_argument("--roi", choices=("none", "body"), default="none")
    parser.add_argument("--report", choices=("none", "html"), default="none")
    parser.add_argument("--cache", type=Path, default=None, help="folder of stored engines (default: none)")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    if given.repeats < 1:
        parser.error("--repeats: at least 1")
    import_lean()  # as `ctflow run` does
    settings = Settings(engine=given.engine, precision=given.precision, device=given.device, overlap=given.overlap,
                        roi=given.roi, report=given.report, cache=given.cache)  # fmt: skip
    model = read_bundle(given.model or demonstration_bundle())
    start = time.perf_counter()
    with Segmenter(model, settings) as segmenter:
        opened_s = time.perf_counter() - start
        runs, case = time_cases(given.folder, segmenter, settings, given.repeats)
    sys.stdout.write(table_of(runs))
    document = {
        "benchmark": "whole case", "engine": case["engine"], "window": case["window"], "shape": case["series"]["shape"],
        "voxels": sum(segment["voxels"] for segment in case["segments"]),
        "components": sum(segment["components"] for segment in case["segments"]), "report": given.report,
        "open_s": round(opened_s, 3), "median_s": medians_of(runs), "cases_s": runs,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
