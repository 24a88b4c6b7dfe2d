from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import subprocess

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet

from ctflow.core.errors import (
    BackendUnavailable,
    DeviceOutOfMemory,
    EngineMismatch,
    NetworkNotTaken,
    NotWritten,
    ParityFailed,
)
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import fused, registry
from ctflow.engines.contract import EngineInfo, check_supported
from ctflow.engines.fused import FusedEngine
from ctflow.engines.request import EngineRequest
from ctflow.engines.store import store
from ctflow.engines.store.calibration import Calibration, write_calibration
from ctflow.engines.store.store import EngineStore
from ctflow.export.parity import check_parity, reference_logits
from ctflow.export.prepare import prepare_engine, prepare_to_open
from ctflow.export.selection import choose_fastest
from ctflow.kernels.machine_code.forms import TARGETS, Cubin, KernelTarget
from ctflow.kernels.machine_code.launch import KernelList
from ctflow.networks.build import network_from_spec
from ctflow.networks.channels_last.swin_unetr import ChannelsLastSwinUNETR
from ctflow.networks.head import fold_two_class_head
from ctflow.networks.operations import TorchOperations
from model_support import SMALL
from reasons import raises_reason

ROI = (64, 32, 32)
SWIN = {"in_channels": 1, "out_channels": 2, "feature_size": 12}
UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def model_of(name: str, arguments: dict) -> Model:
    torch.manual_seed(0)
    network = {"UNet": UNet, "SwinUNETR": SwinUNETR}[name](**arguments)
    spec = ModelSpec(
        "m", "1", NetworkSpec(name, arguments), 1, 2, (), ROI, 0.25, "gaussian", 4, "softmax", None, (), "", False
    )
    return Model(spec, network.state_dict(), "d" * 64)


def as_it_is(function):
    return function


@pytest.fixture(scope="module")
def network() -> SwinUNETR:
    torch.manual_seed(0)
    return SwinUNETR(**SWIN).eval().requires_grad_(False)


def engine_of(function, precision="fp32", channels=2) -> FusedEngine:
    info = EngineInfo("fused", precision, "cpu", ROI, (1, 4), "d" * 64, channels)
    return FusedEngine(function, info, kept=as_it_is)


def channels_last(network) -> ChannelsLastSwinUNETR:
    return ChannelsLastSwinUNETR(network, ROI, TorchOperations(torch.float32, "cpu"))


@pytest.fixture
def a_gpu(monkeypatch):
    """A machine whose GPU says that it is a Hopper."""
    capability = [(9, 0)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[0])
    return capability


def test_without_a_gpu_it_can_be_made_and_says_where_it_computes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fused.is_available()[0]
    ((available, reason),) = [rest for name, *rest in registry.backends() if name == "fused"]
    assert not available
    assert "it needs an NVIDIA GPU" in reason


def without(monkeypatch, missing):
    found = fused.find_spec
    monkeypatch.setattr(fused, "find_spec", lambda name: None if name == missing else found(name))


def test_without_the_drivers_bindings_it_says_what_to_install(a_gpu, monkeypatch):
    without(monkeypatch, "cuda.bindings")
    assert fused.is_available() == (False, "the package cuda-bindings is not installed: pip install cuda-bindings")


def test_without_triton_it_runs_stored_kernels(a_gpu, monkeypatch):
    without(monkeypatch, "triton")
    available, versions = fused.is_available()
    assert available
    assert versions.endswith("stored kernels only")


def test_with_all_it_needs_it_names_the_versions(a_gpu):
    available, versions = fused.is_available()
    assert available
    assert f"torch {torch.__version__}" in versions


def test_a_part_of_a_package_is_not_the_package(a_gpu, monkeypatch):
    def no_parent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(fused, "find_spec", no_parent)
    assert not fused.is_available()[0]


def test_another_gpu_is_named_where_engines_are_listed(a_gpu):
    a_gpu[0] = (7, 5)
    available, reason = fused.is_available()
    assert not available
    assert reason.endswith("12.x; found 7.5")


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("capability", [(8, 0), (8, 7), (9, 0), (10, 3), (12, 0)])
def test_a_gpu_that_kernels_are_made_for_computes(a_gpu, precision, capability):
    a_gpu[0] = capability
    assert fused.is_available()[0]
    fused.check_settings("cuda:0", precision)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_each_gpu_gets_its_own_kernels(a_gpu, compiled, tmp_path, target):
    """A file of kernels is of one compute capability, and no other GPU takes it."""
    a_gpu[0] = target.capability
    model = model_of("SwinUNETR", SWIN)
    assert fused.target_for("cuda:0") == target
    assert fused.cubins_key(request_of(), model).device == target.name
    prepare_engine(request_of(tmp_path), model)
    assert compiled.targets == [target]
    assert fused._cubins(request_of(tmp_path), model)
    assert len(compiled) == 1
    a_gpu[0] = (8, 6) if target.capability == (9, 0) else (9, 0)
    assert fused._cubins(request_of(tmp_path), model)
    assert compiled.targets == [target, fused.target_for("cuda:0")]


