"""Measures one configuration in a separate process: `python -m ctflow.bench.measurement REQUEST.json`.

`bench.compare` writes the request. Each configuration gets a fresh process, so that no engine warms up another or holds
its memory, and engines with conflicting packages can use different interpreters.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctflow.bench.loops import Windows, article_volume, resident_volume, stock_volume, two_channels
from ctflow.bundle.read import read_bundle
from ctflow.compat.monai import import_lean
from ctflow.core.errors import BackendUnavailable, BundleInvalid, CtflowError, first_line
from ctflow.core.model import Model
from ctflow.core.volume import Geometry, Labels, Size3, Volume
from ctflow.engines.contract import precision_from_name
from ctflow.engines.registry import check_engine, open_engine
from ctflow.engines.request import EngineRequest
from ctflow.networks.build import network_from_model
from ctflow.transforms.prepare import prepare_volume
from ctflow.transforms.restore import restore_slabs
from ctflow.transforms.state import Prepared
from ctflow.window.devices import Predict, Worker
from ctflow.window.grid import window_starts

TORCH = "torch"  # the network as MONAI builds it, in place of an engine
STRICT, DEFAULT = "strict fp32", "torch's default"


@dataclass(frozen=True)
class MeasurementRequest:
    """The request for one configuration.

    Attributes:
        method: "stock", "article", "article, one channel" or "ctflow".
        engine: Backend name, or `TORCH`.
        precision: `STRICT`, `DEFAULT` or "fp16" for `TORCH`; else the engine's.
        stitch: Where stock MONAI blends: "device" or "cpu".
        devices: torch devices.
        model: The bundle.
        case: An .npz with hu (D, H, W) int16 and affine_mm (4, 4).
        overlaps: Overlaps to measure.
        batch_size: Windows per call.
        repeats: Timed volumes, after one untimed.
        cache: Folder of stored engines.
        result: Folder of the answer: result.json, and a mask for each overlap.
        basis: Everything else that the answer depends on, so that a change makes another request: digests of weights
            and case, and the interpreter.
    """

    method: str
    engine: str
    precision: str
    stitch: str
    devices: tuple[str, ...]
    model: str
    case: str
    overlaps: tuple[float, ...]
    batch_size: int
    repeats: int
    cache: str | None
    result: str
    basis: tuple[str, ...]


def measure_configuration(request: MeasurementRequest) -> dict[str, Any]:
    """Measure a configuration and write its masks.

    Args:
        request: The configuration.

    Returns:
        Date, engine, versions, and the figures at each overlap: seconds of each volume, number of windows and
        bytes taken on each GPU; or a reason why not.

    Raises:
        CtflowError: This machine or model cannot do it.
    """
    model = read_bundle(Path(request.model))
    _check_engine(request, model.spec.roi)
    _check_model(model, request)
    free = [_free_bytes(device) for device in request.devices]
    volume = _volume(Path(request.case))
    prepared = prepare_volume(volume, model.spec.preprocessing, "cpu")
    size: Size3 = tuple(prepared.tensor.shape[2:])  # type: ignore[assignment]  # a volume has three
    _check_size(size, model.spec.roi)
    host = prepared.tensor.pin_memory() if request.devices[0] != "cpu" else prepared.tensor
    measured = []
    with ExitStack() as stack:
        workers, info = _workers(model, request, stack)
        threads = [stack.enter_context(ThreadPoolExecutor(1)) for _ in workers]
        for number, overlap in enumerate(request.overlaps):
            entry: dict[str, Any] = {"overlap": overlap, "windows": len(window_starts(size, model.spec.roi, overlap))}
            segment = _segmentation(model, request, workers, threads, host, Windows(overlap, request.batch_size))
            try:
                labels, seconds = _timed(segment, request)
            except (CtflowError, torch.OutOfMemoryError) as error:
                measured.append({**entry, "reason": first_line(error)})
                continue
            np.save(Path(request.result) / f"mask-{number}.npy", np.packbits(on_source(labels, prepared, volume)))
            taken = [before - _free_bytes(device) for before, device in zip(free, request.devices, strict=True)]
            entry |= {"seconds": [round(s, 4) for s in seconds], "memory_bytes": taken if any(free) else None}
            measured.append({**entry, "reason": None})
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    date = time.strftime("%Y-%m-%d")
    return {"reason": None, "date": date, "engine_info": info, "versions": versions, "measured": measured}


def _check_engine(request: MeasurementRequest, roi: Size3) -> None:
    if request.engine != TORCH:
        for device in request.devices:
            check_engine(_engine_request(request, device, roi))
    elif request.precision == "fp16" and request.devices[0] == "cpu":
        raise BackendUnavailable("PyTorch computes fp16 only on a GPU", reason="wrong-precision")


def _check_model(model: Model, request: MeasurementRequest) -> None:
    spec = model.spec
    if spec.placement == "even":
        raise BundleInvalid(
            "`ctflow bench compare` compares with MONAI; benchmarks/nnunet_predictor.py compares with nnU-Net",
            reason="not-comparable",
        )
    if spec.activation != "softmax":
        raise BundleInvalid(
            f"`ctflow bench compare` needs a model with a softmax; this one has {spec.activation}",
            reason="not-comparable",
        )
    if request.method.endswith("one channel") and spec.out_channels != 2:
        raise BundleInvalid(
            f"one channel suffices only for two classes; this model has {spec.out_channels}", reason="not-comparable"
        )


def _check_size(size: Size3, window: Size3) -> None:
    if any(voxels < needed for voxels, needed in zip(size, window, strict=True)):
        has, needs = (" x ".join(map(str, each)) for each in (size, window))
        grid = f"prepared for this model the phantom has {has} voxels along the network's axes"
        raise BundleInvalid(f"{grid}, smaller than the window of {needs}: use a larger --shape", reason="window-size")


def _free_bytes(device: str) -> int:
    """Free memory of a GPU; 0 for the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else 0


