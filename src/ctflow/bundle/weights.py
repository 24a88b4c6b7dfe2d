"""A checkpoint as people save them -> a state dict and its digest, without executing code in a pickle."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ctflow.bundle.locate import WEIGHTS
from ctflow.bundle.saved.plain import ADVICE, LOAD_ERRORS, loaded_plainly
from ctflow.core.errors import BundleInvalid
from ctflow.core.model import NetworkSpec, OwnCode

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


def read_weights(
    folder: Path, name: str = WEIGHTS, key: str | None = None, *, is_shared: bool = False
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read a checkpoint with `weights_only`.

    Args:
        folder: The bundle.
        name: The checkpoint's path inside it.
        key: What the bundle's loader calls the network in the checkpoint.
        is_shared: Whether the checkpoint holds several networks, so that it must have this key.

    Returns:
        The state dict, on the CPU, with the names of the network itself; and notes on what else the file holds.

    Raises:
        BundleInvalid: The file is absent, is TorchScript or a pickled module, or holds weights that are not finite.
    """
    path = folder / name
    if not path.is_file():
        raise BundleInvalid(f"{name} is missing: {ADVICE}", reason="missing-file")
    try:
        opened = path.open("rb")
    except OSError:
        raise BundleInvalid(f"{name} cannot be read: copy it again", reason="unreadable-file") from None
    try:
        with opened as stream:
            loaded = loaded_plainly(stream, name)
    except LOAD_ERRORS:
        # The cause's text advises loading without weights_only, which would run the file's code.
        raise BundleInvalid(
            f"{name} is not a plain state dict (a pickled module, a damaged file, or other data): {ADVICE}",
            reason="weights",
        ) from None
    if is_shared and not (isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping)):
        raise BundleInvalid(f"{name} lacks {key!r}, which the bundle's load_dict names", reason="weights")
    return _state_dict(loaded, name, key)


def digest_of_ensemble(digest: str, network: NetworkSpec) -> str:
    """The digest of weights and of how the networks that have them are combined; a plain mean adds nothing."""
    if network.combined == "logits" and not network.shares:
        return digest
    return hashlib.sha256(f"{digest}\0{network.combined}\0{network.shares}".encode()).hexdigest()


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


def _state_dict(loaded: Any, file: str, key: str | None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    notes: list[str] = []
    found = _unwrapped(loaded, key, notes, file)
    if not isinstance(found, Mapping) or not found:
        raise BundleInvalid(f"{file} contains no state dict: {ADVICE}", reason="weights")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            what = reprlib.repr(name)[:80]  # bounded: a pickle may share a list with itself
            raise BundleInvalid(f"{file} holds {what}, which is not a weight: {ADVICE}", reason="weights")
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
        raise BundleInvalid(f"{file}: {name} is larger than its data: {ADVICE}", reason="weights")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise BundleInvalid(
            f"{file}: {name} contains non-finite values: training diverged or the file is damaged",
            reason="weights-not-finite",
        )