def test_without_a_gpu_a_file_is_made_for_an_h200(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fused.target_for("cuda:0").name == "compute capability 9.0"


def test_an_h200_computes_with_the_kernels_of_other_gpus_where_that_is_asked_for(a_gpu):
    own = fused.target_for("cuda:0")
    with fused.portable_kernels():
        assert fused.target_for("cuda:0") == KernelTarget((9, 0), portable=True)
        assert fused.cubins_key(request_of(), model_of("SwinUNETR", SWIN)).device.endswith(", portable kernels")
    assert fused.target_for("cuda:0") == own
    assert not own.portable


def test_another_gpu_is_named(a_gpu):
    a_gpu[0] = (7, 5)
    with raises_reason(BackendUnavailable, "wrong-gpu", names=("9.0", "cuda:0", "7.5")):
        fused.check_settings("cuda:0", "fp16")


def test_tf32_is_refused(a_gpu):
    with raises_reason(BackendUnavailable, "wrong-precision", names="tf32"):
        fused.check_settings("cuda:0", "tf32")


def test_another_network_is_refused(a_gpu):
    with raises_reason(NetworkNotTaken, "network-not-taken", names=("SwinUNETR", "UNet")):
        registry.open_engine(EngineRequest("fused", "cuda:0", None, ROI, (1, 4)), model_of("UNet", UNET))


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"members": 2}, "an ensemble of 2"), ({"arguments": {"nonlin": "torch.nn.ReLU"}}, "its activation is ReLU")],
    ids=str,
)
def test_why_one_of_nnunets_networks_is_not_taken_is_said(a_gpu, changed, named):
    known = SMALL["PlainConvUNet"]
    arguments = {**known.arguments, **changed.get("arguments", {})}
    network = dataclasses.replace(known, **{**changed, "arguments": arguments})
    model = model_of("UNet", UNET)
    spec = dataclasses.replace(model.spec, network=network, out_channels=3)
    model = dataclasses.replace(model, spec=spec, weights=network_from_spec(network).state_dict())
    with raises_reason(NetworkNotTaken, "network-not-taken", names=(named, "PlainConvUNet")):
        registry.open_engine(EngineRequest("fused", "cuda:0", None, ROI, (1, 4)), model)


def test_auto_tries_it_before_every_other_engine_of_a_gpu():
    assert registry.backend_names("auto", "cuda:0")[0] == "fused"
    assert "fused" not in registry.backend_names("auto", "cpu")


def test_auto_steps_down_where_it_cannot_be_opened_or_is_not_to_be_taken(monkeypatch):
    model = model_of("UNet", UNET)

    def fails(*arguments, **settings):
        raise BackendUnavailable("no compiler", reason="device-failed")

    eager = registry._load("eager")
    monkeypatch.setattr(registry, "BACKENDS", {"first": "x", "eager": "ctflow.engines.eager"})
    broken = type("Broken", (), {"DEVICES": ("cpu",), "FILE": None})
    broken.is_available = staticmethod(lambda: (True, ""))
    broken.precisions = staticmethod(lambda device: ("fp32",))
    broken.open_backend = staticmethod(fails)
    monkeypatch.setattr(registry, "_load", lambda name: broken if name == "first" else eager)
    first, auto = (EngineRequest(name, "cpu", None, ROI, (1, 1)) for name in ("first", "auto"))
    assert registry.open_engine(auto, model).info.backend == "eager"
    with raises_reason(BackendUnavailable, "device-failed"):
        registry.open_engine(first, model)
    broken.open_backend = staticmethod(lambda *_, **__: "an engine")
    assert registry.open_engine(auto, model) == "an engine"
    assert registry.open_engine(auto, model, without={"first"}).info.backend == "eager"


def test_it_gives_the_networks_logits(network):
    engine = engine_of(channels_last(network))
    windows = torch.rand(2, 1, *ROI)
    with torch.inference_mode():
        expected = network(windows)
    assert torch.allclose(engine.predict(windows), expected, atol=1e-5 * float(expected.abs().max()))


