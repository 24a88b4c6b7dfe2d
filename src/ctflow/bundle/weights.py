"""models/model.pt -> a state dict and its digest, without executing code in a pickle."""

from __future__ import annotations

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctflow.bundle.locate import WEIGHTS
from ctflow.core.errors import BundleInvalid

_NESTED = ("state_dict", "model")
_DTYPES = frozenset(
    {torch.float32, torch.float16, torch.bfloat16, torch.float64}
    | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
)
_ADVICE = "save the weights with torch.save(network.state_dict(), 'models/model.pt')"
# Errors of unpickling and unzipping damaged or hostile files.
_LOAD_ERRORS = (
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


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read models/model.pt with `weights_only`.

    Args:
        folder: The bundle.

    Returns:
        The state dict, on the CPU.

    Raises:
        BundleInvalid: The file is absent, is TorchScript or a pickled module, or holds weights that are not finite.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        raise BundleInvalid(f"{WEIGHTS} is missing: {_ADVICE}", reason="missing-file")
    _check_archive(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except _LOAD_ERRORS:
        # The cause's text advises loading without weights_only, which would run the file's code.
        raise BundleInvalid(
            f"{WEIGHTS} is not a plain state dict (a pickled module, a damaged file, or other data): {_ADVICE}",
            reason="weights",
        ) from None
    return _state_dict(loaded)


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


def _check_archive(path: Path) -> None:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"PK\x03\x04":
                return  # torch's older format, or not torch's at all: torch.load decides
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        raise BundleInvalid(f"{WEIGHTS} cannot be read: copy it again", reason="unreadable-file") from None
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise BundleInvalid(
            f"{WEIGHTS} is TorchScript, which would run code of the bundle: {_ADVICE}", reason="torchscript"
        )
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise BundleInvalid(f"{WEIGHTS} is compressed, which torch.save never does: {_ADVICE}", reason="weights")


def _state_dict(loaded: Any) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
            break
    if not isinstance(loaded, Mapping) or not loaded:
        raise BundleInvalid(f"{WEIGHTS} contains no state dict: {_ADVICE}", reason="weights")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BundleInvalid(
                f"{WEIGHTS} holds {str(name)[:80]!r}, which is not a weight: {_ADVICE}", reason="weights"
            )
        _check_tensor(name[:80], tensor)
    return dict(loaded)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _DTYPES:
        raise BundleInvalid(
            f"{WEIGHTS}: {name} is {tensor.dtype}, {tensor.layout}; ctflow accepts only plain dense tensors",
            reason="weights",
        )
    # A tensor with repeated strides may claim terabytes in a file of a few bytes.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise BundleInvalid(f"{WEIGHTS}: {name} is larger than its data: {_ADVICE}", reason="weights")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BundleInvalid(
            f"{WEIGHTS}: {name} contains non-finite values: training diverged or the file is damaged",
            reason="weights-not-finite",
        )
