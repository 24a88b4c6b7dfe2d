"""Plain PyTorch: needs no build, runs everywhere, and is the reference for every other engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, counted, first_line
from ctflow.core.model import Model
from ctflow.engines.contract import (
    PRECISIONS,
    EngineInfo,
    Precision,
    check_supported,
    check_windows,
    is_of_gpu,
    not_taken,
)
from ctflow.engines.hardware import memory_for, switches
from ctflow.engines.request import EngineRequest, info_of
from ctflow.networks.build import network_from_model
from ctflow.networks.half import HALVES

_ON_CPU = ("fp32", "bf16")
FILE: str | None = None
DEVICES = ("cpu", "cuda")  # kinds of torch device


def is_available() -> tuple[bool, str]:
    """Always: torch is a dependency."""
    return True, f"torch {torch.__version__}"


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that "auto" tries; the last is the default."""
    return ("fp32",) if torch.device(device).type == "cpu" else ("fp16", "fp32")


def check_settings(device: str, precision: Precision) -> None:
    """Check that PyTorch supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    on_cpu = torch.device(device).type == "cpu"
    check_supported(
        "eager on the CPU" if on_cpu else "eager", device, precision, DEVICES, _ON_CPU if on_cpu else PRECISIONS
    )


class EagerEngine:
    """A network run by PyTorch; see `ctflow.engines.contract.Engine`.

    Args:
        network: In evaluation mode, on the device.
        info: Its description.
    """

    def __init__(self, network: nn.Module, info: EngineInfo) -> None:
        self._network: nn.Module | None = network
        self._info = info

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def run(self, function: Callable[[nn.Module], Tensor]) -> Tensor:
        """What a function makes of the network itself, in this engine's arithmetic."""
        if self._network is None:
            raise ValueError("the engine is closed")
        with torch.inference_mode(), _arithmetic(self._info.precision, self._info.device):
            return function(self._network)

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`."""
        info = self._info
        if self._network is None:
            raise ValueError("the engine is closed")
        check_windows(windows, info)
        what = counted(len(windows), "window")
        try:
            with memory_for(what, info.device), torch.inference_mode(), _arithmetic(info.precision, info.device):
                logits: Tensor = self._network(windows)
                return logits.float()
        except (RuntimeError, ValueError, IndexError) as error:
            if "allocate memory" in str(error):  # torch's CPU allocator has no error class
                raise DeviceOutOfMemory(f"{info.device} has too little memory for {what}") from error
            if is_of_gpu(error):
                raise BackendUnavailable(
                    f"{info.device} failed: {first_line(error)}", reason="device-failed"
                ) from error
            # The windows were checked above, so the network cannot take this size.
            raise not_taken(info.roi, error) from error

    def close(self) -> None:
        """Drop the network."""
        self._network = None


@contextmanager
def _arithmetic(precision: Precision, device: str) -> Iterator[None]:
    """The number format for the calls inside, and the same result each time."""
    with switches(precision):
        if precision in HALVES:
            # Autocast keeps norms and softmax in fp32, where half precision would overflow.
            with torch.autocast(torch.device(device).type, dtype=HALVES[precision]):
                yield
        else:
            yield


def open_backend(request: EngineRequest, model: Model) -> EagerEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`."""
    device, precision = request.device, request.chosen_precision
    check_settings(device, precision)
    with memory_for("the network", device):
        network = network_from_model(model).to(device)
    channels = model.spec.out_channels  # the plain reference: nothing is folded
    return EagerEngine(network, info_of(request, model, channels, {"torch": str(torch.__version__)}))