@functools.cache
def windows_and_logits():
    windows = [torch.rand((1, 1, *ROI), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    return windows, reference_logits(model_of("SwinUNETR", SWIN), windows, "cpu")


def compared(function, channels=2):
    """What the one gate finds of an engine; the network's weights are random, so that logits alone are judged."""
    (windows, expected), model = windows_and_logits(), model_of("SwinUNETR", SWIN)
    with torch.no_grad():
        return check_parity(
            engine_of(function, channels=channels), model, windows, expected=expected, batch=2, logits_only=True
        )


def test_parity_passes_what_is_right(network):
    assert compared(channels_last(network)).relative_error < 1e-5


def test_parity_of_one_channel_is_with_the_difference_of_both(network):
    one, folded = fold_two_class_head(network, model_of("SwinUNETR", SWIN).spec, probe=False)
    assert folded
    function = channels_last(one)
    assert compared(function, channels=1).relative_error < 1e-5
    with raises_reason(ParityFailed, "differs"):
        compared(lambda windows: -function(windows), channels=1)


@pytest.mark.parametrize("wrong", [lambda logits: logits * 1.01, lambda logits: logits * float("nan")])
def test_parity_refuses_what_is_wrong(network, wrong):
    function = channels_last(network)
    with raises_reason(ParityFailed, "differs", names="--engine eager"):
        compared(lambda windows: wrong(function(windows)))


def test_parity_refuses_what_mixes_windows_up(network):
    function = channels_last(network)
    with raises_reason(ParityFailed, "differs"):
        compared(lambda windows: function(windows).flip(0))


def request_of(cache=None, batch=4, precision="fp16") -> EngineRequest:
    return EngineRequest("fused", "cuda:0", precision, ROI, (1, batch), cache)


@pytest.fixture
def compiled(monkeypatch):
    """Which forms are compiled, and for what, by a stand-in for the compilers."""

    class Asked(list):
        targets = ()

    asked = Asked()

    def compile_forms(forms, target, processes):
        asked.append(list(forms))
        asked.targets = [*asked.targets, target]
        return {form.key: Cubin(b"code", form.name, 128, 0, 2, "triton 1.2") for form in asked[-1]}

    monkeypatch.setattr(fused, "compile_forms", compile_forms)
    return asked


def test_its_kernels_are_listed_without_a_gpu(compiled):
    """The network is run on torch's device without memory: every batch up to the largest that `auto` times."""
    fused.compile_cubins(request_of(), model_of("SwinUNETR", SWIN))
    names = {form.name for form in compiled[0]}
    tokens = {"attend_windows", "compute_tokens", "merge_tokens", "normalize_tokens"}
    assert tokens | {"add_channel", "norm_from_sums", "spread_neighbours", "upsample"} <= names
    few = {form.key for form in compiled[0]}
    fused.compile_cubins(request_of(precision="bf16"), model_of("SwinUNETR", SWIN))
    assert few.isdisjoint(form.key for form in compiled[1] if form.name == "attend_windows")


@pytest.mark.parametrize("multiprocessors", [132, 114, 78, 100])
def test_stored_kernels_serve_every_hopper(compiled, monkeypatch, multiprocessors):
    fused.compile_cubins(request_of(), model_of("SwinUNETR", SWIN))
    monkeypatch.setattr(fused, "_MULTIPROCESSORS", (multiprocessors,))
    fused.compile_cubins(request_of(), model_of("SwinUNETR", SWIN))
    assert {form.key for form in compiled[1]} <= {form.key for form in compiled[0]}


def test_stored_kernels_are_taken_whatever_the_weights(compiled, tmp_path, monkeypatch):
    model = model_of("SwinUNETR", SWIN)
    prepare_engine(request_of(tmp_path), model)
    assert len(compiled) == 1
    retrained = dataclasses.replace(model, weights_digest="e" * 64)
    assert set(fused._cubins(request_of(tmp_path), retrained)) == {form.key for form in compiled[0]}
    assert len(compiled) == 1
    monkeypatch.setattr(store, "INSTALLED", tmp_path)  # as an image brings them, beside a cache that is empty
    assert fused._cubins(request_of(tmp_path / "empty"), model)
    assert len(compiled) == 1


def test_stale_and_damaged_kernels_are_compiled_anew(compiled, tmp_path, monkeypatch, caplog):
    model = model_of("SwinUNETR", SWIN)
    prepare_engine(request_of(tmp_path), model)
    with monkeypatch.context() as changed:
        changed.setattr(fused, "digest_of_package", lambda *names: "another")  # kernels of another version of ctflow
        assert fused._cubins(request_of(tmp_path), model)
    assert len(compiled) == 2
    (path,) = tmp_path.glob("cubins-*/engine.cubins")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert fused._cubins(request_of(tmp_path), model)
    assert len(compiled) == 3
    assert "stored kernels are not used" in caplog.text
    prepare_to_open(request_of(tmp_path), model)  # it is opened nevertheless
    with raises_reason(EngineMismatch, "stored-engine", names="remove that folder"):
        prepare_engine(request_of(tmp_path), model)


def test_a_damaged_cache_does_not_hide_what_the_installation_brings(compiled, tmp_path, monkeypatch):
    model = model_of("SwinUNETR", SWIN)
    for name in ("cache", "installed"):
        prepare_engine(request_of(tmp_path / name), model)
    monkeypatch.setattr(store, "INSTALLED", tmp_path / "installed")
    (path,) = (tmp_path / "cache").glob("cubins-*/engine.cubins")
    path.write_bytes(b"x")
    assert fused._cubins(request_of(tmp_path / "cache"), model)
    assert len(compiled) == 2
    (path,) = (tmp_path / "installed").glob("cubins-*/engine.cubins")
    path.write_bytes(b"x")
    with raises_reason(EngineMismatch, "stored-engine"):
        prepare_engine(request_of(tmp_path / "cache"), model)


def test_a_cache_that_cannot_be_written_does_not_stop_it(compiled, tmp_path):
    (tmp_path / "file").touch()
    request, model = request_of(tmp_path / "file" / "cache"), model_of("SwinUNETR", SWIN)
    with raises_reason(NotWritten, "unwritable"):
        prepare_engine(request, model)
    prepare_to_open(request, model)
    assert fused._cubins(request, model)


def test_a_failed_launch_at_opening_closes_it_and_is_told(a_gpu, compiled, monkeypatch):
    closed = []

    def close(engine):
        closed.append(engine)

    def fails(*arguments):
        raise RuntimeError("no such launch")

    monkeypatch.setattr(fused.FusedEngine, "launch", fails)
    monkeypatch.setattr(fused.FusedEngine, "close", close)
    monkeypatch.setattr(fused, "GpuKernels", lambda device, stored, target: KernelList(target))
    monkeypatch.setattr(fused, "channels_last_network", lambda *arguments: as_it_is)
    monkeypatch.setattr(fused, "_network", lambda request, model: (None, 1))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(fused, "compile_cubins", lambda request, model: {})
    with raises_reason(BackendUnavailable, "compiler-failed", names="no such launch"):
        registry.open_engine(request_of(), model_of("SwinUNETR", SWIN))
    assert len(closed) == 1


@pytest.mark.parametrize(
    ("raised", "named", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceOutOfMemory, "out-of-memory"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), BackendUnavailable, "device-failed"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), DeviceOutOfMemory, "out-of-memory"),
        (RuntimeError("Triton Error [CUDA]: invalid argument"), BackendUnavailable, "device-failed"),
        (subprocess.CalledProcessError(1, ["ptxas"]), BackendUnavailable, "compiler-failed"),
    ],
)
def test_errors_of_the_gpu_are_named(raised, named, reason):
    def fails(windows):
        raise raised

    with raises_reason(named, reason):
        engine_of(fails).predict(torch.rand(1, 1, *ROI))


