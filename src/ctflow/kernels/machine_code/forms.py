"""What a kernel is compiled from: a form, which is everything that its machine code depends on, and the code itself.

And what for: a target, one for each kind of GPU that machine code is made for.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:  # torch takes seconds to import, which processes that only compile should not cost
    from torch import Tensor

_ALIGNED = 16  # bytes or elements: Triton loads whole vectors where addresses and strides are multiples of it
_TYPES = {
    "torch.float16": "*fp16",
    "torch.bfloat16": "*bf16",
    "torch.float32": "*fp32",
    "torch.float64": "*fp64",
    "torch.int32": "*i32",
}
CONSTANT = "constexpr"
TRITON_MODULES = ("volume_kernels", "token_kernels")  # names of functions differ

Value: TypeAlias = "Tensor | int | float | None"

_KIB = 1024
# Bytes of shared memory that a block may have (CUDA C++ programming guide, technical specifications).
_SHARED = {
    (8, 0): 163 * _KIB,
    (8, 6): 99 * _KIB,
    (8, 9): 99 * _KIB,
    (9, 0): 227 * _KIB,
    (10, 0): 227 * _KIB,
    (12, 0): 99 * _KIB,
}


@dataclass(frozen=True)
class KernelTarget:
    """What machine code is made for.

    Attributes:
        capability: Compute capability; GPUs of the same major and a larger minor number run the code, too.
        portable: Whether kernels use only instructions that all targets have.
    """

    capability: tuple[int, int]
    portable: bool = True

    @property
    def name(self) -> str:
        """For example "compute capability 8.6"."""
        words = f"compute capability {'.'.join(map(str, self.capability))}"
        return f"{words}, portable kernels" if self.portable and self.capability == HOPPER.capability else words

    @property
    def number(self) -> int:
        """The capability as compilers write it: 86."""
        return 10 * self.capability[0] + self.capability[1]

    @property
    def shared(self) -> int:
        """Bytes of shared memory that a block may have."""
        return _SHARED[self.capability]


HOPPER = KernelTarget((9, 0), portable=False)  # with its own matrix instructions
TARGETS = tuple(HOPPER if each == HOPPER.capability else KernelTarget(each) for each in _SHARED)


def kernel_target(capability: tuple[int, int]) -> KernelTarget | None:
    """The target whose code a GPU of some compute capability runs; None if there is none."""
    fitting = [each for each in TARGETS if each.capability[0] == capability[0] and each.capability <= capability]
    return max(fitting, key=lambda each: each.capability, default=None)


def cuda_source(constants: Mapping[str, int], *parts: str, own: str = "") -> str:
    """CUDA C++ without includes: constants, then the text `own`, then files of this package in order."""
    head = "\n".join(f"#define {name} {value}" for name, value in constants.items())
    return "\n".join([head, own, *(files("ctflow.kernels").joinpath(part).read_text("utf-8") for part in parts)])


@dataclass(frozen=True)
class CudaForm:
    """A kernel in CUDA C++.

    Attributes:
        source: The text, without includes.
        name: Of an `extern "C"` kernel in it.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
    """

    source: str
    name: str
    threads: int
    shared: int

    @property
    def key(self) -> str:
        """SHA-256 of the form."""
        return _digest(self)


@dataclass(frozen=True)
class TritonForm:
    """A kernel of `TRITON_MODULES`, for arguments of some types.

    Attributes:
        name: The function.
        parameters: Of each parameter its type ("*fp16", "i32") and whether it is a multiple of 16 (of a pointer:
            its address); or `CONSTANT` and its value.
        warps: Of a block.
        stages: Of loops that load ahead.
    """

    name: str
    parameters: tuple[tuple[str, int], ...]
    warps: int
    stages: int

    @property
    def key(self) -> str:
        """SHA-256 of the form; of the function's text it holds the name alone."""
        return _digest(self)


@dataclass(frozen=True)
class Cubin:
    """Machine code for one target.

    Attributes:
        code: An ELF file.
        name: Of the kernel in it.
        threads: Of a block.
        shared: Bytes of dynamic shared memory of a block.
        nulls: Pointers that it takes after its own arguments, and does not use.
        compiler: What compiled it, for example "triton 3.6.0".
    """

    code: bytes
    name: str
    threads: int
    shared: int
    nulls: int
    compiler: str


def triton_form(name: str, arguments: Sequence[Value], warps: int, stages: int) -> tuple[TritonForm, list[Value]]:
    """The form of a launch, specialised as Triton's own launcher does it, and the arguments that are left to pass.

    Args:
        name: A function of `TRITON_MODULES`.
        arguments: In the order of its parameters, constants included.
        warps: Of a block.
        stages: Of loops that load ahead.

    Raises:
        ValueError: There are more or fewer arguments than parameters.
    """
    parameters: list[tuple[str, int]] = []
    passed: list[Value] = []
    for is_constant, argument in zip(_constants_of(name), arguments, strict=True):
        parameter = _parameter(argument, is_constant=is_constant)
        parameters.append(parameter)
        if parameter[0] != CONSTANT:
            passed.append(argument)
    return TritonForm(name, tuple(parameters), warps, stages), passed


def _parameter(argument: Value, *, is_constant: bool) -> tuple[str, int]:
    if argument is None:
        raise ValueError("a kernel of Triton takes no null pointer")
    if isinstance(argument, float):
        return "fp32", 0
    if not isinstance(argument, int):
        return _TYPES[str(argument.dtype)], int(argument.data_ptr() % _ALIGNED == 0)
    if is_constant or argument == 1:
        return CONSTANT, int(argument)
    return "i32" if argument < 1 << 31 else "i64", int(argument % _ALIGNED == 0)


@cache
def _constants_of(name: str) -> tuple[bool, ...]:
    """Of each parameter whether it is a constant of the compilation; read from the text, so Triton is not imported."""
    for module in TRITON_MODULES:
        tree = ast.parse(files("ctflow.kernels").joinpath(f"{module}.py").read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return tuple(each.annotation is not None for each in node.args.args)
    raise ValueError(f"{' and '.join(TRITON_MODULES)} have no {name}")


def _digest(form: CudaForm | TritonForm) -> str:
    return hashlib.sha256(repr(form).encode()).hexdigest()
