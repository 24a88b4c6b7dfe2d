"""ctflow's own engine: a network with channels last from its own kernels, as CUDA graphs.

Its file holds the compiled kernels, which any machine with the compilers can make; without it the process that opens
the engine compiles them, which takes seconds. It computes a first window then, so that a kernel that cannot be compiled
or launched here is reported before a CT is read. Its results are compared with strict fp32 like those of every engine
(`ctflow.export.parity`).
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import product

import torch
from torch import Tensor, nn

from ctflow.core.errors import (
    BackendUnavailable,
    CtflowError,
    DeviceOutOfMemory,
    EngineMismatch,
    NetworkNotTaken,
    OutputError,
    counted,
    first_line,
)
from ctflow.core.model import Model
from ctflow.core.package import digest_of_package
from ctflow.core.processes import usable_cpus
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision, check_supported, check_windows, is_of_gpu
from ctflow.engines.cudagraph import BatchFunction, CapturedFunction
from ctflow.engines.hardware import switches
from ctflow.engines.onnxfile import key_of_model
from ctflow.engines.request import EngineRequest, info_of
from ctflow.engines.store.calibration import KIND, Calibration, read_calibration
from ctflow.engines.store.store import INSTALLED, EngineKey, EngineStore
from ctflow.kernels.convolution_fp8 import HopperFp8Operations, is_in_eight_bits
from ctflow.kernels.machine_code.compiler import compile_forms
from ctflow.kernels.machine_code.cubins import read_cubins
from ctflow.kernels.machine_code.forms import HOPPER, Cubin, KernelTarget, kernel_target
from ctflow.kernels.machine_code.launch import GpuKernels, KernelList, Kernels
from ctflow.kernels.operations import HopperOperations
from ctflow.networks.build import network_from_model
from ctflow.networks.channels_last.choice import KINDS, TAKEN, channels_last_network, problem_of_network
from ctflow.networks.channels_last.unet import is_nnunet_module
from ctflow.networks.eight_bits import RecordingOperations
from ctflow.networks.head import fold_two_class_head

FILE = "cubins"
DEVICES = ("cuda",)
CAPABILITIES = "8.x, 9.0, 10.x or 12.x"  # of `ctflow.kernels.machine_code.forms.TARGETS`
_BATCHES = (1, 16)  # for which kernels are compiled ahead; 16 is the largest that `auto` times
# Of an H100 or H200, an H100 for PCIe, an H20: they shape sums of Hopper's convolution, and so kernels.
_MULTIPROCESSORS = (132, 114, 78)
# Packages that machine code depends on, and which forms of it a network needs.
_KERNELS = ("ctflow.kernels", "ctflow.kernels.machine_code", "ctflow.networks", "ctflow.networks.channels_last")
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.float16}  # of volumes
PRECISIONS = tuple(_DTYPES)
_CALIBRATION = 2  # version of how activations are measured

log = logging.getLogger(__name__)
_ONLY_PORTABLE = threading.Event()


def is_available() -> tuple[bool, str]:
    """Whether this machine has the driver's bindings and, if it has GPUs, one that kernels are made for."""
    if not _is_installed("cuda.bindings"):
        return False, "the package cuda-bindings is not installed: pip install cuda-bindings"
    found = [torch.cuda.get_device_capability(number) for number in range(torch.cuda.device_count())]
    if found and not any(map(kernel_target, found)):
        words = ", ".join(".".join(map(str, one)) for one in found)
        return False, f"it needs a GPU of compute capability {CAPABILITIES}; found {words}"
    names = [f"{name} {found}" for name, found in _versions(()).items()]
    names = names if _is_installed("triton") else [*names, "no triton: stored kernels only"]
    return True, f"for {KINDS}: {', '.join(names)}"


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
        BackendUnavailable: No kernels are made for the device, or the precision is TF32.
    """
    check_supported("fused", device, precision, DEVICES, PRECISIONS)
    found = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None
    words = "none: torch finds no GPU" if found is None else ".".join(map(str, found))
    if precision == "fp8" and (found is None or target_for(device).portable):
        raise BackendUnavailable(
            f"fused in fp8 is for compute capability 9.0 (H100, H200); {device} has {words}: use --precision fp16",
            reason="wrong-gpu",
        )
    if found is None or kernel_target(found) is None:
        raise BackendUnavailable(
            f"fused is for GPUs of compute capability {CAPABILITIES}; {device} has {words}", reason="wrong-gpu"
        )


@contextmanager
def portable_kernels() -> Iterator[None]:
    """Engines that are made or opened meanwhile have the kernels of other GPUs, which a Hopper GPU runs, too.

    For tests and benchmarks: this is how they are proven where there is no other GPU.
    """
    _ONLY_PORTABLE.set()
    try:
        yield
    finally:
        _ONLY_PORTABLE.clear()


def target_for(device: str) -> KernelTarget:
    """What kernels are made for: the device, or an H200 where there is no GPU."""
    found = kernel_target(torch.cuda.get_device_capability(device)) if torch.cuda.is_available() else HOPPER
    target = found or HOPPER  # the caller checks devices
    return replace(target, portable=target.portable or _ONLY_PORTABLE.is_set())


def cubins_key(request: EngineRequest, model: Model) -> EngineKey:
    """Key of a model's compiled kernels, which depend neither on its weights nor on the request's batches."""
    key = key_of_model(
        model,
        kind=FILE,
        version=f"kernels {digest_of_package(*_KERNELS)}",
        roi=request.roi,
        batch=1,
        precision=request.chosen_precision,
        device=target_for(request.device).name,
    )
    return replace(key, weights_digest="any weights", batch_range=_BATCHES)


def calibration_key(request: EngineRequest, model: Model) -> EngineKey:
    """Key of the calibration that fp8 needs: of a model's weights, windows and preparation, on any machine."""
    prepared = hashlib.sha256(repr(model.spec.preprocessing).encode()).hexdigest()[:12]
    version = f"calibration {_CALIBRATION}, preparation {prepared}"
    return key_of_model(model, kind=KIND, version=version, roi=request.roi, batch=1, precision="fp8", device="any")


