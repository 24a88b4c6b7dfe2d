from __future__ import annotations

import contextlib
import threading

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet
from torch import nn

from ctflow.core.errors import BackendUnavailable, BundleInvalid, DeviceOutOfMemory, ExportFailed
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import compile as backend
from ctflow.engines import cudagraph
from ctflow.engines.compile import CompileEngine, network_for_gpu
from ctflow.engines.contract import EngineInfo
from ctflow.engines.request import EngineRequest
from reasons import raises_reason

ROI = (16, 16, 16)
UNET = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [4, 8, 16],
    "strides": [2, 2],
    "num_res_units": 1,
}
SWIN = {"in_channels": 1, "out_channels": 2, "feature_size": 12}


def model_of(name: str, arguments: dict, roi=ROI, activation="softmax") -> Model:
    torch.manual_seed(0)
    network = {"UNet": UNet, "SwinUNETR": SwinUNETR}[name](**arguments)
    spec = ModelSpec(
        "m", "1", NetworkSpec(name, arguments), 1, 2, (), roi, 0.25, "gaussian", 4, activation, None, (), "", False
    )
    return Model(spec, network.state_dict(), "d" * 64)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of("UNet", UNET)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randn(4, 1, *ROI, generator=torch.Generator().manual_seed(1))


def as_it_is(function):
    return function


def engine_of(network, channels=2, precision="fp32", compiler="aot_eager", roi=ROI) -> CompileEngine:
    info = EngineInfo("compile", precision, "cpu", roi, (1, 4), "d" * 64, channels)
    return CompileEngine(network, info, backend=compiler, kept=as_it_is)


@pytest.fixture
def engine(model):
    engine = engine_of(*network_for_gpu(model, ROI, "fp32"))
    yield engine
    engine.close()


def plain(model, windows):
    network = UNet(**UNET).eval()
    network.load_state_dict(model.weights)
    with torch.inference_mode():
        return network(windows)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_logits_are_those_of_the_network(model, windows, compiler):
    engine = engine_of(*network_for_gpu(model, ROI, "fp32"), compiler=compiler)
    for count in (1, 3, 4, 3):
        logits = engine.predict(windows[:count])
        assert logits.shape == (count, engine.info.out_channels, *ROI)
        torch.testing.assert_close(logits, plain(model, windows[:count]), rtol=1e-4, atol=1e-5)
        assert not logits.requires_grad
        assert not logits.is_inference()


def test_a_caller_in_inference_mode_changes_nothing(engine, windows):
    expected = engine.predict(windows).clone()
    with torch.inference_mode():
        inference = windows.clone()
        assert torch.equal(engine.predict(inference), expected)
        assert torch.equal(engine.predict(inference[:2]), expected[:2])


def test_half_precision(model, windows):
    network, channels = network_for_gpu(model, ROI, "bf16")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    logits = engine_of(network, channels, "bf16").predict(windows)
    expected = plain(model, windows)
    assert logits.dtype == torch.float32
    assert (logits - expected).abs().max() <= 5e-2 * expected.abs().max()


def test_a_model_that_is_not_folded_keeps_its_channels():
    network, channels = network_for_gpu(model_of("UNet", UNET, activation="sigmoid"), ROI, "fp32")
    assert channels == 2
    with torch.inference_mode():
        assert network(torch.zeros(1, 1, *ROI)).shape[1] == 2


def test_a_swin_unetr_is_rewritten():
    network, channels = network_for_gpu(model_of("SwinUNETR", SWIN, (32, 32, 32)), (32, 32, 32), "tf32")
    assert channels == 1
    assert type(network.swinViT).__name__ == "FixedTransformer"
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_each_size_is_compiled_once_beyond_torchs_own_limit(windows):
    compiled = []

    def compiler(graph, examples):
        compiled.append([tuple(example.shape) for example in examples])
        return graph.forward

    class Small(nn.Module):
        def forward(self, x):
            return x * 2

    info = EngineInfo("compile", "fp32", "cpu", ROI, (1, 20), "d" * 64, 1)
    engine = CompileEngine(Small(), info, backend=compiler, kept=as_it_is)
    for count in range(1, 15):
        assert len(engine.predict(torch.ones(count, 1, *ROI))) == count
    assert len(compiled) == 14


def test_the_same_windows_give_the_same_logits_and_stay_as_they_were(engine, windows):
    before = windows.clone()
    assert torch.equal(engine.predict(windows).clone(), engine.predict(windows))
    assert torch.equal(windows, before)


