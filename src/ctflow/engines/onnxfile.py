"""The ONNX file of a model: its style for each reader, and the file and the loop that the CPU engines share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, counted
from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision, check_windows
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineKey, EngineStore
from ctflow.networks.head import is_two_class
from ctflow.networks.swin import CPU_ATTENTION, REWRITE_VERSION, AttentionStyle

# The CPU engines take one window after another: on a CPU a larger batch is no faster (0.71 s per window for 1, 2 and 4;
# OpenVINO 2026.4, 2 cores), needs more memory, and a graph with one fixed batch is exported in a third of the time.
CPU_BATCH = 1


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


def key_of_model(
    model: Model, *, kind: str, version: str, roi: Size3, batch: int, precision: Precision, device: str
) -> EngineKey:
    """Key of a file with a model's rewritten network, for one batch size; the arguments as for `EngineKey`."""
    spec = model.spec
    return EngineKey(
        kind=kind,
        version=version,
        rewrite=REWRITE_VERSION,
        weights_digest=model.weights_digest,
        network=spec.network.name,
        arguments=spec.network.arguments,
        head="difference" if is_two_class(spec) else "all channels",
        roi=roi,
        batch_range=(batch, batch),
        precision=precision,
        device=device,
    )


def onnx_key(model: Model, roi: Size3) -> EngineKey:
    """Key of a model's ONNX file for the CPU engines.

    Args:
        model: The model.
        roi: Window size in voxels.
    """
    versions = software_versions()
    return key_of_model(model, kind="onnx", version=versions, roi=roi, batch=CPU_BATCH, precision="fp32", device="any")


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
    backend, key = request.backend, onnx_key(model, request.roi)
    path = None if request.cache is None else EngineStore(request.cache).find(key)
    if path is None:
        raise BackendUnavailable(
            f"{backend} has no file of this model yet: run `ctflow export --engine {backend}`", reason="not-exported"
        )
    return path


class OnnxEngine(ABC):
    """What the engines of an ONNX file of batch 1 share; see `ctflow.engines.contract.Engine`.

    Args:
        runners: Each computes one window; all of them at the same time.
        info: The engine's description.
        errors: The runners' errors, which also tell of too little memory.
    """

    def __init__(self, runners: list[Any], info: EngineInfo, errors: tuple[type[Exception], ...]) -> None:
        self._runners, self._info = runners, info
        self._errors: tuple[type[Exception], ...] = (MemoryError, *errors)
        # Made at the first call and kept: the contract lets the next call overwrite the result.
        self._logits: Tensor | None = None

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`."""
        info, count, together = self._info, len(windows), len(self._runners)
        if not self._runners:
            raise ValueError("the engine is closed")
        check_windows(windows, info)
        try:
            if self._logits is None or len(self._logits) < count:
                self._logits = torch.empty((count, info.out_channels, *info.roi))
            given, result = windows.detach().contiguous(), self._logits[:count]
            for first in range(0, count, together):
                self._run(given[first : first + together], result[first : first + together])
        except self._errors as error:
            if isinstance(error, MemoryError) or "alloc" in str(error):
                raise DeviceOutOfMemory(
                    f"{info.device} has too little memory for {counted(count, 'window')}"
                ) from error
            raise
        return result

    @abstractmethod
    def _run(self, windows: Tensor, logits: Tensor) -> None:
        """As many windows as there are runners or fewer, read from and written into torch's own memory."""

    def close(self) -> None:
        """Drop the graph."""
        self._runners, self._logits = [], None
