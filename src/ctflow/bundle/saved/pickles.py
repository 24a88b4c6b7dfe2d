"""A walk over a pickle that computes no value: what it would build, call and load, within bounds, or an error.

`weights_only` of torch keeps a pickle from calling foreign code. It does not keep it from crashing the process with
a tuple of a million levels as a key, from asking for a terabyte, or from reading beyond the file's data.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_STEPS = 4_000_000  # nnU-Net's log of 4,000 epochs and 24 classes takes 1.4 million
MOST_ITEMS = 4_000_000  # of a value with all that it holds, as often as it holds it
DEEPEST = 50
_LARGEST_KEY = 2**31  # Python's hashes of larger whole numbers can be made to collide

# What torch.save writes besides plain Python, by the names that Python 2 and 3 give them; the first ones are called.
NUMPY = {
    **{
        f"numpy.{package}.multiarray {name}": name
        for package in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    },
    "numpy dtype": "dtype",
}
_ENCODE, _SETS = "_codecs encode", ("builtins set", "__builtin__ set")
_CALLED = frozenset(
    {
        "collections OrderedDict",
        "torch Size",
        "torch device",
        "torch.serialization _get_layout",
        _ENCODE,
        *_SETS,
        *NUMPY,
    }
    | {
        f"torch._utils _rebuild_{what}"
        for what in (
            *("tensor", "tensor_v2", "tensor_v3", "parameter", "parameter_with_state"),
            *("sparse_tensor", "meta_tensor_no_storage"),
        )
    }
)
_KINDS = {"collections OrderedDict": "object", **dict.fromkeys(NUMPY, "numpy")}
_STORAGES = {  # bytes of an element
    "torch.storage UntypedStorage": 1,
    **dict.fromkeys((f"torch {kind}Storage" for kind in ("Byte", "Char", "Bool")), 1),
    **dict.fromkeys((f"torch {kind}Storage" for kind in ("Short", "Half", "BFloat16")), 2),
    **dict.fromkeys((f"torch {kind}Storage" for kind in ("Int", "Float")), 4),
    **dict.fromkeys((f"torch {kind}Storage" for kind in ("Long", "Double", "ComplexFloat")), 8),
    "torch ComplexDoubleStorage": 16,
}
_NAMED = frozenset(
    {"numpy ndarray", "torch Tensor", "torch.nn.parameter Parameter", *_STORAGES}
    | {f"torch {kind}" for kind in ("float16", "float32", "float64", "bfloat16", "complex64", "complex128", "bool")}
    | {f"torch {sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)


@dataclass(slots=True, eq=False)
class _Value:
    """A value that the pickle would build.

    Attributes:
        kind: "plain", "tuple", "list", "object", "set", "name" of a class or function, "made" by calling one ("numpy"
            by one of NumPy's).
        size: Values in it, itself included.
        depth: Levels below it.
        content: A plain value; the values of a tuple or list; a name.
        is_held: Whether another one holds it, which then would grow with it.
    """

    kind: str = "plain"
    size: int = 1
    depth: int = 0
    content: Any = None
    is_held: bool = False


@dataclass(frozen=True)
class TensorData:
    """The data of tensors that a pickle refers to: their name in the file, and their size."""

    key: Any
    size: int


@dataclass(frozen=True)
class Built:
    """What a pickle would build.

    Attributes:
        storages: Those that it refers to.
        items: The plain values of the list that it builds, if it builds one.
    """

    storages: tuple[TensorData, ...]
    items: tuple[Any, ...]


def walked(stream: BinaryIO) -> Built:
    """Walk over a pickle.

    Args:
        stream: The pickle begins at its position; afterwards the position is behind its end.

    Raises:
        UnpicklingError: It does what torch.save never does, or too much.
    """
    machine = _Machine()
    try:
        found = machine.run(stream)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise pickle.UnpicklingError(f"damaged: {error}") from None
    items = tuple(value.content for value in found.content) if found.kind == "list" else ()
    return Built(tuple(machine.storages), items)


class _Machine:
    """The stack and the memory of an unpickler, with what each value would be instead of the values."""

    def __init__(self) -> None:
        self.storages: list[TensorData] = []
        self._memo: dict[int, _Value] = {}
        self._stack: list[_Value] = []
        self._marked: list[list[_Value]] = []

    def run(self, stream: BinaryIO) -> _Value:
        for step, (operation, given, _) in enumerate(pickletools.genops(stream)):
            if step > MOST_STEPS:
                raise pickle.UnpicklingError(f"takes more than {MOST_STEPS} steps")
            name = operation.name
            if name in _PLAIN:
                self._stack.append(_Value(content=_PLAIN[name] if given is None else given))
            elif name in _STEPS:
                _STEPS[name](self, given)
            elif name not in ("PROTO", "STOP"):
                raise pickle.UnpicklingError(f"has the operation {name}")
        return self._stack.pop()

    def push(self, kind: str, values: list[_Value], content: Any = None) -> None:
        made = _Value(kind, content=content)
        self._stack.append(made)
        self._grow(made, values)

    def _grow(self, holder: _Value, values: list[_Value]) -> None:
        if holder.is_held and values:
            raise pickle.UnpicklingError("grows in another value, or in itself")
        for value in values:
            value.is_held = True
            holder.size += value.size
            holder.depth = max(holder.depth, value.depth + 1)
        if holder.size > MOST_ITEMS or holder.depth > DEEPEST:
            raise pickle.UnpicklingError("holds too many values, or too deeply")

    # ---------------------------------------------------------------------------------------------------- the steps

    def mark(self, _: Any) -> None:
        self._marked.append(self._stack)
        self._stack = []

    def _since_mark(self) -> list[_Value]:
        found, self._stack = self._stack, self._marked.pop()
        return found

    def put(self, number: int) -> None:
        self._memo[number] = self._stack[-1]

    def get(self, number: int) -> None:
        self._stack.append(self._memo[number])

    def named(self, name: str) -> None:
        if name not in _CALLED and name not in _NAMED:
            raise pickle.UnpicklingError(f"names {name[:80]}")
        self.push("name", [], name)

    def tuple(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop() for _ in range(count)][::-1]
        self.push("tuple", values, values)

    def append(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop()]
        holder = self._of_kind("list")
        holder.content.extend(values)
        self._grow(holder, values)

    def set_items(self, count: int | None) -> None:
        values = self._since_mark() if count is None else [self._stack.pop() for _ in range(2)][::-1]
        if len(values) % 2:
            raise pickle.UnpicklingError("has a key without a value")
        for key in values[::2]:
            _check_key(key)
        self._grow(self._of_kind("object"), values)

    def _of_kind(self, kind: str) -> _Value:
        holder = self._stack[-1]
        if holder.kind != kind:
            raise pickle.UnpicklingError(f"adds to what is no {kind}")
        return holder

    def call(self, _: Any) -> None:
        given, called = self._stack.pop(), self._stack.pop()
        if given.kind != "tuple" or called.kind != "name" or called.content not in _CALLED:
            raise pickle.UnpicklingError("calls what torch.save never calls")
        if called.content == _ENCODE and given.content[-1].content not in ("latin1", "latin-1"):
            raise pickle.UnpicklingError("converts a text")
        if called.content in _SETS:
            for key in (key for keys in given.content for key in keys.content):
                _check_key(key)
        kind = _KINDS.get(called.content, "made")
        if kind == "object" and given.content:
            raise pickle.UnpicklingError("makes a dictionary of a list")
        self.push(kind, [given])

    def build(self, _: Any) -> None:
        """Attributes of an object: `_metadata` of a state dict; or the content of NumPy's values."""
        state = self._stack.pop()
        holder = self._stack[-1]
        if (holder.kind, state.kind) not in (("object", "object"), ("numpy", "tuple")):
            raise pickle.UnpicklingError("sets attributes")
        self._grow(holder, [state])

    def storage(self, _: Any) -> None:
        """("storage", type, key, device, count), and in torch's older format a view of another one, or None."""
        given = self._stack.pop()
        parts = [part.content for part in given.content] if given.kind == "tuple" else []
        if len(parts) not in (5, 6) or any(part.kind not in ("plain", "name") for part in given.content):
            raise pickle.UnpicklingError("refers to data as torch.save never does")
        what, element, key, _device, count, *view = parts
        if what not in ("storage", b"storage") or element not in _STORAGES or view not in ([], [None]):
            raise pickle.UnpicklingError("refers to what is no data")
        if type(count) is not int or count < 0:
            raise pickle.UnpicklingError("has data of no size")
        _check_key(given.content[2])
        self.storages.append(TensorData(key, count * _STORAGES[element]))
        self.push("made", [])


def _check_key(key: _Value) -> None:
    value = key.content
    if key.kind != "plain" or not (
        isinstance(value, str | bytes | None) or (isinstance(value, int) and abs(value) < _LARGEST_KEY)
    ):
        raise pickle.UnpicklingError("has a key that is neither a text nor a number of plausible size")


# Python's pickles of protocol 2 as torch reads them: it knows no other operations.
_PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "NONE")),
    "NEWFALSE": False,
    "NEWTRUE": True,
}
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": _Machine.named,
    "EMPTY_TUPLE": lambda machine, _: machine.tuple(0),
    "TUPLE1": lambda machine, _: machine.tuple(1),
    "TUPLE2": lambda machine, _: machine.tuple(2),
    "TUPLE3": lambda machine, _: machine.tuple(3),
    "TUPLE": lambda machine, _: machine.tuple(None),
    "EMPTY_LIST": lambda machine, _: machine.push("list", [], []),
    "EMPTY_DICT": lambda machine, _: machine.push("object", []),
    "EMPTY_SET": lambda machine, _: machine.push("set", []),
    "APPEND": lambda machine, _: machine.append(1),
    "APPENDS": lambda machine, _: machine.append(None),
    "SETITEM": lambda machine, _: machine.set_items(2),
    "SETITEMS": lambda machine, _: machine.set_items(None),
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.storage,
}
