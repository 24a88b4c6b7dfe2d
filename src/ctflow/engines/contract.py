"""The interface of every engine, through which all windows are computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, Protocol

from ctflow.core.errors import BackendUnavailable, BundleInvalid
from ctflow.core.volume import Size3

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "tf32", "bf16", "fp16")
# Of one engine, by name only: it costs exactness that can be seen in a mask. `auto` takes none of them.
ONLY_BY_NAME: tuple[Precision, ...] = ("fp8",)
# What such a precision costs, for results; docs/exactness.md has the figures.
COSTS: Mapping[str, str] = {
    "fp8": "the largest convolution in eight bits (e4m3), which costs masks more than half precision does"
}
_OF_FP8 = "fp8 is computed by --engine fused on an H100 or H200 only: name both, or choose another --precision"


def precision_from_name(name: str | None) -> Precision | None:
    """The number format with this name; None stays None.

    Raises:
        ValueError: No such format exists; the settings have already rejected it.
    """
    known = (*PRECISIONS, *ONLY_BY_NAME)
    return None if name is None else known[known.index(name)]


@dataclass(frozen=True)
class EngineInfo:
    """An engine's description, for result.json, the SEG's identity and the store's key.

    Attributes:
        backend: Name as on the command line.
        precision: Number format of the heavy arithmetic.
        device: torch device string.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch that `predict` takes.
        weights_digest: SHA-256 of the weights.
        out_channels: Channels of the logits; 1 for a two-class softmax model whose two logits are folded into their
            difference.
        versions: Versions of the software that computes, by package name.
        fewest_computed: Windows that every call computes at least: a fixed-batch engine pads a smaller batch,
            which needs no less memory.
    """

    backend: str
    precision: Precision
    device: str
    roi: Size3
    batch_range: tuple[int, int]
    weights_digest: str
    out_channels: int
    versions: Mapping[str, str] = field(default_factory=dict)
    fewest_computed: int = 1


class Engine(Protocol):
    """Computes the logits of one batch of windows."""

    @property
    def info(self) -> EngineInfo:
        """The engine's description."""

    def predict(self, windows: Tensor) -> Tensor:
        """Logits of a batch of windows (`info.out_channels` says which).

        Args:
            windows: (B, C_in, D, H, W) float32 on the engine's device, B within `info.batch_range`, (D, H, W) equal
                to `info.roi`.

        Returns:
            (B, C_out, D, H, W) float32 on the same device; the buffer is valid until the next call.

        Raises:
            ValueError: The batch or window size is not the engine's.
            DeviceOutOfMemory: The device has too little memory.
        """

    def close(self) -> None:
        """Free everything; may be called twice. `predict` afterwards is a ValueError."""


def check_windows(windows: Tensor, info: EngineInfo) -> None:
    """Reject a batch that does not fit the engine.

    Args:
        windows: The argument of `predict`.
        info: The engine.

    Raises:
        ValueError: Its number of axes, batch or window size differs from the engine's.
    """
    low, high = info.batch_range
    if windows.ndim != 5 or not low <= windows.shape[0] <= high or not _fits(windows.shape[2:], info.roi):
        raise ValueError(f"this engine takes {low} to {high} windows of {info.roi}, not {tuple(windows.shape)}")


def package_state(name: str) -> tuple[bool, str]:
    """Whether the package of a backend is installed, and its version or what to do."""
    if find_spec(name) is None:
        return False, f"the package {name} is not installed: pip install 'ctflow[{name}]'"
    try:
        return True, f"{name} {version(name)}"
    except PackageNotFoundError:
        return False, f"the package {name} is damaged: pip install --force-reinstall 'ctflow[{name}]'"


def check_supported(
    name: str, device: str, precision: str, devices: Collection[str], precisions: Collection[str] = PRECISIONS
) -> None:
    """Check a device and a precision against those of a backend.

    Args:
        name: The backend.
        device: torch device.
        precision: Number format.
        devices: Kinds of torch device that it computes on.
        precisions: Number formats that it computes.

    Raises:
        BackendUnavailable: One is not among them.
    """
    if device.partition(":")[0] not in devices:
        where, remedy = ("the CPU", "choose with --device cpu") if "cpu" in devices else ("a GPU", _remedy_of_gpu())
        raise BackendUnavailable(f"{name} computes on {where}, not on {device}: {remedy}", reason="wrong-device")
    if precision in ONLY_BY_NAME and precision not in precisions:
        raise BackendUnavailable(f"{name} does not compute {precision}: {_OF_FP8}", reason="wrong-precision")
    if precision not in precisions:
        raise BackendUnavailable(
            f"{name} computes {', '.join(precisions)}, not {precision}: choose with --precision",
            reason="wrong-precision",
        )


def _remedy_of_gpu() -> str:
    import torch  # noqa: PLC0415  # seconds to import, which other checks should not cost

    if torch.cuda.is_available():
        return "choose with --device cuda"
    return "torch finds none on this machine, so choose another engine (--engine auto)"


def check_chosen_by_name(backend: str, precision: str | None) -> None:
    """Reject a precision that an engine computes only where both are named.

    Args:
        backend: Name as on the command line.
        precision: Number format; None is the backend's own.

    Raises:
        BackendUnavailable: The engine is left to `auto`.
    """
    if backend == "auto" and precision in ONLY_BY_NAME:
        raise BackendUnavailable(f"auto does not take {precision}: {_OF_FP8}", reason="wrong-precision")


def not_taken(roi: tuple[int, ...], why: object) -> BundleInvalid:
    """The error of a network that does not take windows of a size."""
    return BundleInvalid(f"the network does not take windows of {roi}: {why}", reason="window-size")


def is_of_gpu(error: BaseException) -> bool:
    """Whether a torch error comes from the GPU or its libraries rather than from the network or the windows."""
    return type(error).__name__ == "AcceleratorError" or str(error).startswith(
        ("CUDA", "CUDNN", "CUBLAS", "cuDNN", "Triton Error [CUDA]")
    )


def _fits(size: Sequence[int], roi: Size3) -> bool:
    """Whether windows have the engine's size; 0 stands for the volume's, which varies."""
    return all(wanted in (0, n) for n, wanted in zip(size, roi, strict=True))
