"""Selects the engine: by name, or the fastest that this machine has."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import replace
from typing import Protocol, cast

from ctflow.core.errors import BackendUnavailable, SettingsInvalid, counted
from ctflow.core.model import Model, ModelSpec
from ctflow.core.requirements import version_problem
from ctflow.engines.contract import Engine, Precision, check_chosen_by_name
from ctflow.engines.request import EngineRequest

# Name on the command line -> module; fastest first, which is what "auto" tries.
BACKENDS = {
    "fused": "ctflow.engines.fused",
    "tensorrt": "ctflow.engines.tensorrt.engine",
    "tensorrt-rtx": "ctflow.engines.tensorrt.rtx",
    "torch-tensorrt": "ctflow.engines.tensorrt.torch_program",
    "compile": "ctflow.engines.compile",
    "openvino": "ctflow.engines.openvino",
    "onnxruntime": "ctflow.engines.onnxruntime",
    "eager": "ctflow.engines.eager",
}
_LEAST_GPU_BATCH = 4  # fewer windows leave parts of a large GPU idle in the deep layers
_ONLY_BY_NAME = ("compile",)  # a minute of compilation in each process
# Batches that "auto" times besides the requested one, for engines that are not built for a fixed batch.
_TIMED_BATCHES = {"fused": (8, 16)}


class Backend(Protocol):
    """A module that runs engines of one kind.

    Attributes:
        FILE: Kind of the file that it runs and that `ctflow.export.prepare` makes; None if it runs none.
        DEVICES: Kinds of torch device that it computes on.
    """

    FILE: str | None
    DEVICES: tuple[str, ...]

    def precisions(self, device: str) -> tuple[Precision, ...]:
        """Number formats that "auto" tries on a device; the last is the default."""

    def check_settings(self, device: str, precision: Precision) -> None:
        """Raise BackendUnavailable unless the backend supports this device and precision here."""

    def is_available(self) -> tuple[bool, str]:
        """Whether it is installed, and the reason or version in one sentence."""

    def open_backend(self, request: EngineRequest, model: Model) -> Engine:
        """Open an engine of a request that names a precision; see `open_engine`."""


def backends() -> list[tuple[str, bool, str]]:
    """Every backend's name, whether this machine computes with it, and the reason or version in one sentence."""
    return [(name, *_usability(name)) for name in BACKENDS]


def _usability(name: str) -> tuple[bool, str]:
    available, reason = _availability(name)
    if not available or "cpu" in _load(name).DEVICES:
        return available, reason
    import torch  # noqa: PLC0415  # the backend has loaded it

    if torch.cuda.is_available():
        return True, reason
    # TensorRT-RTX loads and makes plans on any machine.
    return False, f"installed ({reason}), but it needs an NVIDIA GPU, and torch {torch.__version__} finds none here"


def _availability(name: str) -> tuple[bool, str]:
    """Whether a backend is installed, at a version that ctflow knows, and the reason or version in one sentence.

    Raises:
        SettingsInvalid: The name is unknown.
    """
    available, reason = _load(name).is_available()
    # TensorRT's module checks its version itself: it also runs one that the extra does not install.
    problem = version_problem(name) if available and name != "tensorrt" else ""
    return (False, problem) if problem else (available, reason)


def backends_for(device: str) -> list[tuple[str, tuple[Precision, ...]]]:
    """Every backend that computes on such a device, installed or not, and the precisions that `auto` tries with it."""
    kind = device.partition(":")[0]
    modules = [(name, _load(name)) for name in BACKENDS]
    return [(name, module.precisions(device)) for name, module in modules if kind in module.DEVICES]


def open_engine(request: EngineRequest, model: Model, *, without: Collection[str] = ()) -> Engine:
    """Open an engine for a model.

    Args:
        request: Which engine, and for what.
        model: The model.
        without: Backends that "auto" does not take.

    Returns:
        The engine; the caller closes it.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: The backend, device or precision cannot be used here.
        ModelError: The engine cannot be made from the model.
    """
    check_chosen_by_name(request.backend, request.precision)
    reasons = []
    for backend in backend_names(request.backend, request.device):
        if request.backend == "auto" and backend in without:
            continue
        module = _load(backend)
        available, reason = _availability(backend)
        if not available:
            reasons.append(f"{backend}: {reason}")
            continue
        try:
            return module.open_backend(_of_backend(request, backend, module), model)
        except BackendUnavailable as error:
            if request.backend != "auto":
                raise
            # Its file has not been made, or it lacks the device, precision or network.
            reasons.append(f"{backend}: {error}")
    raise BackendUnavailable("; ".join(reasons), reason="no-engine")


