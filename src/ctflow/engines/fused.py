"""ctflow's own engine: a channels-last SwinUNETR from its own kernels, as CUDA graphs on a Hopper GPU.

Nothing is built ahead: the process that opens it compiles the kernels (seconds; Triton caches its own on disk) and
computes a first window, so that a kernel that cannot be compiled or launched here is reported before a CT is read. Its
results are compared with strict fp32 like those of every engine (`ctflow.export.parity`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ctflow.core.errors import BackendUnavailable, CtflowError, DeviceOutOfMemory, NetworkNotTaken
from ctflow.core.model import Model
from ctflow.core.package import digest_of_package
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision, check_windows, is_of_gpu
from ctflow.engines.cudagraph import BatchFunction, CapturedFunction
from ctflow.engines.hardware import switches
from ctflow.engines.request import EngineRequest, info_of
from ctflow.networks.build import network_from_model
from ctflow.networks.channels_last import ChannelsLastSwinUNETR, takes
from ctflow.networks.head import fold_two_class_head

FILE: str | None = None
DEVICES = ("cuda",)
CAPABILITY = (9, 0)  # only Hopper has wgmma, which the convolutions use
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def is_available() -> tuple[bool, str]:
    """Whether this machine has a Hopper GPU and the compilers of the kernels."""
    if not torch.cuda.is_available():
        return False, "it needs an NVIDIA GPU of compute capability 9.0 (H100, H200), and a torch that is built for it"
    found = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
    if CAPABILITY not in found:
        words = ", ".join(".".join(map(str, one)) for one in found)
        return False, f"it needs a GPU of compute capability 9.0 (H100, H200); found {words}"
    for package, name in (("triton", "triton"), ("cuda.bindings", "cuda-bindings")):
        if not _is_installed(package):
            return False, f"the package {name} is not installed: pip install {name}"
    return True, ", ".join(f"{name} {found}" for name, found in _versions().items())


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def precisions(device: str) -> tuple[Precision, ...]:
    """The default precision."""
    return ("fp16",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that this machine supports the device and precision.

    Raises:
        BackendUnavailable: The device is not a Hopper GPU, or the precision is TF32.
    """
    if torch.device(device).type not in DEVICES:
        raise BackendUnavailable(
            f"fused computes {precision} on a GPU, not on {device}: choose with --device cuda", reason="wrong-device"
        )
    if precision not in _DTYPES:
        raise BackendUnavailable(
            f"fused computes {', '.join(_DTYPES)}, not {precision}: choose with --precision", reason="wrong-precision"
        )
    found = torch.cuda.get_device_capability(device)
    if found != CAPABILITY:
        words = ".".join(map(str, found))
        raise BackendUnavailable(
            f"fused is for GPUs of compute capability 9.0 (H100, H200); {device} has {words}", reason="wrong-gpu"
        )


class FusedEngine:
    """A `ChannelsLastSwinUNETR` as CUDA graphs; see `ctflow.engines.contract.Engine`.

    The first call with a batch size captures it. One thread at a time may call it.

    Args:
        network: On the device.
        info: Its description.
        kept: Turns the network into what calls run.
    """

    def __init__(
        self,
        network: BatchFunction,
        info: EngineInfo,
        *,
        kept: Callable[[BatchFunction], BatchFunction] = CapturedFunction,
    ) -> None:
        self._network: BatchFunction | None = network
        self._info = info
        self._run: BatchFunction | None = kept(self.launch)

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`.

        Raises:
            BackendUnavailable: The GPU or its driver failed, or a kernel cannot be compiled for this batch.
        """
        if self._run is None:
            raise ValueError("the engine is closed")
        check_windows(windows, self._info)
        try:
            # Buffers that outlive the call must not be inference tensors, even if the caller is in inference mode.
            with torch.inference_mode(False), torch.no_grad():
                return self._run(windows)
        except Exception as error:  # the compilers and loaders of kernels may raise anything
            raise _named(error, self._info.device, f"{len(windows)} windows") from error

    def launch(self, windows: Tensor) -> Tensor:
        """The network's logits, launched kernel by kernel: what `predict` captures."""
        if self._network is None:
            raise ValueError("the engine is closed")
        with switches(self._info.precision):
            return self._network(windows)

    def close(self) -> None:
        """Free the network and the graphs."""
        was_open, self._network, self._run = self._network is not None, None, None
        if was_open and torch.device(self._info.device).type == "cuda":
            # A failed GPU reports its error again here; the caller has already seen it.
            with suppress(RuntimeError):
                torch.cuda.synchronize(self._info.device)


def open_backend(request: EngineRequest, model: Model) -> FusedEngine:
    """Open the engine; see `ctflow.engines.registry.open_engine`.

    Raises:
        BackendUnavailable: It cannot run on this machine or this network.
        DeviceOutOfMemory: The GPU has too little memory.
    """
    device, precision, roi = request.device, request.chosen_precision, request.roi
    check_settings(device, precision)
    network = network_from_model(model)
    if not takes(network, roi):
        name = model.spec.network.name
        raise NetworkNotTaken(f"fused computes SwinUNETR (first version, plain norms), not this {name} at {roi}")
    one, folded = fold_two_class_head(network, model.spec, probe=False)  # a SwinUNETR ends in that convolution
    channels = 1 if folded else model.spec.out_channels
    info = info_of(request, model, channels, _versions())
    engine = None
    try:
        with torch.cuda.device(device), torch.no_grad():
            engine = FusedEngine(_on_gpu(one, roi, precision, device), info)
            engine.launch(torch.zeros((1, model.spec.in_channels, *roi), device=device))
    except Exception as error:  # see `predict`
        if engine is not None:
            engine.close()
        raise _named(error, device, "the network") from error
    return engine


def _named(error: Exception, device: str, what: str) -> CtflowError:
    """The named error for an exception while kernels were compiled, loaded or launched."""
    if isinstance(error, CtflowError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return DeviceOutOfMemory(f"{device} has too little memory for {what}")
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    if is_of_gpu(error):
        return BackendUnavailable(f"{device} failed: {reason}", reason="device-failed")
    return BackendUnavailable(
        f"fused cannot compile or launch its kernels for {what}: {reason}; Triton needs a C compiler, Python's headers "
        "and a folder that it may write (TRITON_CACHE_DIR); use --engine eager",
        reason="compiler-failed",
    )


def _on_gpu(network: nn.Module, roi: Size3, precision: Precision, device: str) -> ChannelsLastSwinUNETR:
    from ctflow.kernels.operations import HopperOperations  # noqa: PLC0415  # needs triton

    return ChannelsLastSwinUNETR(network, roi, HopperOperations(_DTYPES[precision], device))


def _versions() -> dict[str, str]:
    """Versions of the software that computes."""
    found = {"torch": str(torch.__version__)}
    for package in ("triton", "cuda-bindings"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # some builds ship it under another name
            continue
    # Other kernels make another engine.
    return {**found, "kernels": digest_of_package("ctflow.kernels")}
