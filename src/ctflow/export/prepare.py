"""Makes an engine's file if it does not exist yet."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from ctflow.core.errors import EngineMismatch, OutputError
from ctflow.core.model import Model
from ctflow.core.progress import Progress, silent
from ctflow.engines import fused
from ctflow.engines.contract import PRECISIONS, check_supported
from ctflow.engines.hardware import gpu_identity
from ctflow.engines.onnxfile import CPU_BATCH, onnx_key
from ctflow.engines.registry import backend_module, with_precision
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.calibration import write_calibration
from ctflow.engines.store.store import EngineKey, EngineStore
from ctflow.engines.tensorrt.engine import FILE as PLAN
from ctflow.engines.tensorrt.engine import RTX_FILE, engine_from_plan, graph_style, plan_key
from ctflow.engines.tensorrt.runtime import load_runtime
from ctflow.engines.tensorrt.torch_program import FILE as PROGRAM
from ctflow.engines.tensorrt.torch_program import program_key
from ctflow.export.calibration import calibration_from_phantom
from ctflow.export.examples import example_windows
from ctflow.export.onnx import onnx_from_model
from ctflow.export.parity import check_parity
from ctflow.export.tensorrt_plan import PlanSettings, plan_from_onnx
from ctflow.export.torch_program import program_from_model
from ctflow.kernels.machine_code.cubins import write_cubins

_STAGE = "prepare engine"
_SLOW = (PLAN, RTX_FILE, PROGRAM)  # to make: minutes, where an ONNX file takes seconds
_PRECISIONS = {RTX_FILE: PRECISIONS, fused.FILE: fused.PRECISIONS}  # of files that machines make which cannot run them
_ANYWHERE = tuple(_PRECISIONS)

log = logging.getLogger(__name__)


def prepare_engine(
    request: EngineRequest, model: Model, *, logits_only: bool = False, progress: Progress = silent
) -> None:
    """Make the file that an engine needs to open with the same arguments, unless it exists.

    Args:
        request: A backend, and for what, with a cache; the CPU engines' file serves any batch.
        model: The model.
        logits_only: Whether masks do not count where a new plan is compared: with random weights they say nothing.
        progress: Receives the stage "prepare engine" or "build engine", if there is something to make.

    Raises:
        SettingsInvalid: The name is unknown.
        BackendUnavailable: The backend, device or precision cannot be used here.
        ModelError: The engine cannot be made from the model, a stored file is damaged, or a new plan differs
            from PyTorch in fp32 and is not kept.
        OutputError: The file cannot be written.
    """
    request = with_precision(request)
    name, module, chosen = request.backend, backend_module(request.backend), request.chosen_precision
    if module.FILE in _ANYWHERE:
        check_supported(name, "cuda", chosen, module.DEVICES, _PRECISIONS[module.FILE])
    else:
        module.check_settings(request.device, chosen)
    key = _file_key(request, model)
    store = EngineStore(request.folder)
    if module.FILE == fused.FILE and chosen == "fp8":
        _keep_calibration(request, model, store, progress)
    if key is None or store.find(key) is not None:
        return
    if module.FILE in _SLOW:
        near = store.nearest(key)  # for example one for the driver before an update
        why = "" if near is None else f" ({near.text})"
        batch = request.batch_range[1]
        log.warning("%s %s, batch %d: building an engine, once; this takes minutes%s", name, chosen, batch, why)

    def make(path: Path) -> None:
        if module.FILE == PROGRAM:
            batch, device = request.batch_range[1], request.device
            program_from_model(
                model, request.roi, precision=chosen, batch=batch, path=path, device=device, progress=progress
            )
        elif module.FILE == fused.FILE:
            write_cubins(fused.compile_cubins(request, model), path)
        elif module.FILE in (PLAN, RTX_FILE):
            _make_plan(request, model, path, progress)
            _check_plan(request, model, path, logits_only=logits_only)
        else:
            onnx_from_model(model, request.roi, batch=CPU_BATCH, path=path)

    progress(_STAGE, 0, 1)
    store.put(key, make)
    progress(_STAGE, 1, 1)


def _keep_calibration(request: EngineRequest, model: Model, store: EngineStore, progress: Progress) -> None:
    """Measure a model's activations for fp8, unless that has been done."""
    key = fused.calibration_key(request, model)
    if store.find(key) is None:
        progress(_STAGE, 0, 1)
        made = calibration_from_phantom(request, model)
        store.put(key, lambda path: write_calibration(made, path))
        progress(_STAGE, 1, 1)


