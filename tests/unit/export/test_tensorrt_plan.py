"""Plans: TensorRT-RTX builds real ones here, without a GPU; for TensorRT's timing cache a stand-in for its module."""

from __future__ import annotations

import enum
import os
import signal
import threading
from types import SimpleNamespace

import pytest
import torch

from ctflow.core.errors import BackendUnavailable, DeviceOutOfMemory, ExportFailed
from ctflow.engines.onnxfile import GraphStyle
from ctflow.engines.tensorrt import runtime as tensorrt_module
from ctflow.engines.tensorrt.engine import LoadedPlan, graph_style
from ctflow.engines.tensorrt.runtime import load_runtime
from ctflow.export import tensorrt_plan as plan_module
from ctflow.export.onnx import onnx_from_model
from ctflow.export.tensorrt_plan import PlanSettings, plan_from_onnx
from ctflow.networks.swin import GPU_ATTENTION
from model_support import unet_model
from reasons import raises_reason

RTX = "tensorrt-rtx"
ROI = (16, 16, 16)
ARGUMENTS = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def graph(path, style: GraphStyle, batch=2) -> bytes:
    onnx_from_model(unet_model(ARGUMENTS, ROI), ROI, batch=batch, path=path, style=style)
    return path.read_bytes()


@pytest.fixture(scope="module")
def half_graph(tmp_path_factory) -> bytes:
    return graph(tmp_path_factory.mktemp("onnx") / "m.onnx", graph_style("fp16"))


def test_a_real_plan_is_built_without_a_gpu_and_tells_its_steps(half_graph, tmp_path):
    told = []
    path = tmp_path / "m.plan"
    plan_from_onnx(RTX, half_graph, path, PlanSettings("fp16", 2), lambda *args: told.append(args))
    assert path.stat().st_size > 10_000
    assert {stage for stage, _, _ in told} == {"build engine"}
    assert told[0] == ("build engine", 0, 1)
    assert told[-1] == ("build engine", 1, 1)
    assert len(told) > 3  # steps of the builder itself
    assert all(0 <= done <= total for _, done, total in told)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.plan"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the plan may run")
def test_a_plan_that_cannot_run_here_says_why(half_graph, tmp_path):
    plan_from_onnx(RTX, half_graph, tmp_path / "m.plan", PlanSettings("fp16", 2))
    with raises_reason(BackendUnavailable, "device-failed", names="tensorrt-rtx"):
        LoadedPlan(load_runtime(RTX), (tmp_path / "m.plan").read_bytes(), RTX)


def test_bytes_that_are_no_plan_are_refused_with_the_reason():
    with raises_reason(BackendUnavailable, "device-failed"):
        LoadedPlan(load_runtime(RTX), b"not a plan", RTX)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_other_precisions_are_built(precision, tmp_path):
    data = graph(tmp_path / "m.onnx", graph_style(precision))
    plan_from_onnx(RTX, data, tmp_path / "m.plan", PlanSettings(precision, 2))
    assert (tmp_path / "m.plan").stat().st_size > 10_000


def test_a_graph_that_cannot_be_read_is_named(tmp_path):
    with raises_reason(ExportFailed, "graph"):
        plan_from_onnx(RTX, b"nonsense", tmp_path / "m.plan", PlanSettings("fp16", 1))
    assert not list(tmp_path.iterdir())


def test_what_the_builder_cannot_build_is_named_and_leaves_nothing(tmp_path):
    data = graph(tmp_path / "m.onnx", graph_style("bf16"))
    with raises_reason(ExportFailed, "not-buildable", names="deconv"):  # RTX 1.7: no transposed bf16
        plan_from_onnx(RTX, data, tmp_path / "m.plan", PlanSettings("bf16", 2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("mine")])
def test_progress_may_stop_the_build(half_graph, tmp_path, error):
    def stop(stage, done, total):
        if total > 1:
            raise error

    with pytest.raises(type(error)):
        plan_from_onnx(RTX, half_graph, tmp_path / "m.plan", PlanSettings("fp16", 2), stop)
    assert not list(tmp_path.iterdir())


def test_ctrl_c_within_the_builder_ends_it(half_graph, tmp_path):
    """The signal comes while C++ code runs; Python handles it when TensorRT's next callback begins."""
    told, senders = [], []

    def press(*step):
        told.append(step)
        if len(told) == 3:
            senders.append(threading.Timer(0.005, os.kill, (os.getpid(), signal.SIGINT)))
            senders[0].start()

    with pytest.raises(KeyboardInterrupt):
        plan_from_onnx(RTX, half_graph, tmp_path / "m.plan", PlanSettings("fp16", 2), press)
    senders[0].join()
    assert told[-1][1] < told[-1][2], "it was built to its end"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_graphs_are_written_for_who_reads_them():
    assert graph_style("fp16") == GraphStyle("fp16", GPU_ATTENTION)
    assert graph_style("tf32").precision == "fp32"  # a switch of the builder, not a type


# ------------------------------------------------------------------------------------------------ TensorRT's own


class Flag(enum.IntEnum):
    FP16, TF32 = range(2)


class Source(enum.IntEnum):
    CUBLAS, CUDNN, JIT_CONVOLUTIONS = range(3)


class Cache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b"+"


