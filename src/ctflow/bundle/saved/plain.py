"""What torch saved, as plain values: tensors, NumPy's arrays and numbers, words and containers; nothing is executed."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ctflow.bundle.saved.pickles import NUMPY, TensorData, walked
from ctflow.core.errors import BundleInvalid

ADVICE = "save the weights with torch.save(network.state_dict(), 'models/model.pt')"
_LARGEST_PICKLE = 2**28
_OLD_PARTS = 3  # pickles before the content in torch's older format: a number, a version, the machine
_DEEPEST = 3
_KINDS = frozenset({"f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"})
_ZIP = b"PK\x03\x04"
RecordReader = torch._C.PyTorchFileReader
_LOCAL_HEADER = struct.Struct("<26x2H")
# Errors of unpickling and unzipping damaged or hostile files.
LOAD_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    struct.error,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


class _Saved:
    """Takes the place of NumPy's element types, numbers and arrays: NumPy's own code is not called by a pickle.

    Args:
        parts: What NumPy's function would get.
    """

    def __init__(self, *parts: Any) -> None:
        self.parts = parts
        self.state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _SavedType(_Saved):
    def dtype(self) -> np.dtype[Any]:
        """An element type of numbers, by its name and its order of bytes alone."""
        kind, order = self.parts[0], self.state[1]
        if kind not in _KINDS or order not in ("<", ">", "|", "="):
            raise ValueError("no number")
        return np.dtype("|b1" if kind == "b1" else f"{order}{kind}")


class _SavedNumber(_Saved):
    def value(self) -> Any:
        kind, raw = self.parts
        return np.frombuffer(raw, kind.dtype(), 1)[0].item()


class _SavedArray(_Saved):
    def value(self) -> Any:
        _, shape, kind, is_fortran, raw = self.state
        found = np.frombuffer(raw, kind.dtype()).reshape(shape, order="F" if is_fortran else "C")
        return found.astype(found.dtype.newbyteorder("="))


_BY_NAME = {"_reconstruct": _SavedArray, "scalar": _SavedNumber, "dtype": _SavedType}
_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((_BY_NAME[name], path.replace(" ", ".")) for path, name in NUMPY.items()),
    (_Saved, "numpy.ndarray"),
]


def loaded_plainly(stream: BinaryIO, name: str) -> Any:
    """What a file holds; NumPy's numbers and arrays as what `as_arrays` takes.

    Args:
        stream: At its beginning.
        name: The file's name in messages.

    Raises:
        BundleInvalid: It is TorchScript, compressed or damaged.
        LOAD_ERRORS: It holds something else, or more than such a file ever does.
    """
    check_archive(stream, name)
    _check_pickles(stream)
    stream.seek(0)
    with torch.serialization.safe_globals(_STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of protocols that torch does not write: the walk knows every operation
        return torch.load(stream, map_location="cpu", weights_only=True)


def check_archive(stream: BinaryIO, name: str) -> None:
    """Reject TorchScript and compressed data, which may hold terabytes; leaves the stream at its beginning.

    Raises:
        BundleInvalid: It is one of these, or damaged.
    """
    try:
        is_zip = stream.read(len(_ZIP)) == _ZIP
        stream.seek(0)
        if not is_zip:
            return  # torch's older format, or not torch's at all: torch.load decides
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
        stream.seek(0)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise BundleInvalid(f"{name} cannot be read: copy it again", reason="unreadable-file") from None
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise BundleInvalid(
            f"{name} is TorchScript, which would run code of the bundle: {ADVICE}", reason="torchscript"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BundleInvalid(f"{name} is compressed, which torch.save never does: {ADVICE}", reason="weights")


def _check_pickles(stream: BinaryIO) -> None:
    """Walk through a file's pickles, and require that it has the data to which they refer."""
    is_zip = stream.read(len(_ZIP)) == _ZIP
    size = stream.seek(0, 2)
    stream.seek(0)
    storages, held = _of_zip(stream, size) if is_zip else _of_old_format(stream)
    # Parts of a zip may overlap, so that each is no larger than the file, and all together are.
    if sum(held.values()) > size or any(storage.size > held[storage.key] for storage in storages):
        raise pickle.UnpicklingError("refers to more data than it has")  # torch would read what follows it in memory


def _of_zip(stream: BinaryIO, size: int) -> tuple[tuple[TensorData, ...], dict[Any, int]]:
    """The data that a file refers to, and the bytes that it has of each."""
    # torch's own reader, as another one may find another pickle in a crafted zip.
    reader = RecordReader(stream)
    size_of = getattr(reader, "get_record_size", None) or _sizes_by_zipfile(reader, stream)  # torch 2.13 has it
    if size_of("data.pkl") > min(size, _LARGEST_PICKLE):
        raise pickle.UnpicklingError("holds too much besides tensors")
    storages = walked(io.BytesIO(reader.get_record("data.pkl"))).storages
    return storages, {key: size_of(f"data/{key}") for key in {storage.key for storage in storages}}


def _sizes_by_zipfile(reader: Any, stream: BinaryIO) -> Callable[[str], int]:
    """The size of each record by Python's reader, where both readers find the same names at the same places."""
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
    found = {member.filename.partition("/")[2]: member for member in members}
    if len(found) < len(members) or set(found) != set(reader.get_all_records()):
        raise pickle.UnpicklingError("has records that another reader does not find")

    def size_of(name: str) -> int:
        member = found[name]
        stream.seek(member.header_offset)
        header = stream.read(_LOCAL_HEADER.size)
        (*_, name_length, extra_length) = _LOCAL_HEADER.unpack(header)
        if member.header_offset + len(header) + name_length + extra_length != reader.get_record_offset(name):
            raise pickle.UnpicklingError("has a record at two places")
        return member.file_size

    return size_of


def _of_old_format(stream: BinaryIO) -> tuple[tuple[TensorData, ...], dict[Any, int]]:
    """As `_of_zip`; the file lists its data, and torch leaves others as the memory was."""
    for _ in range(_OLD_PARTS):
        walked(stream)
    storages = walked(stream).storages
    listed = {key for key in walked(stream).items if isinstance(key, str)}
    held = {storage.key: storage.size if storage.key in listed else -1 for storage in storages}
    return storages, held


def as_arrays(value: Any, level: int = 0) -> Any:
    """Tensors and saved arrays as NumPy arrays, within a few levels of lists and objects."""
    if level > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, _SavedArray | _SavedNumber):
        return value.value()
    if isinstance(value, Mapping):
        return {key: as_arrays(item, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_arrays(item, level + 1) for item in value]
    return value