def prepare_to_open(
    request: EngineRequest, model: Model, *, logits_only: bool = False, progress: Progress = silent
) -> None:
    """As `prepare_engine`; an engine that can do without its file does so where that cannot be kept or is damaged."""
    try:
        prepare_engine(request, model, logits_only=logits_only, progress=progress)
    except (OutputError, EngineMismatch) as error:
        if backend_module(request.backend).FILE != fused.FILE:
            raise
        log.warning("%s compiles its kernels each time that it is opened: %s", request.backend, error)


def is_prepared(request: EngineRequest, model: Model) -> bool:
    """Whether an engine can be opened without making a file for minutes; arguments as for `prepare_engine`.

    Without a cache (None) no file exists.

    Raises:
        EngineMismatch: Its stored file is damaged.
    """
    if backend_module(request.backend).FILE not in _SLOW:
        return True
    if request.cache is None:
        return False
    key = _file_key(request, model)
    return key is not None and EngineStore(request.cache).find(key) is not None


def is_made_anywhere(name: str) -> bool:
    """Whether a backend's file can also be made on machines that cannot run it."""
    return backend_module(name).FILE in _ANYWHERE


def target_of_file(request: EngineRequest, model: Model) -> str:
    """What the file of a backend that makes one anywhere is for, in words."""
    key = _file_key(request, model)
    return "any GPU that the engine takes" if key is None or key.device == "any" else f"GPUs of {key.device}"


def _file_key(request: EngineRequest, model: Model) -> EngineKey | None:
    """Key of the file that a backend runs; None if it runs none."""
    kind = backend_module(request.backend).FILE
    if kind is None:
        return None
    if kind == fused.FILE:
        return fused.cubins_key(request, model)
    if kind == PROGRAM:
        return program_key(request, model)
    if kind in (PLAN, RTX_FILE):
        return plan_key(request, model)
    return onnx_key(model, request.roi)


def _make_plan(request: EngineRequest, model: Model, path: Path, progress: Progress) -> None:
    """The network as ONNX in the style of this TensorRT, and its plan."""
    name, precision, device = request.backend, request.chosen_precision, request.device
    settings = PlanSettings(precision, request.batch_range[1])
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "model.onnx"
        onnx_from_model(model, request.roi, batch=settings.batch, path=graph, style=graph_style(precision))
        data = graph.read_bytes()
    if name == "tensorrt-rtx":  # chooses kernels when it runs
        plan_from_onnx(name, data, path, settings, progress)
        return
    where = hashlib.sha256(gpu_identity(device).encode()).hexdigest()[:16]
    timing_cache = request.folder / f"timing-{load_runtime(name).__version__}-{where}.cache"
    with torch.cuda.device(device):
        plan_from_onnx(name, data, path, replace(settings, timing_cache=timing_cache), progress)


def _check_plan(request: EngineRequest, model: Model, path: Path, *, logits_only: bool) -> None:
    """Compare a new plan with PyTorch where it can run, so that no plan with other results is kept."""
    if torch.device(request.device).type != "cuda":  # made for another machine, which compares when it measures
        return
    with closing(engine_from_plan(request, model, path.read_bytes())) as engine:
        check_parity(engine, model, example_windows(model, request.roi), logits_only=logits_only)
