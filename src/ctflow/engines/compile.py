"""torch.compile on an NVIDIA GPU, one CUDA graph per batch size: it makes no file and runs any MONAI network.

The first batch of a process waits for the compiler: about a minute (70 s for a SwinUNETR of feature_size 48 on an H200
with torch 2.11; torch's own cache on disk shortens later processes), and again for each other batch size. "auto"
therefore never takes this engine.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ctflow.compat.torch import compiler_at_ease
from ctflow.core.errors import BackendUnavailable, CtflowError, DeviceOutOfMemory, ExportFailed, counted, first_line
from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision, check_supported, check_windows, is_of_gpu, not_taken
from ctflow.engines.cudagraph import BatchFunction, CapturedFunction
from ctflow.engines.hardware import memory_for, switches
from ctflow.engines.request import EngineRequest, info_of
from ctflow.networks.build import network_from_model
from ctflow.networks.half import HALVES, with_half_precision
from ctflow.networks.head import fold_two_class_head
from ctflow.networks.swin import GPU_ATTENTION, rewrite_for_export

FILE: str | None = None
DEVICES = ("cuda",)
# Errors of the machine, not of the network; by name, as torch moves these classes.
_LACKS = ("TritonMissing", "GPUTooOldForTriton", "InvalidCxxCompiler", "CppCompileError")
# Engines and batch sizes share torch's limit on compilations of one function; beyond it torch silently runs eagerly.
_COMPILATIONS = 4096
_COMPILING = threading.Lock()  # torch's compiler keeps much of its state for the whole process


def is_available() -> tuple[bool, str]:
    """Whether this machine has a GPU and the compiler for it."""
    if not torch.cuda.is_available():
        return False, "it needs an NVIDIA GPU, and a torch that is built for it"
    if find_spec("triton") is None:
        return False, "the package triton is not installed: pip install triton"
    return True, ", ".join(f"{name} {found}" for name, found in _versions().items())


def precisions(device: str) -> tuple[Precision, ...]:
    """The default precision."""
    return ("fp16",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that the device is a GPU; every precision is accepted.

    Raises:
        BackendUnavailable: The device is not a GPU.
    """
    check_supported("compile", device, precision, DEVICES)


def network_for_gpu(model: Model, roi: Size3, precision: Precision) -> tuple[nn.Module, int]:
    """A model's network with its exact rewrites and its number format, as input for GPU compilers.

    Args:
        model: The model.
        roi: Window size in voxels.
        precision: Number format of the heavy arithmetic; "tf32" is not a tensor format and gives a network in fp32.

    Returns:
        The network on the CPU, in evaluation mode, with float32 input and output, and its number of output channels.
    """
    network, folded = fold_two_class_head(network_from_model(model), model.spec)
    network = rewrite_for_export(network, roi, GPU_ATTENTION)
    if precision in HALVES:
        network = with_half_precision(network, HALVES[precision])
    return network, 1 if folded else model.spec.out_channels


class CompileEngine:
    """A network compiled by torch.compile; see `ctflow.engines.contract.Engine`.

    The first call with a batch size compiles and captures it. One thread at a time may call it.

    Args:
        network: In evaluation mode, on the device.
        info: Its description.
        backend: torch's name of the compiler.
        kept: Turns the compiled network into what later calls run.
    """

    def __init__(
        self,
        network: nn.Module,
        info: EngineInfo,
        *,
        backend: str | Callable[..., BatchFunction] = "inductor",
        kept: Callable[[BatchFunction], BatchFunction] = CapturedFunction,
    ) -> None:
        self._network: nn.Module | None = network
        self._info = info
        self._compiled: BatchFunction | None = torch.compile(network, backend=backend, dynamic=False)
        self._run: BatchFunction | None = kept(self._compute)
        self._sizes: set[int] = set()  # batch sizes already computed

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`.

        Raises:
            BackendUnavailable: The first batch of a size: this machine lacks what compiling needs.
            BundleInvalid: Likewise: the network does not take windows of this size.
            ExportFailed: Likewise: the network cannot be compiled or captured.
        """
        if self._run is None:
            raise ValueError("the engine is closed")
        check_windows(windows, self._info)
        # Buffers that outlive the call must not be inference tensors, even if the caller is in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            if len(windows) in self._sizes:
                return self._run(windows)
            try:
                with _COMPILING, compiler_at_ease(_COMPILATIONS):
                    logits = self._run(windows)
            except Exception as error:  # a compiler's passes may raise anything
                raise self._failure(error, windows) from error
            if tuple(logits.shape[2:]) != self._info.roi:
                raise not_taken(self._info.roi, f"its logits are {tuple(logits.shape[2:])}")
            self._sizes.add(len(windows))
            return logits

    def _compute(self, windows: Tensor) -> Tensor:
        """The compiled network, launched kernel by kernel."""
        if self._compiled is None:
            raise ValueError("the engine is closed")
        with switches(self._info.precision):
            return self._compiled(windows).float()

    def _failure(self, error: Exception, windows: Tensor) -> CtflowError:
        """The named error of a first batch."""
        info, causes = self._info, list(_causes(error))
        short = DeviceOutOfMemory(f"{info.device} has too little memory for {counted(len(windows), 'window')}")
        if any(isinstance(cause, torch.OutOfMemoryError) for cause in causes):
            return short
        if any(is_of_gpu(cause) for cause in causes):
            return BackendUnavailable(f"{info.device} failed: {first_line(causes[-1])}", reason="device-failed")
        reason = first_line(causes[-1])
        if any(type(cause).__name__ in _LACKS or "C compiler" in str(cause) for cause in causes):
            return BackendUnavailable(
                f"compile needs what this machine lacks: {reason}; use --engine eager", reason="compiler-failed"
            )
        try:
            if self._network is not None:
                self._network(windows[:1])
        except torch.OutOfMemoryError:
            return short
        except (RuntimeError, ValueError, IndexError) as plain:
            return not_taken(info.roi, plain)
        return ExportFailed(f"the network cannot be compiled: {reason}; use --engine eager", reason="not-compilable")

    def close(self) -> None:
        """Free the network and the graphs."""
        if self._network is not None and torch.device(self._info.device).type == "cuda":
            torch.cuda.synchronize(self._info.device)
        self._network = self._compiled = self._run = None


def open_backend(request: EngineRequest, model: Model) -> CompileEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`."""
    device, precision = request.device, request.chosen_precision
    check_settings(device, precision)
    network, channels = network_for_gpu(model, request.roi, precision)
    with memory_for("the network", device):
        network = network.to(device)
    return CompileEngine(network, info_of(request, model, channels, _versions()))


def _versions() -> dict[str, str]:
    """Versions of the software that computes."""
    found = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):  # some builds of torch ship it under another name
        found["triton"] = version("triton")
    return found


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, its cause or context, and so on."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        inner = getattr(seen, "inner_exception", None)  # where torch's compiler keeps the cause
        seen = inner or seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)
