"""Measure seconds per window of MONAI's unchanged network and of each CPU engine, on the same windows in one run.

    python benchmarks/cpu_engines.py [--pairs 4]

Windows come in pairs: `ctflow run` gives OpenVINO two at a time, which it computes side by side. The stock network
computes them one after another, as the bundle's `sw_batch_size` of 1 says.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BackendUnavailable
from ctflow.core.model import Model
from ctflow.core.processes import usable_cpus
from ctflow.engines.contract import Engine
from ctflow.engines.registry import backend_module, backends, open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.networks.build import network_from_model
from ctflow.phantom import phantom_from_seed
from ctflow.transforms.prepare import prepare_volume


@dataclass
class Candidate:
    """One engine and precision, and its measurements."""

    name: str
    predict: Callable[[Tensor], Tensor]
    seconds: list[float] = field(default_factory=list)
    error: float = 0.0
    overlap: int = 0
    marked: int = 0

    @property
    def dice(self) -> float:
        """Dice of the masks of all windows together against the stock network in fp32."""
        return 2 * self.overlap / self.marked if self.marked else 1.0


def windows_of_phantom(model: Model, count: int) -> list[Tensor]:
    """Windows of a synthetic chest, prepared as `ctflow run` does, spread over the volume."""
    prepared = prepare_volume(phantom_from_seed(7).volume, model.spec.preprocessing, "cpu").tensor
    starts = [range(0, max(1, size - side + 1), side // 2) for size, side in
              zip(prepared.shape[2:], model.spec.roi, strict=True)]  # fmt: skip
    places = list(itertools.product(*starts))
    windows = []
    for d, h, w in places[:: max(1, len(places) // count)][:count]:
        sides = model.spec.roi
        window = torch.zeros(1, model.spec.in_channels, *sides)
        part = prepared[:, :, d : d + sides[0], h : h + sides[1], w : w + sides[2]]
        window[:, :, : part.shape[2], : part.shape[3], : part.shape[4]] = part
        windows.append(window)
    return windows


def stock_candidate(model: Model) -> Candidate:
    """MONAI's own module under torch.inference_mode, without rewrites."""
    network = network_from_model(model)

    def predict(window: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(one) for one in window.split(1)])

    return Candidate("stock fp32", predict)


def engine_candidates(model: Model, folder: Path) -> tuple[list[Candidate], dict[str, float], list[Engine]]:
    """Every engine and precision of this machine, and the seconds to make and open it."""
    candidates, seconds, engines = [], {}, []
    for name, available, _ in backends():
        for precision in ("fp32", "bf16"):
            # eager fp32 is the stock network again, and its bf16 takes minutes per window on a CPU without bf16.
            if not available or name == "eager":
                continue
            try:
                backend_module(name).check_settings("cpu", precision)
            except BackendUnavailable as error:
                sys.stdout.write(f"{name} {precision}: {error}\n")
                continue
            start = time.perf_counter()
            request = EngineRequest(name, "cpu", precision, model.spec.roi, (1, 2), folder)
            prepare_engine(request, model)
            made = time.perf_counter()
            engine = open_engine(request, model)
            seconds[f"make {name} {precision}"] = round(made - start, 2)
            seconds[f"open {name} {precision}"] = round(time.perf_counter() - made, 2)
            candidates.append(Candidate(f"{name} {precision}", engine.predict))
            engines.append(engine)
    return candidates, seconds, engines


def difference_of(logits: Tensor) -> Tensor:
    """Logit 1 minus logit 0, from one channel or two."""
    return logits if logits.shape[1] == 1 else logits[:, 1:2] - logits[:, 0:1]


def compare(candidates: list[Candidate], windows: list[Tensor]) -> None:
    """Run every candidate on every window in turn; the first candidate is the reference."""
    for candidate in candidates:
        candidate.predict(windows[0])  # the first call allocates
    for window in windows:
        reference = torch.zeros(())
        for candidate in candidates:
            start = time.perf_counter()
            logits = candidate.predict(window)
            candidate.seconds.append((time.perf_counter() - start) / len(window))
            difference = difference_of(logits)
            if candidate is candidates[0]:
                reference = difference.clone()
            error = (difference - reference).abs().max() / reference.abs().max()
            candidate.error = max(candidate.error, float(error))
            candidate.overlap += int(((difference > 0) & (reference > 0)).sum())
            candidate.marked += int((difference > 0).sum()) + int((reference > 0).sum())


def main() -> None:
    """Print a table and one JSON document last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    torch.set_num_threads(usable_cpus())
    model = read_bundle(demonstration_bundle())
    single = windows_of_phantom(model, 2 * arguments.pairs)
    windows = [torch.cat(pair) for pair in zip(single[::2], single[1::2], strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        candidates, seconds, engines = engine_candidates(model, Path(folder))
        candidates.insert(0, stock_candidate(model))
        compare(candidates, windows)
        for engine in engines:
            engine.close()
    stock = candidates[0].seconds
    rows = {}
    for candidate in candidates:
        # Pairs of one window run close together in time, so that a busy moment hits both.
        ratio = statistics.median(a / b for a, b in zip(stock, candidate.seconds, strict=True))
        median = statistics.median(candidate.seconds)
        error, dice = candidate.error, candidate.dice
        rows[candidate.name] = {"seconds_a_window": round(median, 4), "times_stock": round(ratio, 2),
                                "relative_error": float(f"{error:.2g}"), "dice": round(dice, 6)}  # fmt: skip
        sys.stdout.write(f"{candidate.name:18} {median:7.3f} s  {ratio:6.2f} x  error {error:.1e}  Dice {dice:.6f}\n")
    document = {
        "benchmark": "cpu_engines",
        "windows": len(single),
        "roi": list(model.spec.roi),
        "marked_voxels": candidates[0].marked // 2,
        "engines": rows,
        "seconds": seconds,
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
    }
    sys.stdout.write(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