def test_it_closes_twice(network):
    engine = engine_of(channels_last(network))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.launch(torch.rand(1, 1, *ROI))


# ------------------------------------------------------------------------------------------ eight bits

WIDE, WIDE_ROI = {**SWIN, "feature_size": 48}, (64, 64, 64)


@pytest.fixture(scope="module")
def wide() -> Model:
    model = model_of("SwinUNETR", WIDE)
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, roi=WIDE_ROI))


def request_of_fp8(cache=None, **changed) -> EngineRequest:
    return dataclasses.replace(EngineRequest("fused", "cuda:0", "fp8", WIDE_ROI, (1, 4), cache), **changed)


CHANNELS = ((48, 48),)  # of the convolution in e4m3
CALIBRATION = Calibration(CHANNELS, ((2.6, 8.9),))


def keep(calibration, request, model):
    EngineStore(request.folder).put(fused.calibration_key(request, model), lambda p: write_calibration(calibration, p))


@pytest.mark.parametrize("backend", ["eager", "compile", "tensorrt", "torch-tensorrt", "onnxruntime", "openvino"])
def test_another_engine_refuses_fp8_and_says_which_computes_it(a_gpu, backend):
    module = importlib.import_module(registry.BACKENDS[backend])
    with raises_reason(BackendUnavailable, "wrong-precision", names="--engine fused"):
        check_supported(backend, module.DEVICES[0], "fp8", module.DEVICES)
    if backend in ("eager", "compile"):
        with raises_reason(BackendUnavailable, "wrong-precision", names="--engine fused"):
            module.check_settings("cuda:0", "fp8")


