"""Measure ms a window of nnU-Net's network: ctflow's own engine beside torch.compile and PyTorch, in one process.

    python benchmarks/gpu_unet.py [--network ResidualEncoderUNet] [--batches 1,2,4] [--classes 14] [--profile]
                                  [--convolutions] [--max-autotune] [--cudnn-benchmark] [--portable] [--out FILE]

The network is that of nnU-Net's default 3d_fullres plan: six stages of 32 to 320 channels, two convolutions each,
windows of 128 x 128 x 128; weights, and those of the norms, are random with a fixed seed. All compute in fp16 and are
compared with strict fp32. torch.compile gets the network in fp16 with its windows contiguous and with channels last,
each also as a CUDA graph; the fastest counts. --profile adds the CUDA time of each kernel of a call, --convolutions
that of single convolutions by ctflow's kernels, with several numbers of warp groups, and by cuDNN. --portable lets
`fused` compute with the kernels of GPUs that are no Hopper. The last line of the output is one JSON document.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from gpu_volume import milliseconds
from torch import Tensor, nn
from torch.nn import functional

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import fused
from ctflow.engines.contract import Engine
from ctflow.engines.hardware import driver_version
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.kernels.convolution import HopperConvolution, WarpGroups, division_of
from ctflow.kernels.machine_code.launch import GpuKernels
from ctflow.kernels.portable_convolution import PortableConvolution
from ctflow.networks.build import network_from_spec

ROI = (128, 128, 128)
DEVICE = "cuda:0"
# Channels of the output, of each share, the volume's side, the stride, and whether a norm comes before.
CONVOLUTIONS = (
    (32, (32,), 128, 1, True),
    (32, (32, 32), 128, 1, False),
    (64, (32,), 128, 2, True),
    (64, (64,), 64, 1, True),
    (64, (64, 64), 64, 1, False),
    (48, (48,), 96, 1, True),
)
BLOCKS = (WarpGroups(2), WarpGroups(2, 2), WarpGroups(3), WarpGroups(3, 2))


def model_of(network: str, classes: int) -> Model:
    """A model of one of nnU-Net's networks, with random weights."""
    arguments: dict[str, Any] = {
        "input_channels": 1, "num_classes": classes, "n_stages": 6, "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3] * 3] * 6, "strides": [[1] * 3, *[[2] * 3] * 5],
        "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    if network == "PlainConvUNet":
        arguments |= {"n_conv_per_stage": [2] * 6, "n_conv_per_stage_decoder": [2] * 5}
    else:
        arguments |= {"n_blocks_per_stage": [1, 3, 4, 6, 6, 6], "n_conv_per_stage_decoder": [1] * 5}
    spec = NetworkSpec(f"dynamic_network_architectures.architectures.unet.{network}", arguments)
    torch.manual_seed(0)
    made = network_from_spec(spec)
    for module in made.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    whole = ModelSpec(
        name=network, version="random weights", network=spec, in_channels=1, out_channels=classes, preprocessing=(),
        roi=ROI, overlap=0.5, blend="gaussian", batch_size=1, activation="softmax", threshold=None, segments=(),
        intended_use="", demonstration=False,
    )  # fmt: skip
    return Model(whole, made.state_dict(), f"random weights, seed 0, {network}, {classes} classes")


def strict(network: nn.Module, windows: Tensor, classes: int) -> Tensor:
    """Logits in strict fp32, window by window, as engines give them: of two classes the difference."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            logits = torch.cat([network(window[None]) for window in windows])
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    return logits[:, 1:] - logits[:, :1] if classes == 2 else logits


def compared(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    if found.shape != expected.shape:  # both classes
        found = found[:, 1:] - found[:, :1]
    return float(f"{float((found.float() - expected).abs().max() / expected.abs().max()):.3g}")


def candidates(network: nn.Module, modes: list[str | None]) -> dict[str, Callable[[Tensor], Tensor]]:
    """PyTorch's ways of computing the network in fp16, by name."""
    half = copy.deepcopy(network).half()
    last = copy.deepcopy(half).to(memory_format=torch.channels_last_3d)

    def contiguous(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda windows: run(windows.half())

    def channels_last(run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda windows: run(windows.half().contiguous(memory_format=torch.channels_last_3d))

    found = {"eager, contiguous": contiguous(half), "eager, channels last": channels_last(last)}
    for mode in modes:
        text = "compile" if mode is None else f"compile, {mode}"
        found |= {
            f"{text}, contiguous": contiguous(torch.compile(copy.deepcopy(half), mode=mode)),
            f"{text}, channels last": channels_last(torch.compile(copy.deepcopy(last), mode=mode)),
        }
    return found


def as_graph(call: Callable[[Tensor], Tensor], windows: Tensor) -> Callable[[], Tensor]:
    """The call as a CUDA graph, which takes launches off the CPU as ctflow's engine does."""
    aside = torch.cuda.Stream()
    with torch.cuda.stream(aside):
        for _ in range(3):
            call(windows)
    aside.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        logits = call(windows)

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay


def row_of(call: Callable[[], Tensor], expected: Tensor, batch: int, repeats: int) -> dict[str, Any]:
    """Time and error of a way of computing one batch."""
    start = time.perf_counter()
    first = call()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    error = compared(first, expected)
    return {
        "ms_a_window": round(milliseconds(call, repeats) / batch, 4),
        "relative_error": error,
        "first_call_s": round(seconds, 1),
    }


def rows(model: Model, given: argparse.Namespace) -> list[dict[str, Any]]:
    """All ways of computing each batch; one that fails says why."""
    network = network_from_spec(model.spec.network)
    network.load_state_dict(dict(model.weights))
    network = network.eval().requires_grad_(False).to(DEVICE)
    modes: list[str | None] = [None, *(["max-autotune-no-cudagraphs"] if given.max_autotune else [])]
    found = []
    for batch in given.batches:
        windows = torch.rand(batch, 1, *ROI, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(batch))
        expected = strict(network, windows, given.classes)
        calls: dict[str, Callable[[], Callable[[], Tensor]]] = {"fused": lambda: fused_call(model, windows)}  # noqa: B023
        if not given.only_fused:
            torch.compiler.reset()  # a batch is compiled for itself, not for all
            for name, call in candidates(network, modes).items():
                calls[name] = lambda call=call: lambda: call(windows)  # noqa: B023
                calls[f"{name}, as a graph"] = lambda call=call: as_graph(call, windows)  # noqa: B023
        for name, make in calls.items():
            row: dict[str, Any] = {"batch": batch, "by": name}
            try:
                with torch.no_grad():
                    row |= row_of(make(), expected, batch, given.repeats)
            except Exception as error:  # noqa: BLE001  # the others count without it
                row["error"] = f"{type(error).__name__}: {str(error)[:600]}"
            print(json.dumps(row), flush=True)  # noqa: T201
            found.append(row)
            torch.cuda.empty_cache()
    return found


@cache
def engine_of(model: Model) -> Engine:
    """Ctflow's own engine."""
    return open_engine(EngineRequest("fused", DEVICE, "fp16", ROI, (1, 16)), model)


def fused_call(model: Model, windows: Tensor) -> Callable[[], Tensor]:
    """A call of ctflow's own engine."""
    engine = engine_of(model)
    return lambda: engine.predict(windows)


def table_of(call: Callable[[], object], repeats: int = 5) -> list[dict[str, Any]]:
    """CUDA time of each kernel of a call, the longest first."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415  # only when asked for

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    lines = [(each.device_time_total / repeats, each.count / repeats, each.key[:120]) for each in found.key_averages()]
    return [{"us": round(us, 1), "calls": count, "kernel": key} for us, count, key in sorted(lines, reverse=True) if us]


def profiles(model: Model, batch: int) -> list[dict[str, Any]]:
    """The kernels of one call of the engine, not as a graph."""
    engine = engine_of(model)
    with torch.no_grad():
        windows = torch.rand(batch, 1, *ROI, device=DEVICE)
        found = table_of(lambda: engine.launch(windows))
    for line in found:
        print(json.dumps(line), flush=True)  # noqa: T201
    return found


def convolution_rows(batch: int, repeats: int) -> list[dict[str, Any]]:
    """Single convolutions by ctflow's kernels, Hopper's with each of `BLOCKS` that fits, and by cuDNN alone."""
    found, kernels = [], GpuKernels(DEVICE)
    for cout, shares, side, stride, normalized in CONVOLUTIONS:
        torch.manual_seed(0)
        cin = sum(shares)
        weight = torch.randn(cout, cin, 3, 3, 3) / (27 * cin) ** 0.5
        volumes = [torch.randn(batch, side, side, side, share, device=DEVICE).half() for share in shares]
        norm = torch.stack([torch.rand(batch, cin), torch.randn(batch, cin)], 1).to(DEVICE) if normalized else None
        x = torch.cat(volumes, -1)
        if norm is not None:
            x = functional.leaky_relu(x * norm[:, None, None, None, 0] + norm[:, None, None, None, 1], 0.01).half()
        x, kept = x.movedim(-1, 1), weight.to(DEVICE).half().contiguous(memory_format=torch.channels_last_3d)

        def by_cudnn(x: Tensor = x, kept: Tensor = kept, stride: int = stride) -> Tensor:
            return functional.conv3d(x, kept, padding=1, stride=stride)

        expected = by_cudnn()
        flop = 54 * cin * cout * (side // stride) ** 3
        case = {"convolution": f"{'+'.join(map(str, shares))} -> {cout}", "side": side, "stride": stride,
                "normalized": normalized}  # fmt: skip
        ways: dict[str, Callable[[], Any]] = {"cuDNN": by_cudnn}
        if stride == 1:
            portable = PortableConvolution(weight, shares, torch.float16, DEVICE, kernels)
            ways["portable"] = lambda portable=portable: portable(volumes, norm)  # noqa: B023
        for block in BLOCKS:
            if division_of(cout, shares, 9, side // stride, stride, block) is not None:
                one = HopperConvolution(
                    weight, shares, (side,) * 3, torch.float16, DEVICE, kernels, stride=stride, block=block
                )
                ways[f"{block.groups} groups, {block.loaders} loading"] = lambda one=one: one(volumes, norm)  # noqa: B023
        for name, call in ways.items():
            row: dict[str, Any] = {**case, "by": name}
            try:
                if name != "cuDNN":
                    y = call()[0].movedim(-1, 1)
                    row["relative_error"] = compared(y, expected.float())
                ms = milliseconds(call, repeats) / batch
                row |= {"ms_a_window": round(ms, 4), "tflops": round(flop / ms / 1e9, 1)}
            except Exception as error:  # noqa: BLE001  # the others count without it
                row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
            print(json.dumps(row), flush=True)  # noqa: T201
            found.append(row)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("PlainConvUNet", "ResidualEncoderUNet"), default="PlainConvUNet")
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--batches", type=lambda text: [int(each) for each in text.split(",")], default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--max-autotune", action="store_true", help="also torch.compile's slowest search: minutes")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="cuDNN searches for its fastest algorithms")
    parser.add_argument("--only-fused", action="store_true", help="ctflow's own engine alone")
    parser.add_argument("--profile", action="store_true", help="also the time of each kernel, at the last batch")
    parser.add_argument("--convolutions", action="store_true", help="also single convolutions, at the last batch")
    parser.add_argument("--portable", action="store_true", help="fused: the kernels of GPUs that are no Hopper")
    parser.add_argument("--out", type=Path, help="also write the JSON document there")
    given = parser.parse_args()
    with fused.portable_kernels() if given.portable else nullcontext():
        measure_all(given)


def measure_all(given: argparse.Namespace) -> None:
    """Measure what was asked for and print it."""
    torch.cuda.set_device(DEVICE)
    record: dict[str, Any] = {
        "benchmark": "gpu_unet", "portable": given.portable, "cudnn_benchmark": given.cudnn_benchmark,
        "network": given.network, "classes": given.classes, "window": ROI,
        "date": time.strftime("%Y-%m-%d"), "gpu": torch.cuda.get_device_name(), "driver": driver_version(),
        "torch": torch.__version__, "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(),
    }  # fmt: skip
    batch = given.batches[-1]
    model = model_of(given.network, given.classes)
    torch.backends.cudnn.benchmark = given.cudnn_benchmark  # `ctflow run` does not search
    parts: dict[str, Callable[[], list[dict[str, Any]]]] = {"rows": lambda: rows(model, given)}
    if given.profile:
        parts["kernels_of_a_call"] = lambda: profiles(model, batch)
    if given.convolutions:
        parts["convolutions"] = lambda: convolution_rows(batch, given.repeats)
    for name, measure in parts.items():
        try:
            record[name] = measure()
        except Exception:  # noqa: BLE001  # the others count without it
            record[name] = traceback.format_exc()[-2000:]
            print(record[name], flush=True)  # noqa: T201
    text = json.dumps(record)
    if given.out is not None:
        given.out.write_text(text + "\n")
    print(text)  # noqa: T201


if __name__ == "__main__":
    main()
