"""The ONNX file of a model: its style for each reader, and the file that the CPU engines share."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ctflow.core.errors import BackendUnavailable
from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.contract import Precision
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineKey, EngineStore
from ctflow.networks.head import is_two_class
from ctflow.networks.swin import CPU_ATTENTION, REWRITE_VERSION, AttentionStyle

# The CPU engines take one window after another: on a CPU a larger batch is no faster (0.71 s per window for 1, 2 and 4;
# OpenVINO 2026.4, 2 cores), needs more memory, and a graph with one fixed batch is exported in a third of the time.
CPU_BATCH = (1, 1)


@dataclass(frozen=True)
class GraphStyle:
    """How a network is written as ONNX for the engine that reads it.

    Attributes:
        precision: Number format of weights and products; in half precision, norms, softmax and a transformer's sums
            along its tokens stay in fp32.
        attention: How a transformer's windows are computed.
    """

    precision: Precision
    attention: AttentionStyle


OPSET = 20  # version of the operators
CPU_GRAPH = GraphStyle("fp32", attention=CPU_ATTENTION)


def onnx_key(model: Model, roi: Size3, batch_range: tuple[int, int]) -> EngineKey:
    """Key of a model's ONNX file.

    Args:
        model: The model.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch that the graph takes.
    """
    spec = model.spec
    return EngineKey(
        kind="onnx",
        version=software_versions(),
        rewrite=REWRITE_VERSION,
        weights_digest=model.weights_digest,
        network=spec.network.name,
        arguments=spec.network.arguments,
        head="difference" if is_two_class(spec) else "all channels",
        roi=roi,
        batch_range=batch_range,
        precision="fp32",
        device="any",
    )


def software_versions() -> str:
    """Everything that shapes the graph: the network's code, the exporter and its writer."""
    found = [f"torch {torch.__version__}", f"opset {OPSET}"]
    for package in ("monai", "onnx", "onnxscript"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def find_onnx(request: EngineRequest, model: Model) -> Path:
    """The stored ONNX file that a CPU engine runs.

    Args:
        request: The engine; its window size selects the file.
        model: The model.

    Raises:
        BackendUnavailable: It has not been made.
        EngineMismatch: It is damaged or belongs to something else.
    """
    backend, key = request.backend, onnx_key(model, request.roi, CPU_BATCH)
    path = None if request.cache is None else EngineStore(request.cache).find(key)
    if path is None:
        raise BackendUnavailable(
            f"{backend} has no file of this model yet: run `ctflow export --engine {backend}`", reason="not-exported"
        )
    return path