def test_auto_never_takes_fp8(a_gpu, wide, tmp_path):
    assert all("fp8" not in precisions for _, precisions in registry.backends_for("cuda:0"))
    request = request_of_fp8(tmp_path, backend="auto")
    for ask in (registry.open_engine, choose_fastest):
        with raises_reason(BackendUnavailable, "wrong-precision", names="--engine fused"):
            ask(request, wide)


def test_fp8_on_another_gpu_is_refused(a_gpu, wide):
    a_gpu[0] = (8, 9)
    with raises_reason(BackendUnavailable, "wrong-gpu", names=("8.9", "fp8")):
        fused.check_settings("cuda:0", "fp8")
    with raises_reason(BackendUnavailable, "wrong-gpu", names=("H100, H200", "--precision fp16")):
        registry.open_engine(request_of_fp8(), wide)
    a_gpu[0] = (9, 0)
    fused.check_settings("cuda:0", "fp8")
    with fused.portable_kernels(), raises_reason(BackendUnavailable, "wrong-gpu", names="fp8"):
        fused.check_settings("cuda:0", "fp8")


def test_a_network_without_wide_convolutions_is_refused_in_fp8(a_gpu):
    narrow = model_of("SwinUNETR", SWIN)
    with raises_reason(NetworkNotTaken, "network-not-taken", names="--precision fp16"):
        registry.open_engine(dataclasses.replace(request_of(), precision="fp8"), narrow)


def test_fp8_without_a_calibration_says_how_to_make_one(a_gpu, wide, tmp_path):
    for cache in (None, tmp_path):
        with raises_reason(BackendUnavailable, "not-exported", names="ctflow export --engine fused --precision fp8"):
            registry.open_engine(request_of_fp8(cache), wide)


def test_a_calibration_belongs_to_its_weights_windows_and_preparation(wide, tmp_path):
    request = request_of_fp8(tmp_path)
    network = fused.eight_bit_network(request, wide)
    keep(CALIBRATION, request, wide)
    assert fused._calibration(request, wide, network) == CALIBRATION
    assert CALIBRATION.exponents == [[6, 4]]
    retrained = dataclasses.replace(wide, weights_digest="e" * 64)
    scaled = dataclasses.replace(wide, spec=dataclasses.replace(wide.spec, preprocessing=("another",)))
    larger = dataclasses.replace(request, roi=(96, 96, 96))
    for other, model in ((request, retrained), (request, scaled), (larger, wide)):
        with raises_reason(BackendUnavailable, "not-exported"):
            fused._calibration(other, model, network)


@pytest.mark.parametrize("damage", ["bytes", "manifest", "content", "network"])
def test_a_damaged_or_foreign_calibration_is_refused(wide, tmp_path, damage):
    request = request_of_fp8(tmp_path)
    network = fused.eight_bit_network(request, wide)
    made = Calibration(((32, 32),), CALIBRATION.largest) if damage == "network" else CALIBRATION
    keep(made, request, wide)
    (path,) = tmp_path.glob("calibration-*/engine.calibration")
    if damage == "bytes":
        path.write_bytes(path.read_bytes().replace(b"2.6", b"2.5"))
    elif damage == "manifest":
        manifest = path.with_name("manifest.json")
        manifest.write_text(manifest.read_text().replace("d" * 64, "e" * 64))
    elif damage == "content":
        EngineStore(tmp_path).find(fused.calibration_key(request, wide))
        text = path.read_text().replace("2.6", "-1")
        path.write_text(text)
        manifest = path.with_name("manifest.json")
        document = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**document, "sha256": hashlib.sha256(text.encode()).hexdigest()}))
    with raises_reason(EngineMismatch, "stored-engine", names="remove that folder"):
        fused._calibration(request, wide, network)


def test_kernels_of_fp8_are_listed_and_stored_without_a_calibration(compiled, wide, monkeypatch):
    monkeypatch.setattr(fused, "_BATCHES", (1, 2))
    fused.compile_cubins(request_of_fp8(), wide)
    fused.compile_cubins(request_of_fp8(precision="fp16"), wide)
    names = [{form.name for form in asked} for asked in compiled]
    assert "convolve_fp8" in names[0]
    assert "convolve" in names[0]  # the first layer
    assert "convolve_fp8" not in names[1]
