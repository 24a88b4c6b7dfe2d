"""Forms of kernels -> machine code for a target; needs neither a GPU nor a C compiler.

CUDA C++ is compiled by NVRTC, which torch's CUDA build brings; kernels of Triton by Triton and the assembler in it.
"""

from __future__ import annotations

import logging
import multiprocessing
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from tempfile import TemporaryDirectory
from typing import Any

from ctflow.compat.python import bare_start
from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory
from ctflow.core.processes import begin_child
from ctflow.kernels.machine_code.forms import CONSTANT, HOPPER, Cubin, CudaForm, KernelTarget, TritonForm

log = logging.getLogger(__name__)

_LEAST_SHARE = 4  # kernels for which another process, which imports Triton, is worth its start
_MOST_PROCESSES = 8  # of 150 MB each
_MOST_SHOWN = 500  # characters of a compiler's message


def compile_form(form: CudaForm | TritonForm, target: KernelTarget) -> Cubin:
    """Machine code of a form for a target.

    Raises:
        BackendUnavailable: Its compiler is not installed, or refuses it.
    """
    return _compiled_cuda(form, target) if isinstance(form, CudaForm) else _compiled_triton(form, target)


def compile_forms(forms: Iterable[CudaForm | TritonForm], target: KernelTarget, processes: int) -> dict[str, Cubin]:
    """Machine code of many forms by their keys, compiled in several processes: a kernel takes 0.1 to 1 s.

    Raises:
        BackendUnavailable: See `compile_form`.
    """
    wanted = list({form.key: form for form in forms}.values())
    workers = min(processes, len(wanted) // _LEAST_SHARE, _MOST_PROCESSES)
    if workers < 2 or multiprocessing.current_process().daemon:  # a daemonic process may not have children
        return {form.key: compile_form(form, target) for form in wanted}
    try:
        return _compiled_in_processes(wanted, target, workers)
    except (BrokenExecutor, OSError) as error:  # no process can be started, or one was ended for lack of memory
        log.warning("kernels are compiled in one process: %s", type(error).__name__)
        return {form.key: compile_form(form, target) for form in wanted}


def _compiled_in_processes(
    wanted: Sequence[CudaForm | TritonForm], target: KernelTarget, workers: int
) -> dict[str, Cubin]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=begin_child) as pool:
        with bare_start():
            made = [pool.submit(compile_form, form, target) for form in wanted]
        try:
            return {form.key: each.result() for form, each in zip(wanted, made, strict=True)}
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _compiled_cuda(form: CudaForm, target: KernelTarget) -> Cubin:
    try:
        from cuda.bindings import nvrtc  # noqa: PLC0415  # only where kernels are compiled
    except ImportError as error:
        raise _missing("cuda-bindings") from error
    try:
        major, minor = checked(nvrtc.nvrtcVersion(), "the CUDA compiler")
        program = checked(nvrtc.nvrtcCreateProgram(form.source.encode(), b"kernel.cu", 0, [], []), "the CUDA compiler")
    except RuntimeError as error:  # cuda-bindings finds no library
        raise _missing("nvidia-cuda-nvrtc") from error
    try:
        own = "a" if target.capability == HOPPER.capability else ""  # Hopper's own instructions
        options = [f"--gpu-architecture=sm_{target.number}{own}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            log = bytearray(checked(nvrtc.nvrtcGetProgramLogSize(program), "the CUDA compiler"))
            checked(nvrtc.nvrtcGetProgramLog(program, log), "the CUDA compiler")
            raise _refused("the CUDA compiler", form.name, log.decode(errors="replace"))
        code = bytearray(checked(nvrtc.nvrtcGetCUBINSize(program), "the CUDA compiler"))
        checked(nvrtc.nvrtcGetCUBIN(program, code), "the CUDA compiler")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return Cubin(bytes(code), form.name, form.threads, form.shared, 0, f"nvrtc {major}.{minor}")


def _compiled_triton(form: TritonForm, target: KernelTarget) -> Cubin:
    try:
        from triton import compile as triton_compile  # noqa: PLC0415  # as above
        from triton import knobs  # noqa: PLC0415
        from triton.backends.compiler import GPUTarget  # noqa: PLC0415
        from triton.compiler import ASTSource  # noqa: PLC0415

        from ctflow.kernels import token_kernels, volume_kernels  # noqa: PLC0415
    except ImportError as error:
        raise _missing("triton") from error
    function = getattr(volume_kernels, form.name, None) or getattr(token_kernels, form.name)
    types, constants, multiples = {}, {}, {}
    for place, (name, (kind, value)) in enumerate(zip(function.arg_names, form.parameters, strict=True)):
        types[name] = kind
        if kind == CONSTANT:
            constants[place,] = value
        elif value:
            multiples[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, constants, multiples)
    options = {"num_warps": form.warps, "num_stages": form.stages, "enable_fp_fusion": True}
    gpu = GPUTarget("cuda", target.number, 32)
    try:
        try:
            made = triton_compile(source, target=gpu, options=options)
        except OSError:  # its cache cannot be written
            with TemporaryDirectory() as folder, knobs.cache.scope():
                knobs.cache.dir = folder
                made = triton_compile(source, target=gpu, options=options)
    except Exception as error:  # a compiler may raise anything
        raise _refused("Triton", form.name, f"{type(error).__name__}: {error}") from error
    taken = len(types) - len(constants)
    return Cubin(
        made.asm["cubin"], made.metadata.name, 32 * form.warps, made.metadata.shared, _nulls(made, taken),
        f"triton {_version('triton')}",
    )  # fmt: skip


def _nulls(made: Any, taken: int) -> int:
    """How many pointers to scratch memory a kernel takes after its `taken` arguments; none of ours uses them."""
    entry = re.search(r"\.entry[^)]*\)", made.asm["ptx"])
    count = -1 if entry is None else entry[0].count(".param ") - taken
    scratch = [getattr(made.metadata, f"{kind}_scratch_size", 0) for kind in ("global", "profile")]
    if count < 0 or any(scratch):
        raise _refused("Triton", made.metadata.name, "this version passes arguments in another way")
    return count


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # some builds of torch ship it under another name
        return str(sys.modules[package].__version__)


def _missing(package: str) -> BackendUnavailable:
    return BackendUnavailable(
        f"a kernel has to be compiled, and the package {package} is not installed: pip install {package}, or make the "
        "file of kernels for this network, window and precision where it is (`ctflow export --engine fused`)",
        reason="not-installed",
    )


def _refused(compiler: str, kernel: str, log: str) -> BackendUnavailable:
    text = f"{compiler} refuses the kernel {kernel}: {log[:_MOST_SHOWN]}"
    return BackendUnavailable(text, reason="compiler-failed")


def checked(answer: tuple[Any, ...], what: str) -> Any:
    """What a call of cuda-bindings gave, without its status.

    Raises:
        BackendUnavailable: The status is an error.
        DeviceOutOfMemory: It is that of too little memory.
    """
    status, *rest = answer
    if int(status):
        if status.name.endswith("OUT_OF_MEMORY"):
            raise DeviceOutOfMemory(f"{what} failed: {status.name}")
        raise BackendUnavailable(f"{what} failed: {status.name}", reason="device-failed")
    return rest[0] if len(rest) == 1 else tuple(rest) or None
