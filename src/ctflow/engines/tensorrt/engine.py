"""TensorRT on an NVIDIA GPU: a plan built for that GPU, run through torch's memory, streams and CUDA graphs.

One module serves TensorRT 10 and 11; `ctflow.engines.tensorrt.rtx` runs the same engine with TensorRT-RTX, which
has the same programming interface.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, EngineMismatch, ResourceError, counted, first_line
from ctflow.core.model import Model
from ctflow.engines.contract import EngineInfo, Precision, check_supported, check_windows
from ctflow.engines.cudagraph import capture, free_cached_memory
from ctflow.engines.hardware import driver_version, gpu_identity, memory_for
from ctflow.engines.onnxfile import GraphStyle, key_of_model, software_versions
from ctflow.engines.request import EngineRequest, info_of
from ctflow.engines.store.store import EngineKey, EngineStore
from ctflow.engines.tensorrt.runtime import is_rtx, load_runtime, messages_of, runtime_state
from ctflow.networks.swin import GPU_ATTENTION

FILE = "plan"
RTX_FILE = "rtx_plan"
DEVICES = ("cuda",)
INPUT, OUTPUT = "windows", "logits"
_NAME = "tensorrt"
# Part of every plan's key: raise it when `ctflow.export.tensorrt_plan` builds otherwise from the same graph.
_RECIPE = 1
_RTX_CAPABILITIES = ((8, 0), (8, 6), (8, 9))  # and all from 10 on; on another card the plan itself reports the error
log = logging.getLogger(__name__)


def is_available() -> tuple[bool, str]:
    """Whether the package is installed and loads."""
    return runtime_state(_NAME)


def precisions(device: str) -> tuple[Precision, ...]:
    """The precisions that `auto` tries; the last is the default."""
    return ("fp16",)


def check_settings(device: str, precision: Precision) -> None:
    """Check that TensorRT supports this device and precision here.

    Raises:
        BackendUnavailable: It does not.
    """
    check_gpu(_NAME, device, precision)


def check_gpu(name: str, device: str, precision: Precision) -> None:
    """Check that this machine supports the device and precision.

    Raises:
        BackendUnavailable: The device is not a GPU, or this version has no such precision.
    """
    check_supported(name, device, precision, DEVICES)
    if is_rtx(load_runtime(name)) and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        if major < 10 and (major, minor) not in _RTX_CAPABILITIES:
            raise BackendUnavailable(
                f"{name} cannot run on {device}, which has compute capability {major}.{minor}", reason="wrong-gpu"
            )


def graph_style(precision: Precision) -> GraphStyle:
    """The ONNX style for TensorRT's parser, which computes in the number formats that the graph states."""
    return GraphStyle("fp32" if precision == "tf32" else precision, attention=GPU_ATTENTION)


def plan_key(request: EngineRequest, model: Model) -> EngineKey:
    """Key of a plan.

    Args:
        request: What the plan is for; TensorRT-RTX's plans are for any card that it runs on.
        model: The model.
    """
    name = request.backend
    runtime = load_runtime(name)
    return key_of_model(
        model,
        kind=RTX_FILE if is_rtx(runtime) else FILE,
        version=f"{name} {runtime.__version__}, recipe {_RECIPE}, {software_versions()}",
        roi=request.roi,
        # One fixed batch: kernels need no other shapes, the build is shorter, and only a volume's last batch is padded.
        batch=request.batch_range[1],
        precision=request.chosen_precision,
        device="any" if is_rtx(runtime) else gpu_identity(request.device),
    )


def find_plan(name: str, key: EngineKey, cache_dir: Path | None) -> Path:
    """The stored plan of a key.

    Raises:
        BackendUnavailable: It has not been built; names a plan for another GPU, driver or version.
        EngineMismatch: It is damaged.
    """
    store = None if cache_dir is None else EngineStore(cache_dir)
    path = None if store is None else store.find(key)
    if path is None:
        near = None if store is None else store.nearest(key)
        why = f" ({near.text})" if near is not None else ""
        raise BackendUnavailable(
            f"{name} has no plan of this model yet{why}: run `ctflow export --engine {name}`", reason="not-exported"
        )
    return path


