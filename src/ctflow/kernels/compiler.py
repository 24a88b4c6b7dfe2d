"""CUDA C++ compiled at run time for the GPU at hand (NVRTC), and launched."""

from __future__ import annotations

import ctypes
import threading
from dataclasses import dataclass
from typing import Any

import torch

from ctflow.core.errors import BackendUnavailable

_LOCK = threading.Lock()
_LOADED: dict[tuple[int, str, str, int], CudaKernel] = {}


@dataclass(frozen=True, eq=False)
class CudaKernel:
    """A function on one GPU.

    Attributes:
        function: The driver's handle.
        shared: Bytes of dynamic shared memory of a block.
    """

    function: Any
    shared: int

    def launch(self, blocks: int, threads: int, arguments: tuple[torch.Tensor | int | None, ...]) -> None:
        """Launch on torch's current stream: tensors go as pointers, None as a null pointer, numbers as 32-bit ints."""
        from cuda.bindings import driver  # noqa: PLC0415  # only where there is a GPU

        values = tuple(_value(argument) for argument in arguments)
        kinds = tuple(ctypes.c_int if isinstance(argument, int) else ctypes.c_void_p for argument in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        sizes = (blocks, 1, 1, threads, 1, 1, self.shared)
        _checked(driver.cuLaunchKernel(self.function, *sizes, stream, (values, kinds), 0), "launch of a kernel")


def load_kernel(source: str, name: str, *, shared: int, device: str) -> CudaKernel:
    """Compile a kernel for compute capability 9.0 with its own instructions, once a process and device.

    Args:
        source: CUDA C++, without includes.
        name: Of an `extern "C"` kernel in it.
        shared: Bytes of dynamic shared memory of a block.
        device: torch device.

    Returns:
        The kernel.

    Raises:
        BackendUnavailable: The compiler or the driver refuses it; the message is theirs.
    """
    index = torch.device(device).index or 0
    with _LOCK:
        key = (index, source, name, shared)
        if key not in _LOADED:
            with torch.cuda.device(index):
                _LOADED[key] = _loaded(source, name, shared)
        return _LOADED[key]


def _loaded(source: str, name: str, shared: int) -> CudaKernel:
    from cuda.bindings import driver  # noqa: PLC0415  # only where there is a GPU

    torch.empty(1, device="cuda")  # makes torch's context the current one of this thread
    module = _checked(driver.cuModuleLoadData(compile_cubin(source)), "loading a kernel")
    function = _checked(driver.cuModuleGetFunction(module, name.encode()), "loading a kernel")
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    _checked(driver.cuFuncSetAttribute(function, most, shared), "shared memory of a kernel")
    return CudaKernel(function, shared)


def compile_cubin(source: str, architecture: str = "sm_90a") -> bytes:
    """Machine code of CUDA C++.

    Raises:
        BackendUnavailable: The compiler refuses it.
    """
    from cuda.bindings import nvrtc  # noqa: PLC0415  # as above

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kernel.cu", 0, [], []), "the CUDA compiler")
    try:
        options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = bytearray(_checked(nvrtc.nvrtcGetProgramLogSize(program), "the CUDA compiler"))
            _checked(nvrtc.nvrtcGetProgramLog(program, log), "the CUDA compiler")
            raise BackendUnavailable(
                f"the CUDA compiler refuses a kernel: {log.decode(errors='replace')[:500]}", reason="compiler-failed"
            )
        code = bytearray(_checked(nvrtc.nvrtcGetCUBINSize(program), "the CUDA compiler"))
        _checked(nvrtc.nvrtcGetCUBIN(program, code), "the CUDA compiler")
        return bytes(code)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _value(argument: torch.Tensor | int | None) -> int:
    if isinstance(argument, torch.Tensor):
        return argument.data_ptr()
    return argument or 0


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    """What a call of the driver gave, without its status."""
    status, *rest = answer
    if int(status):
        raise BackendUnavailable(f"{what} failed: {status.name}", reason="device-failed")
    return rest[0] if rest else None
