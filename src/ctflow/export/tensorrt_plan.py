"""A TensorRT plan from an ONNX file: one small adapter for TensorRT 10, 11 and TensorRT-RTX."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctflow.core.atomic import write_atomically
from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, ExportFailed, OutputError
from ctflow.core.progress import Progress, silent
from ctflow.engines.contract import Precision
from ctflow.engines.tensorrt.engine import INPUT
from ctflow.engines.tensorrt.runtime import Messages, is_rtx, load_runtime, messages_of
from ctflow.export.build_watch import BuildWatch

_STAGE = "build engine"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanSettings:
    """How a plan is built.

    Attributes:
        precision: Number format of the heavy arithmetic.
        batch: Windows at a time.
        timing_cache: File of measured kernels, read if it exists and written back: shortens later builds.
    """

    precision: Precision
    batch: int
    timing_cache: Path | None = None


def plan_from_onnx(name: str, onnx: bytes, path: Path, settings: PlanSettings, progress: Progress = silent) -> None:
    """Build a plan on the current GPU (TensorRT-RTX: on any machine).

    Args:
        name: "tensorrt" or "tensorrt-rtx".
        onnx: The graph, in the style that `ctflow.engines.tensorrt.engine.graph_style` gives.
        path: Where the plan is written.
        settings: How it is built.
        progress: Receives the build's steps as stage "build engine".

    Raises:
        BackendUnavailable: TensorRT does not load.
        ExportFailed: It cannot build the graph; gives its reason.
        DeviceOutOfMemory: The GPU has too little memory to build it.
        OutputError: The file cannot be written.
    """
    runtime = load_runtime(name)
    messages, logger = messages_of(runtime)
    builder = _builder(runtime, logger, messages)
    network = builder.create_network(_network_flags(runtime))
    parser = runtime.OnnxParser(network, logger)
    if not parser.parse(onnx):
        reasons = "; ".join(parser.get_error(n).desc() for n in range(parser.num_errors))
        raise ExportFailed(f"{name} cannot read the graph: {reasons[:300]}", reason="graph")
    config = builder.create_builder_config()
    _configure(runtime, builder, config, network, settings)
    watch = BuildWatch(runtime, lambda done, total: progress(_STAGE, done, total + 1))
    config.progress_monitor = watch.monitor()
    progress(_STAGE, 0, 1)
    with watch.running():
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        if messages.tell_of_memory:
            raise DeviceOutOfMemory(f"{name} has too little memory to build the engine: {messages.last}")
        raise ExportFailed(f"{name} cannot build the engine: {messages.last}", reason="not-buildable")
    progress(_STAGE, 1, 1)
    data = bytes(plan)
    write_atomically(path, lambda stream: stream.write(data))
    _write_timing_cache(config, settings.timing_cache)


def _builder(runtime: Any, logger: Any, messages: Messages) -> Any:
    try:
        return runtime.Builder(logger)
    except TypeError as error:  # raised by the bindings where CUDA does not start
        raise BackendUnavailable(
            f"{runtime.__name__} does not start: {messages.last}", reason="not-loadable"
        ) from error


def _network_flags(runtime: Any) -> int:
    """Flags for explicit batches and strong typing, in versions that do not imply them."""
    flags = runtime.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def _configure(runtime: Any, builder: Any, config: Any, network: Any, settings: PlanSettings) -> None:
    flags = runtime.BuilderFlag
    if settings.precision == "tf32":
        config.set_flag(flags.TF32)
    else:
        config.clear_flag(flags.TF32)
    if hasattr(runtime, "TacticSource") and hasattr(runtime.TacticSource, "CUDNN"):
        # Deprecated in 10: a plan needs nothing of torch's cuDNN.
        config.set_tactic_sources(config.get_tactic_sources() & ~(1 << int(runtime.TacticSource.CUDNN)))
    _set_profile(builder, config, network, settings.batch)
    _read_timing_cache(runtime, config, settings.timing_cache)


def _set_profile(builder: Any, config: Any, network: Any, batch: int) -> None:
    shape = tuple(network.get_input(0).shape)[1:]
    if network.get_input(0).name != INPUT:
        raise ExportFailed(f"the graph's input is {network.get_input(0).name}, not {INPUT}", reason="graph")
    profile = builder.create_optimization_profile()
    profile.set_shape(INPUT, *[(batch, *shape)] * 3)  # the smallest, the usual and the largest
    config.add_optimization_profile(profile)


def _read_timing_cache(runtime: Any, config: Any, path: Path | None) -> None:
    """An earlier cache; TensorRT itself discards one of another GPU or version."""
    if path is None or is_rtx(runtime):  # RTX chooses kernels when it runs
        return
    try:
        known = path.read_bytes()
    except OSError:
        known = b""
    cache = config.create_timing_cache(known) or config.create_timing_cache(b"")
    if not config.set_timing_cache(cache, False) and known:
        log.warning("the timing cache %s is of another GPU or version: kernels are measured anew", path.name)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _write_timing_cache(config: Any, path: Path | None) -> None:
    cache = config.get_timing_cache() if path is not None else None
    if cache is not None and path is not None:
        data = bytes(cache.serialize())
        try:
            write_atomically(path, lambda stream: stream.write(data))
        except OutputError as error:  # the plan, which took minutes, exists
            log.warning("the timing cache is not kept: %s", error)
