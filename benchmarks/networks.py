"""Measure ms a window of the networks that CT models use, by engine: sizes of public models, random weights.

    python benchmarks/networks.py                        # on the CPU: eager and OpenVINO
    python benchmarks/networks.py --device cuda:0        # on a GPU: eager and torch.compile
    python benchmarks/networks.py --networks UNet,DynUNet --roi 64 --repeats 1

The engines of a network take turns, so that other load on the machine affects all of them alike; the best of the
repeats counts. Every line is one JSON document: the machine, then one line for each network and engine. --out FILE also
writes all of them as one document.

On a CPU OpenVINO gets two windows, which it computes side by side, as in `ctflow run`; eager gets one. On a GPU all get
the batch that `ctflow run` takes there. torch.compile compiles for up to a minute a network: after --seconds in all, no
further network is compiled, and its line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ctflow.core.errors import CtflowError
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.core.processes import usable_cpus
from ctflow.core.volume import Size3
from ctflow.engines.contract import Engine
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.networks.build import network_from_spec

_NNUNET = "dynamic_network_architectures.architectures.unet."
_CPU = (("eager", "fp32"), ("openvino", "fp32"))
_GPU = (("eager", "fp32"), ("eager", "fp16"), ("compile", "fp16"))
# VISTA-3D's `everything_labels`: 132 classes without those that are groups of others, or lesions.
_EVERYTHING = sorted({*range(1, 133)} - {2, 16, 18, 20, 21, 23, 24, 25, 26, 27, 128, 129, 130, 131, 132})


@dataclass(frozen=True)
class Public:
    """A network as a public model has it.

    Attributes:
        model: Which model.
        spec: Its network.
        out_channels: Channels of its logits.
        side: Of its cubic windows, in voxels.
    """

    model: str
    spec: NetworkSpec
    out_channels: int
    side: int


def dints() -> dict[str, Any]:
    """DiNTS' arguments, with an architecture made by rule: the searched one is a file beside the weights.

    Every block keeps each resolution and goes to the next lower or higher one; the cells take each operation in turn.
    """
    blocks, depths, operations = 12, 4, 5
    straight, up, down = (0, 3, 6, 9), (1, 4, 7), (2, 5, 8)  # MONAI's order of the paths between two blocks
    active = [[int(path in (*straight, (down, up)[n % 2][n // 2 % 3])) for path in range(10)] for n in range(blocks)]
    kinds = [[1 + (n + path) % (operations - 1) for path in range(10)] for n in range(blocks)]
    topology = {
        "_target_": "TopologyInstance", "channel_mul": 1, "num_blocks": blocks, "num_depths": depths,
        "use_downsample": True, "arch_code": [active, kinds],
    }  # fmt: skip
    nodes = [[1] * depths] * (blocks + 1)
    return {"dints_space": topology, "in_channels": 1, "num_classes": 8, "use_downsample": True, "node_a": nodes}


def nnunet(name: str, **blocks: Any) -> NetworkSpec:
    """A network of six stages as nnU-Net plans it for windows of 128 x 128 x 128."""
    arguments = {
        "input_channels": 1, "num_classes": 14, "n_stages": 6, "features_per_stage": [32, 64, 128, 256, 320, 320],
        "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3] * 3] * 6, "strides": [[1] * 3, *[[2] * 3] * 5],
        "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True}, **blocks,
    }  # fmt: skip
    return NetworkSpec(_NNUNET + name, arguments)


def public() -> dict[str, Public]:
    """The networks by name."""
    unet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [16, 32, 64, 128, 256],
            "strides": [2] * 4, "num_res_units": 2, "norm": "batch"}  # fmt: skip
    segresnet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 105, "init_filters": 32,
                 "blocks_down": [1, 2, 2, 4], "blocks_up": [1, 1, 1], "dropout_prob": 0.2}  # fmt: skip
    strides: list[Any] = [1, 2, 2, 2, 2, [2, 2, 1]]
    dynunet = {"spatial_dims": 3, "in_channels": 1, "out_channels": 4, "kernel_size": [3] * 6, "strides": strides,
               "upsample_kernel_size": strides[1:], "norm_name": "instance", "deep_supervision": False,
               "res_block": True}  # fmt: skip
    vista = {"classes": _EVERYTHING, "encoder_embed_dim": 48, "in_channels": 1}
    plain = nnunet("PlainConvUNet", n_conv_per_stage=[2] * 6, n_conv_per_stage_decoder=[2] * 5)
    residual = nnunet("ResidualEncoderUNet", n_blocks_per_stage=[1, 3, 4, 6, 6, 6], n_conv_per_stage_decoder=[1] * 5)
    return {
        "UNet": Public("spleen_ct_segmentation", NetworkSpec("UNet", unet), 2, 96),
        "SegResNet": Public("wholeBody_ct_segmentation", NetworkSpec("SegResNet", segresnet), 105, 96),
        "DynUNet": Public("pediatric_abdominal_ct_segmentation", NetworkSpec("DynUNet", dynunet), 4, 96),
        "DiNTS": Public("multi_organ_segmentation", NetworkSpec("DiNTS", dints()), 8, 96),
        "PlainConvUNet": Public("nnU-Net, 3d_fullres, 13 organs", plain, 14, 128),
        "ResidualEncoderUNet": Public("nnU-Net, ResEnc M, 13 organs", residual, 14, 128),
        "VISTA3D": Public("vista3d, all 117 classes", NetworkSpec("vista3d132", vista), len(_EVERYTHING), 128),
    }


def model_of(network: Public, roi: Size3) -> Model:
    """A model with random weights, which are the same each time."""
    torch.manual_seed(0)
    weights = network_from_spec(network.spec).state_dict()
    spec = ModelSpec(
        name=network.model, version="random weights", network=network.spec, in_channels=1,
        out_channels=network.out_channels, preprocessing=(), roi=roi, overlap=0.25, blend="gaussian", batch_size=1,
        activation="softmax", threshold=None, segments=(), intended_use="", demonstration=False,
    )  # fmt: skip
    return Model(spec, weights, "0" * 64)


def millions_of(network: Public) -> float:
    """Weights in 10^6; parts that have two names count once."""
    return round(sum(tensor.numel() for tensor in network_from_spec(network.spec).parameters()) / 1e6, 1)


def gflop_of(network: Public, roi: Size3) -> float | None:
    """Arithmetic of convolutions and products for one window, in 10^9 operations; None where torch cannot count it."""
    try:
        made = network_from_spec(network.spec).eval().to("meta")
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            made(torch.zeros(1, 1, *roi, device="meta"))
    except (RuntimeError, NotImplementedError):
        return None
    return round(float(counter.get_total_flops()) / 1e9, 1)


@dataclass
class Candidate:
    """One engine and precision, and its measurements."""

    engine: Engine
    windows: Tensor
    seconds_to_open: float
    logits: Tensor
    seconds: list[float] = field(default_factory=list)


def difference_of(logits: Tensor) -> Tensor:
    """The logits as engines give them: of two classes only the difference."""
    return logits[:, 1:2] - logits[:, 0:1] if logits.shape[1] == 2 else logits


def timed(engine: Engine, windows: Tensor) -> tuple[Tensor, float]:
    """Logits, and the seconds a window that they took."""
    wait: Callable[[], None] = torch.cuda.synchronize if windows.is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    logits = engine.predict(windows)
    wait()
    return logits, (time.perf_counter() - start) / len(windows)


def opened(backend: str, precision: Any, model: Model, windows: Tensor, device: str) -> Candidate:
    """An engine that has computed its first batch, for which it allocates or compiles."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        request = EngineRequest(backend, device, precision, model.spec.roi, (1, len(windows)), Path(folder))
        prepare_engine(request, model, logits_only=True)
        engine = open_engine(request, model)
    logits, first = timed(engine, windows)
    # A CPU's first call is as good as any, and large networks take a minute for it; a GPU's first call loads kernels.
    seconds = [] if windows.is_cuda else [first]
    return Candidate(engine, windows, time.perf_counter() - start, difference_of(logits)[:1].clone(), seconds)


