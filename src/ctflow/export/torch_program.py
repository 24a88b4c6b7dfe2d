"""A program for `ctflow.engines.tensorrt.torch_program`: the exported network with built-in TensorRT parts.

NOT RUN BY US, as that module says.
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctflow.core.errors import CtflowError, DeviceOutOfMemory, ExportFailed, first_line
from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.compile import network_for_gpu
from ctflow.engines.contract import Precision, not_taken
from ctflow.engines.hardware import switches
from ctflow.engines.tensorrt.torch_program import load_torch_tensorrt


def program_from_model(model: Model, roi: Size3, *, precision: Precision, batch: int, path: Path, device: str) -> None:
    """Build a program for one GPU and write it.

    Args:
        model: The model.
        roi: Window size in voxels.
        precision: Number format of the heavy arithmetic.
        batch: How many windows it computes at a time.
        path: The file; its folder exists.
        device: The GPU, as a torch device.

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
                _build(runtime, network, windows, precision, device, made)
        except OSError:
            raise  # the store names it
        except Exception as error:  # a compiler's passes may raise anything
            raise _failure(error, model, network, roi, device) from error
        made.replace(path)


def _build(runtime: Any, network: nn.Module, windows: Tensor, precision: Precision, device: str, path: Path) -> None:
    """Export, compile and save.

    Since 2.11 TensorRT follows the network's own number formats, so none is requested here (the option
    `use_explicit_typing` of 2.11 and 2.12 is true by default, and 2.13 has no other mode).
    """
    exported = torch.export.export(network, (windows,), strict=False)
    module = runtime.dynamo.compile(
        exported,
        inputs=[windows],
        device=torch.device(device),
        disable_tf32=precision != "tf32",
        require_full_compilation=False,  # PyTorch computes what TensorRT has no operation for
        # By default all users of a machine share one file in /tmp.
        timing_cache_path=str(path.parent / "timing.cache"),
    )
    runtime.save(module, str(path), output_format="exported_program", inputs=[windows])


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