def open_backend(request: EngineRequest, model: Model) -> TensorRtEngine:
    """Open a stored plan; see `ctflow.engines.registry.open_engine`."""
    check_gpu(request.backend, request.device, request.chosen_precision)
    path = find_plan(request.backend, plan_key(request, model), request.cache)
    return engine_from_plan(request, model, path.read_bytes())


def engine_from_plan(request: EngineRequest, model: Model, data: bytes) -> TensorRtEngine:
    """An engine from a plan's bytes; errors as for `ctflow.engines.registry.open_engine`."""
    name = request.backend
    check_gpu(name, request.device, request.chosen_precision)
    runtime = load_runtime(name)
    versions = {"torch": str(torch.__version__), name: str(runtime.__version__), "driver": driver_version()}
    free_cached_memory()  # TensorRT takes its own
    with torch.cuda.device(request.device):
        plan = LoadedPlan(runtime, data, name)
        info = info_of(request, model, plan.out_channels, versions, fewest_computed=plan.batches[0])
        return TensorRtEngine(plan, info)


class LoadedPlan:
    """A deserialised plan, for the current GPU.

    Args:
        runtime: The Python module of TensorRT.
        data: The plan's bytes.
        name: Backend name, for messages.

    Raises:
        BackendUnavailable: This GPU or driver cannot run it; gives the runtime's reason.
        DeviceOutOfMemory: The GPU has too little memory for it.
        EngineMismatch: It is not a plan with ctflow's tensors.
    """

    def __init__(self, runtime: Any, data: bytes, name: str) -> None:
        self.messages, logger = messages_of(runtime)
        self._module, self._name = runtime, name
        try:
            self._runtime = runtime.Runtime(logger)
        except TypeError as error:  # raised by the bindings where CUDA does not start
            raise self.failure("does not start") from error
        self.engine = self._runtime.deserialize_cuda_engine(data)
        if self.engine is None:
            raise self.failure("cannot run this plan here")
        tensors = {self.engine.get_tensor_name(n) for n in range(self.engine.num_io_tensors)}
        if tensors != {INPUT, OUTPUT}:
            raise EngineMismatch(
                f"the stored plan has the tensors {sorted(tensors)}, not {INPUT} and {OUTPUT}", reason="other-tensors"
            )

    @property
    def scratch_bytes(self) -> int:
        """Device memory that a run of any batch needs in addition to input and output."""
        name = "device_memory_size_v2" if hasattr(self.engine, "device_memory_size_v2") else "device_memory_size"
        return int(getattr(self.engine, name))

    def context(self, scratch: Tensor) -> Any:
        """A new execution context that works in the given device memory.

        Args:
            scratch: (`scratch_bytes`,) uint8; contexts that never run at the same time may share it.

        Raises:
            DeviceOutOfMemory: The GPU has too little memory left for it.
            BackendUnavailable: This GPU cannot run it.
        """
        engine = self.engine
        if hasattr(engine, "create_execution_context_without_device_memory"):  # before 11
            context = engine.create_execution_context_without_device_memory()
        else:
            managed = self._module.ExecutionContextAllocationStrategy.USER_MANAGED
            context = engine.create_execution_context(managed)
        if context is None:
            raise self.failure("cannot run this plan here")
        context.set_device_memory(scratch.data_ptr(), scratch.numel())
        return context

    def failure(self, what: str) -> ResourceError:
        """The error with TensorRT's own message."""
        text = f"{self._name} {what}: {self.messages.last}"
        return (
            DeviceOutOfMemory(text)
            if self.messages.tell_of_memory
            else BackendUnavailable(text, reason="device-failed")
        )

    @property
    def in_channels(self) -> int:
        """Channels of the input."""
        return int(self.engine.get_tensor_shape(INPUT)[1])

    @property
    def out_channels(self) -> int:
        """Channels of the logits."""
        return int(self.engine.get_tensor_shape(OUTPUT)[1])

    @property
    def batches(self) -> tuple[int, int]:
        """Smallest and largest batch of the plan's profile."""
        low, _, high = self.engine.get_tensor_profile_shape(INPUT, 0)
        return int(low[0]), int(high[0])


