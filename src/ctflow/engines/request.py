"""A request for an engine: one value, from the settings down to the backend that opens it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ctflow.core.model import Model
from ctflow.core.volume import Size3
from ctflow.engines.contract import EngineInfo, Precision


@dataclass(frozen=True)
class EngineRequest:
    """Which engine, and for what.

    Attributes:
        backend: A backend's name, or "auto" for the fastest that is available.
        device: torch device.
        precision: Number format of the heavy arithmetic; None is the backend's own.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted.
        cache: Folder of stored engines; None stores none.
    """

    backend: str
    device: str
    precision: Precision | None
    roi: Size3
    batch_range: tuple[int, int]
    cache: Path | None = None

    @property
    def chosen_precision(self) -> Precision:
        """The number format of a request that names one, as every request to a backend does.

        Raises:
            ValueError: It names none; see `ctflow.engines.registry.with_precision`.
        """
        if self.precision is None:
            raise ValueError(f"{self.backend} needs a precision")
        return self.precision

    @property
    def folder(self) -> Path:
        """The cache of a request that makes an engine.

        Raises:
            ValueError: It names none.
        """
        if self.cache is None:
            raise ValueError(f"{self.backend} needs a cache folder to build its engine in")
        return self.cache


def info_of(
    request: EngineRequest,
    model: Model,
    out_channels: int,
    versions: Mapping[str, str],
    *,
    fewest_computed: int = 1,
) -> EngineInfo:
    """The description of an engine that was opened for a request.

    Args:
        request: The request, with the backend that opened the engine.
        model: The model.
        out_channels: Channels of its logits.
        versions: Versions of the software that computes, by package name.
        fewest_computed: Windows that every call computes at least.
    """
    return EngineInfo(
        backend=request.backend,
        precision=request.chosen_precision,
        device=request.device,
        roi=request.roi,
        batch_range=request.batch_range,
        weights_digest=model.weights_digest,
        out_channels=out_channels,
        versions=versions,
        fewest_computed=fewest_computed,
    )
