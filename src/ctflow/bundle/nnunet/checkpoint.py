"""fold_N/checkpoint_final.pth -> weights, and what else a prediction needs, without executing code in a pickle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ctflow.bundle.config import short
from ctflow.bundle.nnunet.folder import CHECKPOINT, TrainedFolder
from ctflow.bundle.saved.plain import LOAD_ERRORS, loaded_plainly
from ctflow.bundle.weights import check_tensor
from ctflow.core.errors import BundleInvalid

_PREFIXES = ("module.", "_orig_mod.")
_LONGEST = 120


@dataclass(frozen=True, eq=False)
class FoldCheckpoint:
    """One fold's checkpoint.

    Attributes:
        weights: The network's state dict, on the CPU.
        trainer: Class name of the trainer.
        configuration: Which of the plans' configurations was trained.
        mirror_axes: Axes along which the trainer mirrored, and along which its predictions are mirrored.
    """

    weights: Mapping[str, Tensor]
    trainer: str
    configuration: str
    mirror_axes: tuple[int, ...]


def read_checkpoint(folder: TrainedFolder, fold: str) -> FoldCheckpoint:
    """Read a fold's checkpoint with `weights_only`.

    Args:
        folder: The trained-model folder.
        fold: One of its folds.

    Raises:
        BundleInvalid: It holds code, is damaged, lacks an entry, or holds weights that are not finite.
    """
    name = f"{fold}/{CHECKPOINT}"
    with folder.opened(name) as stream:
        try:
            loaded = loaded_plainly(stream, name)
        except LOAD_ERRORS:
            # The cause's text advises loading without weights_only, which would run the file's code.
            raise BundleInvalid(
                f"{name} holds more than weights, numbers and words, or is damaged: nnU-Net 2 saves no such checkpoint",
                reason="weights",
            ) from None
    if not isinstance(loaded, Mapping):
        raise BundleInvalid(f"{name} is no checkpoint of nnU-Net 2", reason="weights")
    arguments = loaded.get("init_args")
    found = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    return FoldCheckpoint(
        _weights(loaded.get("network_weights"), name),
        _word(loaded.get("trainer_name"), f"{name}: trainer_name"),
        _word(found, f"{name}: init_args#configuration"),
        _axes(loaded.get("inference_allowed_mirroring_axes"), name),
    )


def _weights(given: Any, file: str) -> dict[str, Tensor]:
    if not isinstance(given, Mapping) or not given:
        raise BundleInvalid(f"{file} has no network_weights", reason="weights")
    weights: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise BundleInvalid(f"{file} holds {short(name)}, which is not a weight", reason="weights")
        check_tensor(file, name[:80], tensor)
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)  # noqa: PLW2901  # a wrapper's prefix is not the network's
        weights[name] = tensor
    return weights


def _word(value: Any, place: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _LONGEST or not value.isprintable() or "\\" in value:
        raise BundleInvalid(f"{place} must be a name, not {short(value)}", reason="weights")
    return value


def _axes(value: Any, file: str) -> tuple[int, ...]:
    if value is None:
        return ()
    axes = tuple(value) if isinstance(value, list | tuple) else (None,)
    if not all(type(axis) is int and 0 <= axis <= 2 for axis in axes) or len(set(axes)) != len(axes):
        raise BundleInvalid(
            f"{file}: inference_allowed_mirroring_axes must be axes from 0 to 2, not {short(value)}",
            reason="weights",
        )
    return tuple(sorted(axes))