def measure(candidates: list[Candidate], repeats: int) -> None:
    """Let the engines take turns."""
    for _ in range(repeats):
        for candidate in candidates:
            candidate.seconds.append(timed(candidate.engine, candidate.windows)[1])


def rows_of(name: str, network: Public, given: argparse.Namespace, until: float) -> Iterator[dict[str, Any]]:
    """One row for each engine of a network."""
    side = given.roi or network.side
    roi = (side, side, side)
    shared: dict[str, Any] = {"network": name, "model": network.model, "roi": list(roi)}
    model = model_of(network, roi)
    shared |= {"million_weights": millions_of(network), "gflop_a_window": gflop_of(network, roi)}
    count = given.batch if given.device != "cpu" else 2
    windows = torch.randn(count, 1, *roi, generator=torch.Generator().manual_seed(1)).to(given.device)
    found: dict[tuple[str, str], Candidate | str] = {}
    for backend, precision in _CPU if given.device == "cpu" else _GPU:
        if backend == "compile" and time.perf_counter() > until:
            found[backend, precision] = f"not compiled: {given.seconds:g} s had passed"
            continue
        try:
            taken = windows[:1] if (backend, given.device) == ("eager", "cpu") else windows
            found[backend, precision] = opened(backend, precision, model, taken, given.device)
        except CtflowError as error:
            found[backend, precision] = f"{type(error).__name__}: {error}"
    candidates = [each for each in found.values() if isinstance(each, Candidate)]
    measure(candidates, given.repeats)
    for (backend, precision), each in found.items():
        row = {**shared, "engine": backend, "precision": precision}
        yield row | ({"error": each} if isinstance(each, str) else figures(each, found["eager", "fp32"]))
    for each in candidates:
        each.engine.close()