def _volume(path: Path) -> Volume:
    with np.load(path) as case:
        hu, affine = case["hu"], case["affine_mm"]
    return Volume(hu, Geometry(hu.shape, affine))


def _workers(model: Model, request: MeasurementRequest, stack: ExitStack) -> tuple[list[Worker], dict[str, Any] | None]:
    """The workers that compute windows on each device, and their engine."""
    if request.engine == TORCH:
        stack.enter_context(_arithmetic(request.precision))
        half = request.precision == "fp16"
        networks = [(network_from_model(model), device) for device in request.devices]
        return [Worker(_plain(network, device, half=half), torch.device(device)) for network, device in networks], None
    workers, info = [], None
    for device in request.devices:
        engine = open_engine(_engine_request(request, device, model.spec.roi), model)
        stack.callback(engine.close)
        info = info or asdict(engine.info)
        workers.append(Worker(engine.predict, torch.device(engine.info.device)))
    return workers, info


def _engine_request(request: MeasurementRequest, device: str, roi: Size3) -> EngineRequest:
    precision = precision_from_name(request.precision)
    cache = Path(request.cache) if request.cache else None
    return EngineRequest(request.engine, device, precision, roi, (1, request.batch_size), cache)


def _plain(network: nn.Module, device: str, *, half: bool) -> Predict:
    """The network without rewrites."""
    on_device = network.to(device).eval()
    if half:
        on_device = on_device.half()

    def predict(windows: Tensor) -> Tensor:
        logits: Tensor = on_device(windows.half() if half else windows)
        return logits

    return predict


@contextmanager
def _arithmetic(precision: str) -> Iterator[None]:
    """Set the arithmetic: strict fp32 computes no product in tf32; the default is torch's."""
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, products.allow_tf32
    if precision == STRICT:
        cudnn.allow_tf32 = products.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, products.allow_tf32 = before


def _segmentation(
    model: Model,
    request: MeasurementRequest,
    workers: Sequence[Worker],
    threads: Sequence[Executor],
    host: Tensor,
    windows: Windows,
) -> Callable[[], Labels]:
    """A call that segments the volume, from host memory to a mask in host memory."""
    spec = model.spec
    if request.method == "stock":
        half = request.precision == "fp16"
        stitch = str(workers[0].device) if request.stitch == "device" else "cpu"
        return lambda: stock_volume(workers[0], host, spec, windows, half=half, stitch=stitch)
    if request.method.startswith("article"):
        both = [Worker(two_channels(worker.predict), worker.device) for worker in workers]
        one = request.method.endswith("one channel")
        return lambda: article_volume(both, host, spec, windows, threads, one_channel=one)
    return lambda: resident_volume(workers, host, spec, windows)


def _timed(segment: Callable[[], Labels], request: MeasurementRequest) -> tuple[Labels, list[float]]:
    """The last mask, and the seconds of each volume after the first."""
    seconds = []
    for _ in range(request.repeats + 1):
        labels: Labels = np.empty(0, np.uint8)  # while the last mask is kept, the next one costs new page-locked memory
        for device in request.devices:
            if device.startswith("cuda"):
                torch.cuda.synchronize(device)
        start = time.perf_counter()
        with torch.inference_mode():
            labels = segment()  # ends with the mask in host memory
        seconds.append(time.perf_counter() - start)
    return labels, seconds[1:]


def on_source(labels: Labels, prepared: Prepared, volume: Volume) -> Labels:
    """A mask on the grid of the CT.

    Args:
        labels: (X, Y, Z) uint8 on the network's grid; of several classes, everything that is not background is marked.
        prepared: Maps back to the CT's grid.
        volume: The CT.

    Returns:
        (D, H, W) uint8.
    """
    marked = torch.from_numpy(labels > 0).to(torch.float32)[None]
    found = np.empty(volume.array.shape, np.uint8)
    for rows, slab in restore_slabs(prepared, marked):
        found[rows] = (slab[0] > 0.5).numpy()
    return found


def request_from_document(document: Mapping[str, Any]) -> MeasurementRequest:
    """A request written by `bench.compare`."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in document.items()
    }
    return MeasurementRequest(**fields)


def main() -> None:
    """Carry out the file's request; the answer is result.json, with a reason if the configuration cannot run here."""
    import_lean()
    request = request_from_document(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    try:
        answer = measure_configuration(request)
    except (CtflowError, torch.OutOfMemoryError) as error:
        answer = {"reason": first_line(error)}
    (Path(request.result) / "result.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