class TensorRtEngine:
    """A plan on one GPU; see `ctflow.engines.contract.Engine`.

    Input, output and scratch memory are allocated once; the first use of a batch size captures it as a CUDA graph, so
    that a call launches one graph and allocates nothing. One thread at a time may call it.

    Args:
        plan: The plan, on the current GPU.
        info: Its description; its batch range may exceed the plan's: a larger batch is split, a smaller one padded.

    Raises:
        DeviceOutOfMemory: The GPU has too little memory for the buffers.
    """

    def __init__(self, plan: LoadedPlan, info: EngineInfo) -> None:
        self._plan: LoadedPlan | None = plan
        self._info = info
        self._low, self._high = plan.batches
        # Space for the padding of the last part of a split batch.
        most = -(-info.batch_range[1] // self._high) * self._high
        with memory_for(f"{self._high} windows", info.device):
            # zeros, because the padding of a batch below the plan's smallest is also computed.
            self._windows = torch.zeros((self._high, plan.in_channels, *info.roi), device=info.device)
            self._logits = torch.empty((most, plan.out_channels, *info.roi), device=info.device)
            self._scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device=info.device)
        # A context belongs to its graph: setting another shape would change the graph's run.
        self._graphs: dict[tuple[int, int], tuple[torch.cuda.CUDAGraph, Any]] = {}

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""
        return self._info

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows; see `ctflow.engines.contract.Engine.predict`."""
        if self._plan is None:
            raise ValueError("the engine is closed")
        check_windows(windows, self._info)
        if windows.shape[1] != self._windows.shape[1]:
            raise ValueError(f"this engine takes {self._windows.shape[1]} channels, not {windows.shape[1]}")
        with torch.cuda.device(self._info.device), torch.inference_mode():
            for first in range(0, len(windows), self._high):
                self._run(windows[first : first + self._high], first)
        return self._logits[: len(windows)]

    def _run(self, windows: Tensor, first: int) -> None:
        """At most as many windows as the plan takes -> their logits, from index `first` of the output on."""
        count = len(windows)
        self._windows[:count].copy_(windows, non_blocking=True)
        batch = max(count, self._low)
        if (batch, first) not in self._graphs:
            self._graphs[batch, first] = self._captured(batch, first)
        self._graphs[batch, first][0].replay()

    def _captured(self, batch: int, first: int) -> tuple[torch.cuda.CUDAGraph, Any]:
        """A CUDA graph of one batch size that writes from index `first` of the output on, and its context."""
        plan = self._plan
        if plan is None:
            raise ValueError("the engine is closed")
        context = plan.context(self._scratch)
        if not context.set_input_shape(INPUT, (batch, *self._windows.shape[1:])):
            raise plan.failure(f"refuses a batch of {batch}")
        context.set_tensor_address(INPUT, self._windows.data_ptr())
        context.set_tensor_address(OUTPUT, self._logits[first:].data_ptr())
        plan.messages.errors.clear()
        try:
            with memory_for(counted(batch, "window"), self._info.device):
                graph, _ = capture(lambda: self._enqueue(context))
        except RuntimeError as error:
            raise plan.failure(f"failed on {self._info.device} ({first_line(error)})") from error
        return graph, context

    def _enqueue(self, context: Any) -> None:
        stream = torch.cuda.current_stream(self._info.device)
        if not context.execute_async_v3(stream.cuda_stream) and self._plan is not None:
            raise self._plan.failure(f"failed on {self._info.device}")

    def close(self) -> None:
        """Free the plan, the graphs and the buffers."""
        if self._plan is None:
            return
        with torch.cuda.device(self._info.device):
            torch.cuda.synchronize()
            self._graphs.clear()
            self._plan = None
        del self._windows, self._logits, self._scratch
