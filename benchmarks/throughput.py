"""Measure how many CTs a second one run sustains, and what the GPU does meanwhile: one JSON line and a timeline.

    python benchmarks/throughput.py [--input DIR | --count 32 --shape 300,512,512] [-m BUNDLE] [--engine fused]
                              [--device cuda:0] [--overlap F] [--cases-in-flight N] [--out FILE] [--picture FILE]
    python benchmarks/throughput.py --draw FILE --picture FILE

Without --input, --count copies of one phantom get UIDs of their own. The results are complete: SEG, measurement report,
preview, report.html and result.json of each CT. The engine is open before the clock starts, and the first CT, which is
compared with PyTorch where the cache has no comparison, was segmented once before; the clock stops when the last result
has its final name. `loop_s` is the window loop alone on the same CT in the same process, after the run: the share of
the clock that the loop would take for all CTs is `share_of_loop`. --one-by-one also measures --cases-in-flight 1.

GPU busy is what NVML reports in samples of 20 ms: the share of time in which a kernel ran.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pydicom
import torch

from ctflow import __version__
from ctflow.bundle import demonstration_bundle, find_bundle, read_bundle
from ctflow.cli.phantom import write_phantom
from ctflow.compat.monai import import_lean
from ctflow.core.processes import usable_cpus
from ctflow.engines.utilization import GpuMeter, gpu_uuids
from ctflow.pipeline.case import look_for_cases
from ctflow.pipeline.overlap.cases import CasesOfRun
from ctflow.pipeline.segmenter import Segmenter
from ctflow.pipeline.stages import load_case, segment_case
from ctflow.settings.run import Settings

_SAMPLE_S = 0.02


def copy_series(source: Path, target: Path, number: int) -> None:
    """Copy a series with study, series and instance UIDs of its own."""
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        dataset = pydicom.dcmread(path)
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID"):
            setattr(dataset, keyword, f"{dataset[keyword].value[:56]}.{number + 1}")
        dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
        dataset.save_as(target / path.name)


def make_input(place: Path, count: int, shape: tuple[int, int, int]) -> Path:
    """A folder with so many series."""
    write_phantom(place / "phantom", 1000, shape)
    with ProcessPoolExecutor(usable_cpus()) as pool:
        list(
            pool.map(
                copy_series,
                [place / "phantom" / "ct"] * count,
                [place / "in" / f"{number:03d}" for number in range(count)],
                range(count),
            )
        )
    shutil.rmtree(place / "phantom")
    return place / "in"


def run_once(folder: Path, output: Path, segmenter: Segmenter, settings: Settings, busy: GpuMeter) -> dict[str, Any]:
    """One run with an open engine: its figures and its timeline."""
    model = segmenter.model
    found = look_for_cases(folder, model.spec.body_parts, settings)
    gc.freeze()  # as `ctflow.pipeline.run.begin_run`
    start = time.perf_counter()
    with CasesOfRun(settings, output, lambda *_: None) as cases:
        cases.begin(found.cases)
        for case in cases.loaded():
            cases.write(segment_case(case, segmenter, prepare=cases.prepare), model)
        done = cases.finished()
        end = time.perf_counter()
        times = cases.times_s
    failed = [case.error for case in done if case.error]
    if failed:
        raise failed[0]
    stages = sorted({name for case in done for name in case.stage_seconds})
    return {
        "cases": len(done),
        "seconds": round(end - start, 3),
        "ct_per_s": round(len(done) / (end - start), 3),
        "steady_ct_per_s": _steady(times),
        "gpu_busy": busy.share(start, end),
        "stage_s": {
            name: round(statistics.median(case.stage_seconds.get(name, 0.0) for case in done), 4) for name in stages
        },
        "median_s": {
            "read": _between(times, "given", "loaded"),
            "wait for the device": _between(times, "loaded", "begun"),
            "segment": _between(times, "begun", "handed"),
            "write": _between(times, "handed", "done"),
        },
        "timeline": timeline(times, start, end, busy),
    }


def _between(times: Sequence[dict[str, float]], first: str, last: str) -> float | None:
    found = [each[last] - each[first] for each in times if first in each and last in each]
    return round(statistics.median(found), 4) if found else None


def _steady(times: Sequence[dict[str, float]]) -> float | None:
    """CTs a second between the end of the first quarter and the end of the last CT."""
    done = sorted(each["done"] for each in times if "done" in each)
    skipped = len(done) // 4
    return round((len(done) - skipped - 1) / (done[-1] - done[skipped]), 3) if len(done) > skipped + 1 else None


def window_loop_s(folder: Path, segmenter: Segmenter, settings: Settings, repeats: int) -> float:
    """Median seconds of the window loop alone on the first CT, which is on the device."""
    case = load_case(look_for_cases(folder, (), settings).cases[0])
    volume = case.loaded.volume
    prepared, _ = segmenter._prepare(volume)  # what the run does, without the rest
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        segmenter._predict(prepared, None, volume, lambda *_: None, lambda: None)
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def timeline(times: Sequence[dict[str, float]], start: float, end: float, busy: GpuMeter) -> dict[str, Any]:
    """Seconds since the first CT was given to a process: of each case's stages, and of the GPU's samples in percent."""
    return {
        "cases": [{name: round(at - start, 4) for name, at in each.items()} for each in times],
        "gpu": [[round(at - start, 3), round(100 * share)] for at, share in busy.samples if start <= at <= end],
    }


def draw(path: Path, document: dict[str, Any]) -> None:
    """A timeline: a row for each case, and the GPU below."""
    import matplotlib  # noqa: PLC0415  # the extra `bench`

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    spans = (
        ("given", "loaded", "read", "#4c78a8"),
        ("loaded", "begun", "wait for the device", "#e0e0e0"),
        ("begun", "handed", "segment", "#e45756"),
        ("handed", "done", "write", "#54a24b"),
    )
    times, points = document["timeline"]["cases"], document["timeline"]["gpu"]
    figure, axes = (
        pyplot.subplots(2, 1, figsize=(11, 6.5), sharex=True, height_ratios=(4, 1), layout="constrained")
        if points
        else pyplot.subplots(1, 1, figsize=(11, 5), layout="constrained")
    )
    above, below = axes if points else (axes, axes)
    for first, last, label, colour in spans:
        bars = [(number, each[first], each[last] - each[first]) for number, each in enumerate(times)]
        above.barh(
            [n for n, _, _ in bars], [s for _, _, s in bars], left=[b for _, b, _ in bars], color=colour, label=label
        )
    above.invert_yaxis()
    above.yaxis.get_major_locator().set_params(integer=True)
    above.set_ylabel("CT")
    above.set_title(f"{document['cases']} CTs, {document['engine']}: {document['ct_per_s']:.2f} CT/s", loc="left")
    above.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    above.set_xlim(left=0)
    if points:
        below.fill_between([at for at, _ in points], [percent for _, percent in points], step="mid", color="#e45756")
        below.set_ylim(0, 100)
        below.set_ylabel("GPU busy, %")
    below.set_xlabel("seconds since the first CT was given to a process")
    figure.savefig(path, dpi=110)


def measure(given: argparse.Namespace, folder: Path, scratch: Path) -> dict[str, Any]:
    """The document."""
    model = read_bundle(find_bundle(given.model) if given.model else demonstration_bundle())
    settings = Settings(
        engine=given.engine,
        precision=given.precision,
        device=given.device,
        overlap=given.overlap,
        cache=given.cache or scratch / "cache",
        cases_in_flight=given.cases_in_flight,
    )
    with Segmenter(model, settings) as segmenter, GpuMeter(gpu_uuids([given.device]), _SAMPLE_S) as busy:
        first = load_case(look_for_cases(folder, model.spec.body_parts, settings).cases[0])
        warm = segment_case(first, segmenter)
        if warm.error:
            raise warm.error
        engine = warm.segmented.engine
        del first, warm
        figures = run_once(folder, scratch / "out", segmenter, settings, busy)
        one = None
        if given.one_by_one:
            shutil.rmtree(scratch / "out")
            one = run_once(folder, scratch / "out", segmenter, replace(settings, cases_in_flight=1), busy)
            del one["timeline"]
        loop_s = window_loop_s(folder, segmenter, settings, given.repeats)
    return {
        "benchmark": "throughput",
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(given.device) if given.device.startswith("cuda") else platform.processor(),
        "cpus": usable_cpus(),
        "versions": {"ctflow": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "model": f"{model.spec.name} {model.spec.version}",
        "engine": f"{engine.backend} {engine.precision}",
        **figures,
        "loop_s": round(loop_s, 4),
        "share_of_loop": round(figures["cases"] * loop_s / figures["seconds"], 3),
        "one_by_one": one,
    }


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="folder with series of a CT each")
    parser.add_argument("--count", type=int, default=32, help="copies of a phantom, without --input")
    parser.add_argument("--shape", default="300,512,512", help="D,H,W of the phantom")
    parser.add_argument("-m", "--model", type=Path)
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--precision")
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--overlap", type=float)
    parser.add_argument("--cases-in-flight", type=int)
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--repeats", type=int, default=5, help="of the window loop alone")
    parser.add_argument("--one-by-one", action="store_true", help="also measure one case after another")
    parser.add_argument("--out", type=Path, help="also write the JSON there, with the timeline")
    parser.add_argument("--picture", type=Path, help="also draw the timeline there")
    parser.add_argument("--draw", type=Path, metavar="FILE", help="measure nothing, draw the --picture of this JSON")
    given = parser.parse_args()
    if given.draw:
        draw(given.picture, json.loads(given.draw.read_text()))
        return 0
    import_lean()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        scratch = Path(place)
        shape = [int(word) for word in given.shape.split(",")]
        folder = given.input or make_input(scratch, given.count, (shape[0], shape[1], shape[2]))
        document = measure(given, folder, scratch)
    if given.out:
        given.out.write_text(json.dumps(document) + "\n")
    if given.picture:
        draw(given.picture, document)
    sys.stdout.write(json.dumps({name: found for name, found in document.items() if name != "timeline"}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
