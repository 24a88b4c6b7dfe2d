"""A program for `ctflow.engines.tensorrt.torch_program`: the exported network with built-in TensorRT parts.

NOT RUN BY US, as that module says.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from ctflow.compat.torch_tensorrt import observed_build
from ctflow.core.errors import CtflowError, DeviceOutOfMemory, ExportFailed, first_line
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.compile import network_for_gpu
from ctflow.engines.contract import Precision, not_taken
from ctflow.engines.hardware import switches
from ctflow.engines.tensorrt.torch_program import load_tensorrt, load_torch_tensorrt
from ctflow.export.build_watch import BuildWatch

_UNITS = 100  # of progress, for each part

log = logging.getLogger(__name__)


def program_from_model(
    model: Model,
    roi: Size3,
    *,
    precision: Precision,
    batch: int,
    path: Path,
    device: str,
    progress: Progress = silent,
) -> None:
    """Build a program for one GPU and write it.

    Args:
        model: The model.
        roi: Window size in voxels.
        precision: Number format of the heavy arithmetic.
        batch: How many windows it computes at a time.
        path: The file; its folder exists.
        device: The GPU, as a torch device.
        progress: Receives the stages "export network", "divide network" and "build engine".

    Raises:
        BackendUnavailable: Torch-TensorRT does not load.
        BundleInvalid: The network does not take windows of this size.
        ExportFailed: It cannot build the network; gives its reason.
        DeviceOutOfMemory: The GPU has too little memory to build it.
    """
    runtime = load_torch_tensorrt()
    network, _ = network_for_gpu(model, roi, precision)
    # Next to the file, for the rename; torch wants the suffix .pt2.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.cuda.device(device):
        made = Path(folder) / "made.pt2"
        try:
            network = network.to(device)
            windows = torch.zeros((batch, model.spec.in_channels, *roi), device=device)
            with (
                warnings.catch_warnings(action="ignore"),
                torch.inference_mode(False),
                torch.no_grad(),
                switches(precision),
            ):
                _build(runtime, network, windows, precision, made, progress)
        except OSError:
            raise  # the store names it
        except Exception as error:  # a compiler's passes may raise anything
            raise _failure(error, model, network, roi, device) from error
        made.replace(path)


def _build(
    runtime: Any, network: nn.Module, windows: Tensor, precision: Precision, path: Path, progress: Progress
) -> None:
    """Export, compile and save.

    Since 2.11 TensorRT follows the network's own number formats, so none is requested here (the option
    `use_explicit_typing` of 2.11 and 2.12 is true by default, and 2.13 has no other mode).
    """
    progress("export network", 0, 1)
    exported = torch.export.export(network, (windows,), strict=False)
    progress("export network", 1, 1)
    build = _Build(f"torch-tensorrt {precision}, batch {len(windows)}", progress)
    with observed_build(runtime, build.divided, build.configured), build.watch.running():
        module = runtime.dynamo.compile(
            exported,
            inputs=[windows],
            device=windows.device,
            disable_tf32=precision != "tf32",
            require_full_compilation=False,  # PyTorch computes what TensorRT has no operation for
            # By default all users of a machine share one file in /tmp.
            timing_cache_path=str(path.parent / "timing.cache"),
        )
    build.finish()
    runtime.save(module, str(path), output_format="exported_program", inputs=[windows])


class _Build:
    """What one compilation says and shows.

    Args:
        name: Of the engine, with its precision and batch.
        progress: Receives its stages.
    """

    def __init__(self, name: str, progress: Progress) -> None:
        self._name, self._progress = name, progress
        self._parts: int | None = None
        self._begun = 0
        self.watch = BuildWatch(load_tensorrt(), self._step)
        progress("divide network", 0, 1)

    def divided(self, module: nn.Module) -> None:
        """Say what the build will take, before its first minute."""
        self._progress("divide network", 1, 1)
        parts = [part for name, part in module.named_children() if "_run_on_acc" in name]
        built = sum(map(_operations, parts))
        left = sum(map(_operations, module.modules())) - built
        self._parts = len(parts)
        what = "%s: parts that TensorRT builds: %d, with %d operations; operations left to PyTorch: %d"
        log.warning(what, self._name, self._parts, built, left)
        self._progress("build engine", 0, self._total)

    def configured(self, config: Any) -> None:
        """Watch the build of the next part."""
        self._begun += 1
        config.progress_monitor = self.watch.monitor()

    def finish(self) -> None:
        """All parts are built."""
        if self._parts is None:  # too few operations to divide
            log.warning("%s: TensorRT builds no part of this network; PyTorch computes all of it", self._name)
        self._progress("build engine", self._total, self._total)

    @property
    def _total(self) -> int:
        return _UNITS * max(self._parts or 0, self._begun, 1)

    def _step(self, done: int, total: int) -> None:
        """A step of the part that is being built; only `finish` reports the end."""
        units = _UNITS * (self._begun - 1) + _UNITS * done // total
        self._progress("build engine", min(units, self._total - 1), self._total)


def _operations(module: nn.Module) -> int:
    """How many operations a module's own graph has."""
    nodes = module.graph.nodes if isinstance(module, GraphModule) else ()
    return sum(node.op == "call_function" and node.target is not getitem for node in nodes)


def _failure(error: Exception, model: Model, network: nn.Module, roi: Size3, device: str) -> CtflowError:
    """The named error of a build that failed."""
    if isinstance(error, torch.OutOfMemoryError):
        return DeviceOutOfMemory(f"{device} has too little memory to build the engine")
    try:
        with torch.inference_mode():
            network(torch.zeros((1, model.spec.in_channels, *roi), device=device))
    except (RuntimeError, ValueError, IndexError) as plain:
        return not_taken(roi, plain)
    return ExportFailed(
        f"torch-tensorrt cannot build {model.spec.network.name}: {first_line(error)}; use --engine eager",
        reason="not-buildable",
    )