def backend_names(name: str, device: str) -> tuple[str, ...]:
    """The backends that a name means on a device, in the order in which they are tried.

    Raises:
        SettingsInvalid: The name is unknown.
    """
    if name != "auto":
        _load(name)
        return (name,)
    # Checked before the packages are loaded, which takes seconds.
    kind = device.partition(":")[0]
    return tuple(entry for entry in BACKENDS if entry not in _ONLY_BY_NAME and kind in _load(entry).DEVICES)


def backend_module(name: str) -> Backend:
    """The module of a backend.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: The package behind it is not installed.
    """
    module = _load(name)
    available, reason = _availability(name)
    if not available:
        raise BackendUnavailable(f"{name}: {reason}", reason="not-installed")
    return module


def backend_version(name: str) -> str:
    """The version of a backend, or why it is not installed, in one sentence.

    Raises:
        SettingsInvalid: The name is unknown.
    """
    return _load(name).is_available()[1]


def with_precision(request: EngineRequest) -> EngineRequest:
    """The request with its backend's own precision where it names none.

    Raises:
        SettingsInvalid: The backend's name is unknown.
        BackendUnavailable: The package behind it is not installed.
    """
    return _of_backend(request, request.backend, backend_module(request.backend))


def _of_backend(request: EngineRequest, name: str, module: Backend) -> EngineRequest:
    return replace(request, backend=name, precision=request.precision or module.precisions(request.device)[-1])


def check_engine(request: EngineRequest) -> EngineRequest:
    """Check that a backend supports a request on this machine.

    Args:
        request: Its backend, device and precision are checked.

    Returns:
        The request with its precision filled in.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: It does not.
    """
    chosen = with_precision(request)
    backend_module(chosen.backend).check_settings(chosen.device, chosen.chosen_precision)
    return chosen


def batch_range_for(spec: ModelSpec, device: str) -> tuple[int, int]:
    """Smallest and largest batch in which a device computes a model's windows.

    Many bundles ask for one window at a time, to fit small GPUs; where memory does not suffice, the batch
    halves while a case runs.
    """
    return 1, max(spec.batch_size, _LEAST_GPU_BATCH) if device.startswith("cuda") else spec.batch_size


def batches_worth_timing(name: str, wanted: int) -> tuple[int, ...]:
    """Largest batches with which an engine is worth timing, ascending; the wanted one is the first.

    Args:
        name: The backend.
        wanted: Largest batch requested.
    """
    return (wanted, *(batch for batch in _TIMED_BATCHES.get(name, ()) if batch > wanted))


def devices_from_setting(device: str | None) -> tuple[str, ...]:
    """The torch devices of a setting ("cuda:0,1"): None is the first GPU, or the CPU where there is none.

    Raises:
        BackendUnavailable: One of them does not exist.
    """
    import torch  # noqa: PLC0415  # seconds to import, which `ctflow engines --help` should not cost

    count = torch.cuda.device_count()
    if device == "cpu" or (device is None and not count):
        return ("cpu",)
    named = "0" if device in {None, "cuda"} else str(device).partition(":")[2]
    numbers = [int(number) for number in named.split(",")]
    if max(numbers) >= count:
        missing = f"device cuda:{max(numbers)} does not exist"
        here = f"this machine has {counted(count, 'GPU')}" if count else "torch finds no GPU on this machine"
        raise BackendUnavailable(
            f"{missing}: {here}; use --device cpu with an engine that computes there (--engine auto)",
            reason="no-such-device",
        )
    return tuple(f"cuda:{number}" for number in numbers)


def device_from_setting(device: str | None) -> str:
    """The first torch device of a setting; see `devices_from_setting`."""
    return devices_from_setting(device)[0]


def _load(name: str) -> Backend:
    if name not in BACKENDS:
        choices = ", ".join(("auto", *BACKENDS))
        raise SettingsInvalid(f"--engine: invalid choice {name!r} (choose from {choices})", reason="invalid-value")
    return cast(Backend, importlib.import_module(BACKENDS[name]))
