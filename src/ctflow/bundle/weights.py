"""A checkpoint as people save them -> a state dict and its digest, without executing code in a pickle."""

from __future__ import annotations

import codecs
import hashlib
import pickle
import reprlib
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ctflow.bundle.expressions.values import NotUnderstood
from ctflow.bundle.locate import WEIGHTS
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import OwnCode

# What training frameworks call the weights in a checkpoint, the likeliest first; averaged ones if there are no others.
_NESTED = ("state_dict", "model", "network", "model_state_dict", "network_weights", "net", "generator")
_AVERAGED = ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_params")
_WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and AveragedModel, and of torch.compile
_OF_LIGHTNING = ("model.", "network.", "net.", "_model.")  # the attribute that holds the network
_DEEPEST = 3
_DTYPES = frozenset(
    {torch.float32, torch.float16, torch.bfloat16, torch.float64}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
_ADVICE = "save the weights with torch.save(network.state_dict(), 'models/model.pt')"
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


def read_weights(
    folder: Path, name: str = WEIGHTS, key: str | None = None
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read a checkpoint with `weights_only`.

    Args:
        folder: The bundle.
        name: The checkpoint's path inside it.
        key: What the bundle's loader calls the network in the checkpoint.

    Returns:
        The state dict, on the CPU, with the names of the network itself; and notes on what else the file holds.

    Raises:
        BundleInvalid: The file is absent, is TorchScript or a pickled module, or holds weights that are not finite.
    """
    path = folder / name
    if not path.is_file():
        raise BundleInvalid(f"{name} is missing: {_ADVICE}", reason="missing-file")
    try:
        with path.open("rb") as stream:
            check_archive(stream, name)
    except OSError:
        raise BundleInvalid(f"{name} cannot be read: copy it again", reason="unreadable-file") from None
    try:
        loaded = loaded_plainly(path)
    except LOAD_ERRORS:
        # The cause's text advises loading without weights_only, which would run the file's code.
        raise BundleInvalid(
            f"{name} is not a plain state dict (a pickled module, a damaged file, or other data): {_ADVICE}",
            reason="weights",
        ) from None
    return _state_dict(loaded, name, key)


def loaded_plainly(path: Path) -> Any:
    """What torch saved: tensors, NumPy's arrays and numbers, words and containers; nothing of it is executed."""
    makers: dict[str, Any] = {"_reconstruct": np.empty(0).__reduce__()[0], "scalar": np.float64(0).__reduce__()[0]}
    named: list[Any] = [  # NumPy 2 calls the package _core
        (maker, f"numpy.{package}.multiarray.{name}") for name, maker in makers.items() for package in ("core", "_core")
    ]
    kinds = [type(np.dtype(kind)) for kind in "bBhHiIlLqQefd?"]
    with torch.serialization.safe_globals([*named, *kinds, np.ndarray, np.dtype, codecs.encode]):
        return torch.load(path, map_location="cpu", weights_only=True)


def plain_from_file(path: Path) -> Any:
    """What a file of a bundle's expressions holds: see `loaded_plainly`, tensors as NumPy arrays.

    Raises:
        NotUnderstood: It holds something else.
    """
    try:
        with path.open("rb") as stream:
            check_archive(stream, path.name)
        return _as_arrays(loaded_plainly(path), 0)
    except LOAD_ERRORS:
        raise NotUnderstood(path.name, "holds more than weights and arrays") from None


def _as_arrays(value: Any, level: int) -> Any:
    if level > _DEEPEST:
        raise ValueError("nested too deeply")
    if isinstance(value, Tensor):
        return value.detach().numpy()
    if isinstance(value, Mapping):
        return {key: _as_arrays(item, level + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_as_arrays(item, level + 1) for item in value]
    return value


def digest_with_code(digest: str, code: OwnCode | None) -> str:
    """The digest of weights and of the code that computes with them."""
    return digest if code is None else hashlib.sha256(f"{digest}\0{code.digest}".encode()).hexdigest()


def scripted_file(folder: Path, file: str) -> str | None:
    """The bundle's TorchScript file if it is what the bundle loads, or all that it has; its path inside the folder."""
    if file.endswith(".ts"):
        return file
    other = str(Path(file).with_suffix(".ts"))
    return other if not (folder / file).exists() and (folder / other).is_file() else None


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, dtypes, shapes and bytes of a state dict, in the order of the names.

    Args:
        weights: Tensors on the CPU.

    Returns:
        64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().contiguous()
        head = f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0"
        digest.update(head.encode("utf-8", "surrogatepass"))
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_archive(stream: BinaryIO, name: str) -> None:
    """Reject TorchScript and compressed data, which may hold terabytes; leaves the stream at its beginning.

    Raises:
        BundleInvalid: It is one of these, or damaged.
    """
    try:
        head = stream.read(4)
        stream.seek(0)
        if head != b"PK\x03\x04":
            return  # torch's older format, or not torch's at all: torch.load decides
        with zipfile.ZipFile(stream) as archive:
            members = archive.infolist()
        stream.seek(0)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise BundleInvalid(f"{name} cannot be read: copy it again", reason="unreadable-file") from None
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise BundleInvalid(
            f"{name} is TorchScript, which would run code of the bundle: {_ADVICE}", reason="torchscript"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BundleInvalid(f"{name} is compressed, which torch.save never does: {_ADVICE}", reason="weights")


def _state_dict(loaded: Any, file: str, key: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    found = _unwrapped(loaded, key, notes, file)
    if not isinstance(found, Mapping) or not found:
        raise BundleInvalid(f"{file} contains no state dict: {_ADVICE}", reason="weights")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = reprlib.repr(name)[:80]  # bounded: a pickle may share a list with itself
            raise BundleInvalid(f"{file} holds {what}, which is not a weight: {_ADVICE}", reason="weights")
        check_tensor(file, name[:80], tensor)
    is_lightning = isinstance(loaded, Mapping) and "pytorch-lightning_version" in loaded
    return _renamed(dict(found), is_lightning=is_lightning), tuple(notes)


def _unwrapped(loaded: Any, key: str | None, notes: list[str], file: str) -> Any:
    """The mapping of weights inside a checkpoint; averaged weights that are not taken are named."""
    for _ in range(_DEEPEST):
        if not isinstance(loaded, Mapping):
            break
        wanted = [name for name in (key, *_NESTED, *_AVERAGED) if isinstance(loaded.get(name), Mapping)]
        if not wanted:
            break
        others = [name for name in wanted[1:] if name in _AVERAGED]
        if others:
            notes.append(f"{file} also holds averaged weights ({others[0]}); {wanted[0]} is used")
        loaded = loaded[wanted[0]]
    return loaded


def _renamed(weights: dict[str, Tensor], *, is_lightning: bool) -> dict[str, Tensor]:
    """The weights without what wrappers put before every name."""
    prefixes: tuple[str, ...] = (*_WRAPPERS, *_OF_LIGHTNING) if is_lightning else _WRAPPERS
    for _ in range(_DEEPEST):
        names = [name for name in weights if name != "n_averaged"]  # AveragedModel's counter
        prefix = next((each for each in prefixes if names and all(name.startswith(each) for name in names)), None)
        if prefix is None:
            break
        weights = {name[len(prefix) :]: weights[name] for name in names}
        prefixes = tuple(each for each in prefixes if each not in _OF_LIGHTNING or prefix not in _OF_LIGHTNING)
    return weights


def check_tensor(file: str, name: str, tensor: Tensor) -> None:
    """Require a plain dense tensor of finite numbers that is no larger than its data.

    Raises:
        BundleInvalid: It is another; the message names file and tensor.
    """
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
        raise BundleInvalid(
            f"{file}: {name} is {tensor.dtype}, {tensor.layout}; ctflow accepts only plain dense tensors",
            reason="weights",
        )
    # A tensor with repeated strides may claim terabytes in a file of a few bytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BundleInvalid(f"{file}: {name} is larger than its data: {_ADVICE}", reason="weights")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BundleInvalid(
            f"{file}: {name} contains non-finite values: training diverged or the file is damaged",
            reason="weights-not-finite",
        )
