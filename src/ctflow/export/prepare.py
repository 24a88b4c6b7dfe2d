"""Make what an engine runs, if it is not there yet."""

from __future__ import annotations

from pathlib import Path

from ctflow.engines.choose import backend_module, backend_names
from ctflow.engines.contract import Precision
from ctflow.engines.onnxfile import CPU_BATCH, onnx_key
from ctflow.engines.store import EngineStore
from ctflow.errors import BackendUnavailable
from ctflow.export.onnx import onnx_from_model
from ctflow.model import Model
from ctflow.progress import Progress, silent
from ctflow.volume import Size3

_STAGE = "prepare engine"


def prepare_engine(
    name: str,
    model: Model,
    *,
    device: str,
    precision: Precision,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path,
    progress: Progress = silent,
) -> None:
    """Make the files that an engine needs to be opened with the same arguments.

    Args:
        name: A backend's name, or "auto" for the fastest that is available for the device and precision.
        model: The model.
        device: torch device.
        precision: Number format of the heavy arithmetic.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted; the CPU engines' file serves any.
        cache_dir: Where they are kept.
        progress: Told of the stage "prepare engine", of one unit, if there is something to make.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: The backend, device or precision cannot be used here.
        ModelError: The engine cannot be made from the model, or a stored file is damaged.
        OutputError: The file cannot be written.
    """
    reasons = []
    for backend in backend_names(name):
        try:
            module = backend_module(backend)
            module.check_settings(device, precision)
        except BackendUnavailable as error:
            if name != "auto":
                raise
            reasons.append(str(error))
            continue
        if module.NEEDS_FILE:
            _make_onnx(model, roi, EngineStore(cache_dir), progress)
        return
    raise BackendUnavailable("; ".join(reasons))


def _make_onnx(model: Model, roi: Size3, store: EngineStore, progress: Progress) -> None:
    """The one file that all CPU engines share."""
    key = onnx_key(model, roi, CPU_BATCH)
    if store.find(key) is not None:
        return

    def make(path: Path) -> None:
        onnx_from_model(model, roi, batch_range=CPU_BATCH, path=path)

    progress(_STAGE, 0, 1)
    store.put(key, make)
    progress(_STAGE, 1, 1)