def eight_bit_network(request: EngineRequest, model: Model) -> nn.Module:
    """The network of a request for fp8.

    Raises:
        NetworkNotTaken: It computes other networks, or none of this one's convolutions in e4m3.
    """
    return _network(replace(request, precision="fp8"), model)[0]


def compile_cubins(request: EngineRequest, model: Model) -> dict[str, Cubin]:
    """Compile every kernel that a request needs, on any machine: `ctflow.export.prepare` keeps them.

    Raises:
        BackendUnavailable: A compiler is not installed, or refuses a kernel.
        NetworkNotTaken: It computes other networks.
    """
    network, _ = _network(request, model)
    low, high = _BATCHES
    listed = KernelList(target_for(request.device))
    with torch.no_grad():  # on torch's device without memory
        dry = channels_last_network(network, request.roi, _operations(request, "meta", listed, None))
        for listed.multiprocessors, batch in product(_MULTIPROCESSORS, range(low, high + 1)):
            dry(torch.empty((batch, model.spec.in_channels, *request.roi), device="meta"))
    return compile_forms(listed.forms.values(), listed.target, usable_cpus())


def _cubins(request: EngineRequest, model: Model) -> dict[str, Cubin]:
    """The compiled kernels: the stored file's, else compiled now."""
    try:
        path = EngineStore(request.cache or INSTALLED).find(cubins_key(request, model))
        if path is not None:
            return read_cubins(path)
    except (EngineMismatch, OutputError, OSError) as error:
        log.warning("stored kernels are not used, so they are compiled now: %s", error)
    return compile_cubins(request, model)


def _operations(
    request: EngineRequest, device: str, kernels: Kernels, calibration: Calibration | None
) -> HopperOperations:
    """The operations of a request's precision."""
    precision = request.chosen_precision
    if precision != "fp8":
        return HopperOperations(_DTYPES[precision], device, kernels)
    return HopperFp8Operations(request.roi, device, kernels, None if calibration is None else calibration.exponents)