def test_it_works_from_threads_and_beside_another_engine(model, engine, windows):
    other = engine_of(*network_for_gpu(model, ROI, "fp32"))
    found = {}

    def work(name, engine, given):
        found[name] = engine.predict(given).clone()

    threads = [
        threading.Thread(target=work, args=("a", engine, windows[:1])),
        threading.Thread(target=work, args=("b", other, windows[1:3])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    other.close()
    torch.testing.assert_close(found["a"], plain(model, windows[:1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["b"], plain(model, windows[1:3]), rtol=1e-4, atol=1e-5)
    assert torch.equal(engine.predict(windows[:1]), found["a"])


def test_global_switches_are_set_inside_and_put_back(windows):
    def switches():
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic

    before, seen = switches(), []

    class Watched(nn.Module):
        @torch.compiler.disable
        def forward(self, x):
            seen.append(switches())
            return x

    engine = engine_of(Watched(), precision="tf32")
    engine.predict(windows)
    engine.predict(windows)
    assert seen == [(True, True, True)] * 2
    assert switches() == before


@pytest.mark.parametrize("shape", [(5, 1, *ROI), (0, 1, *ROI), (1, 1, 16, 16, 8), (1, *ROI)])
def test_another_batch_or_window_is_a_programming_mistake(engine, shape):
    with pytest.raises(ValueError, match="takes 1 to 4 windows"):
        engine.predict(torch.zeros(shape))


def test_it_closes_twice_and_then_refuses(engine, windows):
    engine.predict(windows)
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.predict(windows)


def failing(error):
    def compiler(graph, examples):
        raise error

    return compiler


class TritonMissing(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "expected", "reason", "names"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory, "out-of-memory", "4 windows"),
        (
            RuntimeError("no lowering for aten.strange\nmore"),
            ExportFailed,
            "not-compilable",
            "no lowering for aten.strange",
        ),
        (AssertionError(), ExportFailed, "not-compilable", "AssertionError"),
        (
            RuntimeError("Failed to find C compiler."),
            BackendUnavailable,
            "compiler-failed",
            "Failed to find C compiler",
        ),
        (
            TritonMissing("Cannot find a working triton"),
            BackendUnavailable,
            "compiler-failed",
            "Cannot find a working triton",
        ),
    ],
)
def test_what_the_compiler_cannot_do_has_a_name(model, windows, error, expected, reason, names):
    engine = engine_of(*network_for_gpu(model, ROI, "fp32"), compiler=failing(error))
    for _ in range(2):  # nothing of a failure is kept
        with raises_reason(expected, reason, names=names):
            engine.predict(windows)
    assert not backend._COMPILING.locked()


@pytest.mark.parametrize(("side", "named"), [(14, "(14, 16, 16)"), (15, "(16, 16, 16)")])
def test_a_window_that_the_network_cannot_take_is_the_bundles_fault(model, side, named):
    roi = (side, 16, 16)
    with raises_reason(BundleInvalid, "window-size", names=named):
        engine_of(*network_for_gpu(model, roi, "fp32"), roi=roi).predict(torch.zeros(1, 1, *roi))


@pytest.mark.parametrize(("has_gpu", "remedy"), [(False, "--engine auto"), (True, "--device cuda")])
def test_the_cpu_is_refused(model, monkeypatch, has_gpu, remedy):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    with raises_reason(BackendUnavailable, "wrong-device", names=("compile", "cpu", remedy)):
        backend.open_backend(EngineRequest("compile", "cpu", "fp16", ROI, (1, 4)), model)
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        backend.check_settings("cuda:1", precision)
    assert backend.precisions("cuda:0") == ("fp16",)
    assert (backend.FILE, backend.DEVICES) == (None, ("cuda",))


@pytest.mark.parametrize(
    ("gpu", "triton", "available", "match"),
    [(False, True, False, "NVIDIA GPU"), (True, False, False, "pip install triton"), (True, True, True, "torch 2")],
)
def test_what_is_missing_is_named(monkeypatch, gpu, triton, available, match):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backend, "find_spec", lambda _: object() if triton else None)
    found, reason = backend.is_available()
    assert found is available
    assert match in reason


class Graph:
    """As torch.cuda.CUDAGraph: what was launched while it was captured, and again at each replay."""

    def __init__(self):
        self.launched = []

    def replay(self):
        for launch in self.launched:
            launch()

    def pool(self):
        return "pool"


@pytest.fixture
def captures(monkeypatch):
    """CUDA graphs of functions that write into their result when they are launched, without a GPU."""
    made = []

    def capture(run, pool=None):
        graph, answer = Graph(), run()
        graph.launched.append(lambda: answer.copy_(run()))
        made.append((pool, answer))
        return graph, answer.fill_(torch.nan)  # a capture computes nothing

    monkeypatch.setattr(cudagraph, "capture", capture)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    return made


def test_each_shape_is_captured_once_and_graphs_share_memory(captures):
    function = cudagraph.CapturedFunction(lambda x: x + 1)
    for given in (torch.ones(2, 3), torch.zeros(2, 3), torch.ones(3, 2).T, torch.full((1, 3), 4.0)):
        assert torch.equal(function(given), given + 1)
    assert [pool for pool, _ in captures] == [None, "pool"]
    assert function(torch.ones(2, 3)) is captures[0][1]


def test_the_engine_replays_its_graphs(model, windows, captures):
    network, channels = network_for_gpu(model, ROI, "fp32")
    info = EngineInfo("compile", "fp32", "cpu", ROI, (1, 4), "d" * 64, channels)
    engine = CompileEngine(network, info, backend="eager")
    for count in (4, 2, 4):
        with torch.inference_mode():
            logits = engine.predict(windows[:count].clone())
        torch.testing.assert_close(logits, plain(model, windows[:count]), rtol=1e-4, atol=1e-5)
    assert len(captures) == 2
