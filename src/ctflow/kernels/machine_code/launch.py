"""Launches kernels through the driver, so that no launcher has to be compiled; or lists what would be launched."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ctflow.core.errors import BackendUnavailable
from ctflow.kernels.machine_code.compiler import checked, compile_form
from ctflow.kernels.machine_code.forms import (
    HOPPER,
    Cubin,
    CudaForm,
    KernelTarget,
    TritonForm,
    Value,
    kernel_target,
    triton_form,
)

log = logging.getLogger(__name__)

_WARPS, _STAGES = 4, 3
_LOCK = threading.Lock()
_LOADED: dict[tuple[int, str, str], _Function] = {}


class Kernels(Protocol):
    """Launches kernels.

    Attributes:
        multiprocessors: Of the GPU.
        target: What kernels are made for.
    """

    multiprocessors: int
    target: KernelTarget

    def triton(
        self, name: str, grid: Sequence[int], *arguments: Value, warps: int = _WARPS, stages: int = _STAGES
    ) -> None:
        """Launch a function of `forms.TRITON_MODULES`, with its arguments in order, constants included."""

    def cuda(self, form: CudaForm, blocks: int, *arguments: Value) -> None:
        """Launch a kernel in CUDA C++; None is a null pointer, numbers are 32-bit integers."""


@dataclass(frozen=True)
class _Function:
    """A loaded kernel: the driver's handle, and what it was loaded from."""

    handle: Any
    cubin: Cubin


class GpuKernels:
    """Launches kernels on torch's current stream; those that are not stored are compiled when they are first needed.

    Args:
        device: torch device.
        stored: Machine code by the keys of forms, as `ctflow.kernels.machine_code.cubins` reads it.
        target: What kernels are made for, instead of the device's own.

    Raises:
        ValueError: No target is for the device.
    """

    def __init__(
        self, device: str, stored: Mapping[str, Cubin] | None = None, target: KernelTarget | None = None
    ) -> None:
        self._index = torch.device(device).index or 0
        self._stored = stored or {}
        chosen = target or kernel_target(torch.cuda.get_device_capability(self._index))
        if chosen is None:
            raise ValueError(f"no kernels are made for {device}")
        self.target: KernelTarget = chosen
        self.multiprocessors: int = torch.cuda.get_device_properties(self._index).multi_processor_count

    def triton(
        self, name: str, grid: Sequence[int], *arguments: Value, warps: int = _WARPS, stages: int = _STAGES
    ) -> None:
        """See `Kernels.triton`.

        Raises:
            BackendUnavailable: The kernel cannot be compiled, loaded or launched.
        """
        form, passed = triton_form(name, arguments, warps, stages)
        self._launch(form, grid, passed)

    def cuda(self, form: CudaForm, blocks: int, *arguments: Value) -> None:
        """See `Kernels.cuda`.

        Raises:
            BackendUnavailable: The kernel cannot be compiled, loaded or launched.
        """
        self._launch(form, (blocks,), arguments)

    def _launch(self, form: CudaForm | TritonForm, grid: Sequence[int], arguments: Sequence[Value]) -> None:
        from cuda.bindings import driver  # noqa: PLC0415  # only where there is a GPU

        function = self._function(form)
        cubin = function.cubin
        values = [*map(_value, arguments), *(0,) * cubin.nulls]
        kinds = [*map(_kind, arguments), *(ctypes.c_void_p,) * cubin.nulls]
        stream = torch.cuda.current_stream(self._index).cuda_stream
        sizes = (*grid, *(1,) * (3 - len(grid)), cubin.threads, 1, 1, cubin.shared)
        packed = (tuple(values), tuple(kinds))
        checked(driver.cuLaunchKernel(function.handle, *sizes, stream, packed, 0), f"the launch of {cubin.name}")

    def _function(self, form: CudaForm | TritonForm) -> _Function:
        key = form.key
        with _LOCK:
            cubin = self._stored.get(key)
            known = (self._index, key, "" if cubin is None else cubin.compiler)
            if known not in _LOADED:
                with torch.cuda.device(self._index):
                    _LOADED[known] = _loaded_or_compiled(form, self.target, cubin)
            return _LOADED[known]


class KernelList:
    """Launches nothing and lists the forms: a network that runs on the device "meta" names what it needs.

    Args:
        target: What kernels are made for.
    """

    def __init__(self, target: KernelTarget = HOPPER) -> None:
        self.target = target
        self.multiprocessors = 132  # how many parts a sum has; the caller may ask for another GPU's
        self.forms: dict[str, CudaForm | TritonForm] = {}  # by key

    def triton(
        self, name: str, grid: Sequence[int], *arguments: Value, warps: int = _WARPS, stages: int = _STAGES
    ) -> None:
        """See `Kernels.triton`."""
        form, _ = triton_form(name, arguments, warps, stages)
        self.forms[form.key] = form

    def cuda(self, form: CudaForm, blocks: int, *arguments: Value) -> None:
        """See `Kernels.cuda`."""
        self.forms[form.key] = form


def _loaded_or_compiled(form: CudaForm | TritonForm, target: KernelTarget, stored: Cubin | None) -> _Function:
    if stored is not None:
        try:
            return _loaded(stored)
        except BackendUnavailable as error:  # compiled for a newer driver, say
            log.warning("a stored kernel is compiled anew: %s", error)
    return _loaded(compile_form(form, target))


def _loaded(cubin: Cubin) -> _Function:
    from cuda.bindings import driver  # noqa: PLC0415  # only where there is a GPU

    torch.empty(1, device="cuda")  # makes torch's context the current one of this thread
    module = checked(driver.cuModuleLoadData(cubin.code), f"loading {cubin.name}")
    function = checked(driver.cuModuleGetFunction(module, cubin.name.encode()), f"loading {cubin.name}")
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(function, most, cubin.shared), f"shared memory of {cubin.name}")
    return _Function(function, cubin)


def _value(argument: Value) -> int | float:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return argument or 0


def _kind(argument: Value) -> Any:
    if isinstance(argument, float):
        return ctypes.c_float
    if isinstance(argument, int):
        return ctypes.c_int if argument < 1 << 31 else ctypes.c_int64
    return ctypes.c_void_p