def figures(candidate: Candidate, reference: Candidate | str) -> dict[str, Any]:
    """What was measured of one engine, and how it compares with strict fp32, if that was measured."""
    best = min(candidate.seconds)
    compared = {}
    if isinstance(reference, Candidate):
        error = (candidate.logits - reference.logits).abs().max() / reference.logits.abs().max()
        compared = {
            "times_eager_fp32": round(min(reference.seconds) / best, 2),
            "relative_error": float(f"{float(error):.2g}"),
        }
    return {
        "windows_at_a_time": len(candidate.windows),
        "ms_a_window": round(1000 * best, 2),
        "ms_of_repeats": [round(1000 * each, 2) for each in candidate.seconds],
        **compared,
        "seconds_to_open": round(candidate.seconds_to_open, 1),
    }


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """What computed, with which versions, and when."""
    versions = {}
    for package in ("torch", "monai", "openvino", "triton", "dynamic-network-architectures"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if Path("/proc/cpuinfo").exists() else [platform.processor()]  # fmt: skip
    return {
        "benchmark": "networks",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(["python", "benchmarks/networks.py", *sys.argv[1:]]),
        "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device),
        "cpu": cpu[0] if cpu else platform.machine(),
        "cpus": usable_cpus(),
        "python": platform.python_version(),
        "versions": versions,
    }


def lines(given: argparse.Namespace, networks: Mapping[str, Public]) -> Iterator[dict[str, Any]]:
    """The machine, then every row."""
    yield machine(given)
    until = time.perf_counter() + given.seconds
    for name in given.networks or networks:
        try:
            yield from rows_of(name, networks[name], given, until)
        except CtflowError as error:  # such as a package that is not installed
            yield {"network": name, "error": f"{type(error).__name__}: {error}"}


def main() -> None:
    """Print a JSON document a line."""
    networks = public()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--networks", type=lambda text: text.split(","), help=", ".join(networks))
    parser.add_argument("--roi", type=int, help="side of every window instead of the model's own: for a quick try")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4, help="windows at a time on a GPU")
    parser.add_argument("--seconds", type=float, default=60, help="after these no further network is compiled")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    unknown = [name for name in given.networks or () if name not in networks]
    if unknown:
        parser.error(f"--networks knows {', '.join(networks)}, not {unknown[0]!r}")
    torch.set_num_threads(usable_cpus())
    stdout, kept = sys.stdout, []
    with contextlib.redirect_stdout(sys.stderr):  # DiNTS prints when it is made
        for line in lines(given, networks):
            kept.append(line)
            stdout.write(json.dumps(line) + "\n")
            stdout.flush()
    if given.out is not None:
        given.out.write_text(json.dumps({**kept[0], "rows": kept[1:]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