class Config:
    def __init__(self) -> None:
        self.flags, self.sources, self.cache, self.profiles = {Flag.TF32}, 0b111, None, []
        self.accepts = True

    set_flag = lambda self, flag: self.flags.add(flag)  # noqa: E731
    clear_flag = lambda self, flag: self.flags.discard(flag)  # noqa: E731
    get_tactic_sources = lambda self: self.sources  # noqa: E731
    create_timing_cache = staticmethod(Cache)
    get_timing_cache = lambda self: self.cache  # noqa: E731
    add_optimization_profile = lambda self, profile: self.profiles.append(profile)  # noqa: E731

    def set_tactic_sources(self, sources: int) -> None:
        self.sources = sources

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        self.cache = cache if self.accepts or not cache.data else self.cache
        return self.cache is cache


class StandIn:
    """As much of TensorRT 10's module as a build needs."""

    __name__, __version__ = "tensorrt", "10.6.0"
    BuilderFlag, TacticSource, IProgressMonitor = Flag, Source, object
    NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0, STRONGLY_TYPED=1)

    class ILogger:
        Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def __init__(self, plan: bytes | None = b"plan", said: str = "") -> None:
        self.config, self.plan, self.said = Config(), plan, said
        self.network = SimpleNamespace(
            get_input=lambda _: SimpleNamespace(name="windows", shape=(4, 1, 16, 16, 16)),
        )  # fmt: skip

    def Builder(self, logger):
        def build(network, config):
            if self.said:
                logger.log(1, self.said)
            return self.plan

        def create_network(flags):
            assert flags == 0b11
            return self.network

        profile = SimpleNamespace(shapes=None, set_shape=lambda *shapes: setattr(profile, "shapes", shapes))
        return SimpleNamespace(
            create_network=create_network, create_builder_config=lambda: self.config,
            create_optimization_profile=lambda: profile, build_serialized_network=build,
        )  # fmt: skip

    def OnnxParser(self, network, logger):
        return SimpleNamespace(parse=lambda data: True)


@pytest.fixture
def stand_in(monkeypatch):
    def make(**arguments) -> StandIn:
        runtime = StandIn(**arguments)
        monkeypatch.setattr(tensorrt_module, "_LOGGERS", {})
        monkeypatch.setattr(plan_module, "load_runtime", lambda name: runtime)
        return runtime

    return make


def test_a_plan_is_built_for_its_batch_and_without_cudnn(stand_in, tmp_path):
    runtime, told = stand_in(), []
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings("fp16", 4), lambda *a: told.append(a))
    assert (tmp_path / "p").read_bytes() == b"plan"
    assert runtime.config.sources == 0b101
    (profile,) = runtime.config.profiles
    assert profile.shapes == ("windows", *[(4, 1, 16, 16, 16)] * 3)
    assert told == [("build engine", 0, 1), ("build engine", 1, 1)]


@pytest.mark.parametrize(("precision", "flags"), [("fp16", set()), ("fp32", set()), ("tf32", {Flag.TF32})])
def test_tf32_is_used_on_request_only_and_half_precision_is_the_graphs(stand_in, tmp_path, precision, flags):
    runtime = stand_in()
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings(precision, 1))
    assert runtime.config.flags == flags


def test_the_timing_cache_is_read_and_written_back(stand_in, tmp_path):
    settings = PlanSettings("fp16", 1, timing_cache=tmp_path / "timing")
    stand_in()
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", settings)
    assert (tmp_path / "timing").read_bytes() == b"+"
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", settings)
    assert (tmp_path / "timing").read_bytes() == b"++"


def test_a_timing_cache_that_cannot_be_written_costs_no_plan(stand_in, tmp_path, caplog):
    (tmp_path / "timing").mkdir()
    stand_in()
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings("fp16", 1, timing_cache=tmp_path / "timing"))
    assert (tmp_path / "p").read_bytes() == b"plan"
    assert "timing cache is not kept" in caplog.text


def test_bindings_that_do_not_start_are_named(stand_in, tmp_path, monkeypatch):
    def refuse(logger):
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    monkeypatch.setattr(stand_in(), "Builder", refuse)
    with raises_reason(BackendUnavailable, "not-loadable", names="CUDA initialization failure"):
        plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings("fp16", 1))


def test_a_timing_cache_of_another_gpu_is_set_aside(stand_in, tmp_path, caplog):
    (tmp_path / "timing").write_bytes(b"foreign")
    stand_in().config.accepts = False
    plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings("fp16", 1, timing_cache=tmp_path / "timing"))
    assert (tmp_path / "timing").read_bytes() == b"+"
    assert "another GPU or version" in caplog.text


@pytest.mark.parametrize(
    ("said", "error", "reason"),
    [
        ("Error Code 2: OutOfMemory (Requested", DeviceOutOfMemory, "out-of-memory"),
        ("no kernel", ExportFailed, "not-buildable"),
    ],
)
def test_a_build_that_fails_gives_the_reason(stand_in, tmp_path, said, error, reason):
    stand_in(plan=None, said=said)
    with raises_reason(error, reason, names=said):
        plan_from_onnx("tensorrt", b"g", tmp_path / "p", PlanSettings("fp16", 1))
    assert not list(tmp_path.iterdir())
