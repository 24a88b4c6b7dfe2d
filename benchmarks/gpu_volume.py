"""Measure an engine's milliseconds per window, and a whole volume of 300 x 512 x 512, from and to host memory.

    python benchmarks/gpu_volume.py --engine tensorrt [--model BUNDLE | --feature-size 48] [--batch 8] [--overlap 0]
                                    [--cache DIR] [--portable]

Without a bundle the network is the demonstration bundle's SwinUNETR at another width, with random weights of a fixed
seed; time does not depend on the weights. The volume is noise at the bundle's spacing, so that it has the same windows
as an article's volume of 512 x 512 x 300. --portable lets `fused` compute with the kernels of GPUs that are no Hopper.
The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.model import Model, NetworkSpec
from ctflow.core.steps import Resample
from ctflow.core.volume import Geometry, Volume
from ctflow.engines import fused
from ctflow.engines.contract import Engine
from ctflow.engines.hardware import driver_version
from ctflow.engines.registry import batch_range_for, open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.networks.build import network_from_spec
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings

SHAPE = (300, 512, 512)
SPACING_MM = 1.5


def model_of_width(feature_size: int, batch: int | None) -> Model:
    """The demonstration model at another width, with random weights and without resampling."""
    model = without_resampling(read_bundle(demonstration_bundle()), batch)
    network = NetworkSpec("SwinUNETR", {**model.spec.network.arguments, "feature_size": feature_size})
    torch.manual_seed(0)
    weights = network_from_spec(network).state_dict()
    return Model(replace(model.spec, network=network), weights, f"random weights, seed 0, feature_size {feature_size}")


def without_resampling(model: Model, batch: int | None) -> Model:
    """A model whose windows are on the volume's own grid; None keeps the bundle's batch."""
    steps = tuple(step for step in model.spec.preprocessing if not isinstance(step, Resample))
    return replace(model, spec=replace(model.spec, preprocessing=steps, batch_size=batch or model.spec.batch_size))


def milliseconds(call: Callable[[], object], repeats: int) -> float:
    """Median time of a call on the current GPU, by its events, after three calls."""
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for event in events[:-1]:
        event.record()
        call()
    events[-1].record()
    torch.cuda.synchronize()
    return statistics.median(first.elapsed_time(second) for first, second in itertools.pairwise(events))


def time_windows(engine: Engine, repeats: int) -> float:
    """Milliseconds per window in full batches of noise."""
    batch = engine.info.batch_range[1]
    windows = torch.rand((batch, 1, *engine.info.roi), device=engine.info.device)
    return milliseconds(lambda: engine.predict(windows), repeats) / batch


def error_to_fp32(engine: Engine, model: Model) -> float:
    """Largest difference of a window's logits to PyTorch in fp32 on the same GPU, relative to the largest logit."""
    info = engine.info
    windows = torch.rand((info.batch_range[1], 1, *info.roi), device=info.device)
    found = engine.predict(windows).clone()
    reference = open_engine(EngineRequest("eager", info.device, "fp32", info.roi, (1, 1)), model)
    expected = reference.predict(windows[:1])
    reference.close()
    if expected.shape[1] != found.shape[1]:
        expected = expected[:, 1:2] - expected[:, 0:1]
    return float((found[:1] - expected).abs().max() / expected.abs().max())


def time_volume(model: Model, settings: Settings, repeats: int, *, logits_only: bool) -> list[dict[str, float]]:
    """Seconds of each stage of whole volumes, after one that is not counted."""
    noise = np.random.default_rng(0).integers(-1000, 400, SHAPE, dtype=np.int16)
    # Index (d, h, w) to LPS: slices along z, rows along y, columns along x.
    affine = np.array([[0, 0, SPACING_MM, 0], [0, SPACING_MM, 0, 0], [SPACING_MM, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = Volume(noise, Geometry(SHAPE, affine))
    found = []
    with Segmenter(model, settings, logits_only=logits_only) as segmenter:
        for turn in range(repeats + 1):
            start = time.perf_counter()
            _, seconds = segmenter.segment(volume)
            if turn:
                found.append({"total": time.perf_counter() - start, **seconds})
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", default="tensorrt")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--model", type=Path, help="MONAI bundle (default: a network with random weights)")
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--batch", type=int, help="windows per call (default: the bundle's, at least 4)")
    parser.add_argument("--overlap", type=float, default=0.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--cache", type=Path, default=Path("engines"))
    parser.add_argument("--portable", action="store_true", help="fused: the kernels of GPUs that are no Hopper")
    parser.add_argument("--only-prepare", action="store_true", help="build the engine and measure nothing")
    given = parser.parse_args()
    with fused.portable_kernels() if given.portable else nullcontext():
        measure(parser, given)


def measure(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    """Measure what was asked for and print it."""
    if given.batch is not None and given.batch < 4:
        parser.error("--batch: a GPU computes at least 4 windows at a time")
    torch.cuda.set_device(given.device.partition(",")[0])
    bundle = None if given.model is None else read_bundle(given.model)
    model = (
        model_of_width(given.feature_size, given.batch) if bundle is None else without_resampling(bundle, given.batch)
    )
    first, batches = given.device.partition(",")[0], batch_range_for(model.spec, given.device)
    wanted = EngineRequest(given.engine, first, given.precision, model.spec.roi, batches, given.cache)
    start = time.perf_counter()
    # Random weights have labels that any rounding changes: only their logits are judged.
    random = given.model is None
    prepare_engine(wanted, model, logits_only=random)
    prepared_s = time.perf_counter() - start
    if given.only_prepare:
        print(json.dumps({"prepare_s": round(prepared_s, 1)}))  # noqa: T201
        return
    engine = open_engine(wanted, model)
    try:
        error, window_ms, info = error_to_fp32(engine, model), time_windows(engine, 30), asdict(engine.info)
    finally:
        engine.close()
    settings = Settings(engine=given.engine, precision=given.precision, overlap=given.overlap, device=given.device,
                        cache=given.cache)  # fmt: skip
    stages = time_volume(model, settings, given.repeats, logits_only=random)
    print(json.dumps({  # noqa: T201
        "engine": info, "network": model.spec.network.name, "arguments": dict(model.spec.network.arguments),
        "weights": "random" if given.model is None else "the bundle's", "prepare_s": round(prepared_s, 1),
        "relative_error_to_fp32": error, "window_ms": window_ms, "overlap": given.overlap, "shape": SHAPE,
        "volume_s": statistics.median(entry["total"] for entry in stages), "volumes": stages,
        "gpu": torch.cuda.get_device_name(), "driver": driver_version(), "torch": torch.__version__,
        "portable": given.portable, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