def _calibration(request: EngineRequest, model: Model, network: nn.Module) -> Calibration | None:
    """The stored calibration of a request for fp8; None for others.

    Raises:
        BackendUnavailable: It has not been made.
        EngineMismatch: It is damaged or belongs to something else.
    """
    if request.chosen_precision != "fp8":
        return None
    path = EngineStore(request.cache or INSTALLED).find(calibration_key(request, model))
    if path is None:
        raise BackendUnavailable(
            "fused has no calibration of this model for fp8, which it keeps in a cache: give a folder with --cache, or "
            "run `ctflow export --engine fused --precision fp8`",
            reason="not-exported",
        )
    return read_calibration(path, _eight_bit_channels(network, request.roi))


def _eight_bit_channels(network: nn.Module, roi: Size3) -> list[tuple[int, ...]]:
    """Of each convolution that fp8 computes in e4m3 the channels of its shares."""
    listed = RecordingOperations(torch.float32, "meta", is_in_eight_bits(roi))
    channels_last_network(network, roi, listed)
    return listed.channels


class FusedEngine:
    """A network of `ctflow.networks.channels_last` as CUDA graphs; see `ctflow.engines.contract.Engine`.

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
            raise _named(error, self._info.device, counted(len(windows), "window")) from error

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
    network, channels = _network(request, model)
    calibration = _calibration(request, model, network)
    engine = None
    try:
        with torch.cuda.device(device), torch.no_grad():
            cubins = _cubins(request, model)
            kernels = GpuKernels(device, cubins, target_for(device))
            operations = _operations(request, device, kernels, calibration)
            info = info_of(request, model, channels, _versions(cubin.compiler for cubin in cubins.values()))
            engine = FusedEngine(channels_last_network(network, roi, operations), info)
            engine.launch(torch.zeros((1, model.spec.in_channels, *roi), device=device))
    except Exception as error:  # see `predict`
        if engine is not None:
            engine.close()
        raise _named(error, device, "the network") from error
    return engine


def _network(request: EngineRequest, model: Model) -> tuple[nn.Module, int]:
    """The network and the channels of its logits.

    Raises:
        NetworkNotTaken: It computes other networks.
    """
    network = network_from_model(model)
    members = model.spec.network.members
    problem = f"it is an ensemble of {members}" if members > 1 else problem_of_network(network, request.roi)
    if problem is not None:
        name = model.spec.network.name.rpartition(".")[2]
        raise NetworkNotTaken(f"fused computes {TAKEN}, not this {name} at {request.roi}: {problem}")
    if request.chosen_precision == "fp8":
        _check_eight_bits(network, request, model)
    one, folded = fold_two_class_head(network, model.spec, probe=False)  # these networks end in that convolution
    return one, 1 if folded else model.spec.out_channels


def _check_eight_bits(network: nn.Module, request: EngineRequest, model: Model) -> None:
    """Reject a network of which fp8 computes nothing, or whose masks in fp8 nobody has compared."""
    if is_nnunet_module(network) or not _eight_bit_channels(network, request.roi):
        name = model.spec.network.name.rpartition(".")[2]
        raise NetworkNotTaken(
            f"fused in fp8 is for SwinUNETR of feature_size 48, not this {name} at {request.roi}: use --precision fp16"
        )


def _named(error: Exception, device: str, what: str) -> CtflowError:
    """The named error for an exception while kernels were compiled, loaded or launched."""
    if isinstance(error, CtflowError):
        return error
    if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
        return DeviceOutOfMemory(f"{device} has too little memory for {what}")
    reason = first_line(error)
    if is_of_gpu(error):
        return BackendUnavailable(f"{device} failed: {reason}", reason="device-failed")
    return BackendUnavailable(
        f"fused cannot compile or launch its kernels for {what}: {reason}; use --engine eager",
        reason="compiler-failed",
    )


def _versions(compilers: Iterable[str]) -> dict[str, str]:
    """Versions of the software that computes; `compilers` made the kernels ("triton 3.6.0")."""
    found = {"torch": str(torch.__version__)}
    with suppress(PackageNotFoundError):
        found["cuda-bindings"] = version("cuda-bindings")
    made = {name: number for name, _, number in (text.partition(" ") for text in sorted(set(compilers)))}
    # Other kernels make another engine.
    return {**found, **made, "kernels": digest_of_package(*_KERNELS)}
