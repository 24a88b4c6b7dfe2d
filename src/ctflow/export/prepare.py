"""Make what an engine runs, if it is not there yet."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from pathlib import Path

import torch

from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.core.volume import Size3
from ctflow.engines.choose import backend_module
from ctflow.engines.contract import Precision
from ctflow.engines.hardware import gpu_identity
from ctflow.engines.onnxfile import CPU_BATCH, onnx_key
from ctflow.engines.store.store import EngineKey, EngineStore
from ctflow.engines.tensorrt import FILE as PLAN
from ctflow.engines.tensorrt import RTX_FILE, check_precision, engine_from_plan, graph_style, plan_batches, plan_key
from ctflow.engines.tensorrt_runtime import load_runtime
from ctflow.engines.torch_tensorrt import FILE as PROGRAM
from ctflow.engines.torch_tensorrt import program_key
from ctflow.export.examples import example_windows
from ctflow.export.onnx import onnx_from_model
from ctflow.export.parity import check_parity
from ctflow.export.plan import PlanSettings, plan_from_onnx
from ctflow.export.torch_program import program_from_model

_STAGE = "prepare engine"
_SLOW = (PLAN, RTX_FILE, PROGRAM)  # to make: minutes, where an ONNX file takes seconds
_ANYWHERE = (RTX_FILE,)  # made on machines that cannot run it, too

log = logging.getLogger(__name__)


def prepare_engine(
    name: str,
    model: Model,
    *,
    device: str,
    precision: Precision | None,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path,
    logits_only: bool = False,
    progress: Progress = silent,
) -> None:
    """Make the file that an engine needs to be opened with the same arguments, unless it is there.

    Args:
        name: A backend's name.
        model: The model.
        device: torch device.
        precision: Number format of the heavy arithmetic; None is the backend's own.
        roi: Window size in voxels.
        batch_range: Smallest and largest batch wanted; the CPU engines' file serves any.
        cache_dir: Where files are kept.
        logits_only: Whether masks do not count where a new plan is compared: of random weights they say nothing.
        progress: Told of the stage "prepare engine" or "build engine", if there is something to make.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: The backend, device or precision cannot be used here.
        ModelError: The engine cannot be made from the model, a stored file is damaged, or a new plan computes something
            else than PyTorch in fp32, and is not kept.
        OutputError: The file cannot be written.
    """
    module = backend_module(name)
    chosen = precision or module.precisions(device)[-1]
    if module.FILE in _ANYWHERE:
        check_precision(name, chosen)
    else:
        module.check_settings(device, chosen)
    key = _file_key(name, model, device, chosen, roi, batch_range)
    store = EngineStore(cache_dir)
    if key is None or store.find(key) is not None:
        return
    if module.FILE in _SLOW:
        near = store.nearest(key)  # for example one for the driver of before an update
        why = "" if near is None else f" ({near.text})"
        log.warning("%s %s: building an engine, once; this takes minutes%s", name, chosen, why)

    def make(path: Path) -> None:
        if module.FILE == PROGRAM:
            program_from_model(model, roi, precision=chosen, batch=batch_range[1], path=path, device=device)
        elif module.FILE in (PLAN, RTX_FILE):
            _make_plan(name, model, roi, batch_range, chosen, device, path, cache_dir, progress)
            _check_plan(name, model, roi, batch_range, chosen, device, path, logits_only=logits_only)
        else:
            onnx_from_model(model, roi, batch_range=CPU_BATCH, path=path)

    progress(_STAGE, 0, 1)
    store.put(key, make)
    progress(_STAGE, 1, 1)


def is_prepared(
    name: str,
    model: Model,
    *,
    device: str,
    precision: Precision,
    roi: Size3,
    batch_range: tuple[int, int],
    cache_dir: Path | None,
) -> bool:
    """Whether an engine can be opened without making a file for minutes; arguments as for `prepare_engine`.

    Without a cache (None) no file is there.

    Raises:
        EngineMismatch: Its stored file is damaged.
    """
    if backend_module(name).FILE not in _SLOW:
        return True
    if cache_dir is None:
        return False
    key = _file_key(name, model, device, precision, roi, batch_range)
    return key is not None and EngineStore(cache_dir).find(key) is not None


def is_made_anywhere(name: str) -> bool:
    """Whether a backend's file is made on machines that cannot run it, too."""
    return backend_module(name).FILE in _ANYWHERE


def _file_key(
    name: str, model: Model, device: str, precision: Precision, roi: Size3, batch_range: tuple[int, int]
) -> EngineKey | None:
    """Key of the file that a backend runs; None if it runs none."""
    kind = backend_module(name).FILE
    if kind is None:
        return None
    if kind == PROGRAM:
        return program_key(model, device, precision, roi, batch_range)
    if kind in (PLAN, RTX_FILE):
        return plan_key(name, model, device, precision, roi, batch_range)
    return onnx_key(model, roi, CPU_BATCH)


def _make_plan(
    name: str,
    model: Model,
    roi: Size3,
    batch_range: tuple[int, int],
    precision: Precision,
    device: str,
    path: Path,
    cache_dir: Path,
    progress: Progress,
) -> None:
    """The network as ONNX in the style of this TensorRT, and its plan."""
    batches = plan_batches(batch_range)
    style = graph_style(load_runtime(name), precision)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        onnx_from_model(model, roi, batch_range=(batches[0], batches[2]), path=graph, style=style)
        data = graph.read_bytes()
    if name == "tensorrt-rtx":  # chooses kernels when it runs
        plan_from_onnx(name, data, path, PlanSettings(precision, batches), progress)
        return
    where = hashlib.sha256(gpu_identity(device).encode()).hexdigest()[:16]
    timing_cache = cache_dir / f"timing-{load_runtime(name).__version__}-{where}.cache"
    with torch.cuda.device(device):
        plan_from_onnx(name, data, path, PlanSettings(precision, batches, timing_cache=timing_cache), progress)


def _check_plan(
    name: str,
    model: Model,
    roi: Size3,
    batch_range: tuple[int, int],
    precision: Precision,
    device: str,
    path: Path,
    *,
    logits_only: bool,
) -> None:
    """Compare a new plan with PyTorch, so that none is kept which computes something else; where it can run at all."""
    if torch.device(device).type != "cuda":  # made for another machine, which compares when it measures
        return
    engine = engine_from_plan(name, model, path.read_bytes(), device, precision, roi, batch_range)
    try:
        check_parity(engine, model, example_windows(model, roi), logits_only=logits_only)
    finally:
        engine.close()
