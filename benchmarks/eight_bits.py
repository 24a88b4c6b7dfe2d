"""Measure what --precision fp8 gains and costs: ms a window beside fp16, and the masks' Dice to strict fp32.

    python benchmarks/eight_bits.py [--phantoms 1000,1001,1002,1003] [--shape 160,256,256] [--batch 8] [--rounds 5]
                                    [--cache DIR] [--out FILE]

The network is the demonstration bundle's, widened to a feature_size of 48 (training/widen_network.py), so that masks
mean something; its channels are nearly equal in fours, so that roundings do not cancel as those of a trained wide
network would. Single convolutions are timed with random numbers. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_volume import error_to_fp32, milliseconds

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.model import Model, NetworkSpec
from ctflow.core.volume import Size3, Volume
from ctflow.engines.hardware import driver_version
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.kernels.convolution import HopperConvolution
from ctflow.kernels.convolution_fp8 import Fp8Convolution
from ctflow.kernels.machine_code.launch import GpuKernels
from ctflow.networks.build import network_from_spec
from ctflow.phantom import phantom_from_seed
from ctflow.pipeline.segmenter import Segmenter
from ctflow.settings.run import Settings

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from widen_network import widen_weights

DEVICE, FEATURE_SIZE, SIDE = "cuda:0", 48, 96
ENGINES = {"fp16": ("fused", "fp16"), "fp8": ("fused", "fp8")}
# Channels of each share, and whether a norm comes before.
CONVOLUTIONS = {"48": ((48,), False), "48 with norm": ((48,), True), "96 in two shares": ((48, 48), False)}


def wide_model(batch: int) -> Model:
    """The demonstration model at a feature_size of 48, which computes nearly the same."""
    narrow = read_bundle(demonstration_bundle())
    network = NetworkSpec(narrow.spec.network.name, {**narrow.spec.network.arguments, "feature_size": FEATURE_SIZE})
    weights = widen_weights(narrow.weights, network_from_spec(network), noise=0.01)
    spec = replace(narrow.spec, network=network, batch_size=batch)
    return Model(spec, weights, f"widened from {narrow.weights_digest[:12]}, noise 0.01, seed 0")


def drawn_volume(shape: Size3, seed: int) -> Volume:
    """The CT of a phantom."""
    return phantom_from_seed(seed, shape, tumours=3).volume


def mask_of(model: Model, volume: Volume, settings: Settings) -> npt.NDArray[np.bool_]:
    """What an engine marks."""
    with Segmenter(model, settings) as segmenter:
        return np.asarray(segmenter.segment(volume)[0].labels > 0)


def dice(first: npt.NDArray[np.bool_], second: npt.NDArray[np.bool_]) -> float:
    """Overlap of two masks."""
    return float(2 * (first & second).sum() / (first.sum() + second.sum()))


def compare_masks(model: Model, volumes: Mapping[int, Volume], cache: Path) -> dict[str, Any]:
    """Dice of each phantom's masks to those of strict fp32, and how many voxels these mark."""
    exact = Settings(engine="eager", precision="fp32", device=DEVICE, cache=cache)
    masks = {seed: mask_of(model, volume, exact) for seed, volume in volumes.items()}
    found: dict[str, Any] = {"voxels": {seed: int(mask.sum()) for seed, mask in masks.items()}}
    for name, (engine, precision) in ENGINES.items():
        settings = replace(exact, engine=engine, precision=precision)
        found[name] = {seed: dice(mask_of(model, volume, settings), masks[seed]) for seed, volume in volumes.items()}
    return found


def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each call, one round after another."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(milliseconds(call, repeats))
    return found


def time_engines(model: Model, batch: int, rounds: int, cache: Path) -> dict[str, Any]:
    """Milliseconds a window in full batches, and the largest difference of logits to strict fp32."""
    requests = {
        name: EngineRequest(engine, DEVICE, precision, model.spec.roi, (1, batch), cache)  # type: ignore[arg-type]
        for name, (engine, precision) in ENGINES.items()
    }
    windows = torch.rand((batch, 1, *model.spec.roi), device=DEVICE)
    opened = {}
    for name, request in requests.items():
        prepare_engine(request, model)
        opened[name] = open_engine(request, model)
    times = in_turn({name: partial(engine.predict, windows) for name, engine in opened.items()}, rounds, 20)
    result = {}
    for name, engine in opened.items():
        with closing(engine):
            ms = [value / batch for value in times[name]]
            result[name] = {"ms": statistics.median(ms), "rounds": ms, "relative_error": error_to_fp32(engine, model)}
    return result


def time_convolutions(batch: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds a window of the convolutions at full resolution."""
    kernels, result = GpuKernels(DEVICE), {}
    for name, (shares, normalized) in CONVOLUTIONS.items():
        cin = sum(shares)
        weight = torch.randn(FEATURE_SIZE, cin, 3, 3, 3) / (27 * cin) ** 0.5
        parts = [torch.randn(batch, SIDE, SIDE, SIDE, share, device=DEVICE).half() for share in shares]
        norm = torch.rand(batch, 2, cin, device=DEVICE) + 0.5 if normalized else None
        made = {
            "fp16": HopperConvolution(weight, shares, (SIDE,) * 3, torch.float16, DEVICE, kernels),
            "fp8": Fp8Convolution(weight, shares, [5] * len(shares), DEVICE, kernels),
        }
        times = in_turn({kind: partial(each, parts, norm) for kind, each in made.items()}, rounds, 10)
        result[name] = {kind: statistics.median(values) / batch for kind, values in times.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phantoms", default="1000,1001,1002,1003")
    parser.add_argument("--shape", default="160,256,256")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("engines"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    d, h, w = map(int, given.shape.split(","))
    seeds = [int(seed) for seed in given.phantoms.split(",")]
    with ProcessPoolExecutor(4) as pool:
        drawn = [pool.submit(drawn_volume, (d, h, w), seed) for seed in seeds]
        model = wide_model(given.batch)
        document: dict[str, Any] = {
            "network": f"SwinUNETR, feature_size {FEATURE_SIZE}", "weights": model.weights_digest, "shape": (d, h, w),
            "batch": given.batch, "gpu": torch.cuda.get_device_name(), "driver": driver_version(),
            "torch": torch.__version__, "python": platform.python_version(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        steps: dict[str, Callable[[], Any]] = {
            "windows": lambda: time_engines(model, given.batch, given.rounds, given.cache),
            "convolutions_ms": lambda: time_convolutions(given.batch, given.rounds),
            "dice_to_fp32": lambda: compare_masks(
                model, {seed: each.result() for seed, each in zip(seeds, drawn, strict=True)}, given.cache
            ),
        }
        for name, step in steps.items():
            document[name] = step()
            if given.out is not None:
                given.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document))  # noqa: T201


if __name__ == "__main__":
    main()
