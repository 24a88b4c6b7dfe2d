from __future__ import annotations

import logging

import pytest
import torch
from monai.networks.nets import SwinUNETR, UNet

from ctflow.bundle.locate import demonstration_bundle
from ctflow.bundle.read import read_bundle
from ctflow.core.errors import BackendUnavailable, BundleInvalid, ExportFailed, ParityFailed, SettingsInvalid
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines.onnxfile import onnx_key
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.store import EngineStore
from ctflow.export import onnx as onnx_module
from ctflow.export.onnx import onnx_from_model
from ctflow.export.parity import check_parity
from ctflow.export.prepare import prepare_engine
from ctflow.networks.build import network_from_model
from reasons import raises_reason

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
ROI = (64, 32, 32)
SWIN = {"in_channels": 1, "out_channels": 2, "feature_size": 12}
UNET = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]}


def model_of(name: str, arguments: dict, activation: str = "softmax") -> Model:
    torch.manual_seed(0)
    network = {"SwinUNETR": SwinUNETR, "UNet": UNet}[name](**arguments)
    spec = ModelSpec(
        "m", "1", NetworkSpec(name, arguments), 1, arguments["out_channels"], (), ROI, 0.25, "gaussian", 4, activation,
        None if activation == "softmax" else 0.5, (), "", False,
    )  # fmt: skip
    return Model(spec, network.state_dict(), "d" * 64)


@pytest.fixture(scope="module")
def swin() -> Model:
    return model_of("SwinUNETR", SWIN)


def run(path, windows: torch.Tensor) -> torch.Tensor:
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"windows": windows.numpy()})[0])


def noise(batch: int) -> torch.Tensor:
    return torch.rand(batch, 1, *ROI, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def of_two(swin, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    onnx_from_model(swin, ROI, batch=2, path=path)
    return path


def test_the_file_computes_what_the_model_does_at_its_batch(swin, of_two):
    with torch.inference_mode():
        expected = network_from_model(swin)(noise(2))
    found = run(of_two, noise(2))
    expected = expected[:, 1:2] - expected[:, 0:1]
    assert found.shape == (2, 1, *ROI)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_file_names_no_place_and_recomputes_no_mask(of_two):
    data = of_two.read_bytes()
    assert b"/work" not in data
    assert b"site-packages" not in data
    graph = onnx.load_from_string(data).graph
    assert [node for node in graph.node if node.op_type.startswith("Scatter")] == []
    assert [value.name for value in graph.input] == ["windows"]
    assert [value.name for value in graph.output] == ["logits"]


@pytest.mark.exhaustive
def test_the_demonstration_model_is_small(tmp_path):
    model = read_bundle(demonstration_bundle())
    onnx_from_model(model, model.spec.roi, batch=1, path=tmp_path / "m.onnx")
    weights = sum(t.numel() * t.element_size() for t in model.weights.values() if t.is_floating_point())
    assert (tmp_path / "m.onnx").stat().st_size <= 1.5 * weights + 10_000_000


@pytest.mark.parametrize("name", ["UNet", pytest.param("SwinUNETR", marks=pytest.mark.exhaustive)])
def test_exporting_is_silent_and_always_gives_the_same_file(name, tmp_path, capfd, caplog, recwarn):
    model = model_of(name, {"UNet": UNET, "SwinUNETR": SWIN}[name])
    for file in ("1.onnx", "2.onnx"):
        onnx_from_model(model, ROI, batch=1, path=tmp_path / file)
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"1.onnx", "2.onnx"}
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert not recwarn.list


def test_other_networks_keep_their_channels(tmp_path):
    model = model_of("UNet", UNET | {"num_res_units": 1, "out_channels": 3})
    onnx_from_model(model, ROI, batch=1, path=tmp_path / "m.onnx")
    with torch.inference_mode():
        expected = network_from_model(model)(noise(1))
    found = run(tmp_path / "m.onnx", noise(1))
    assert found.shape == (1, 3, *ROI)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("model", [model_of("UNet", UNET | {"num_res_units": 1}), model_of("SwinUNETR", SWIN)])
def test_a_window_that_the_network_does_not_take_is_named(model, tmp_path):
    with raises_reason(BundleInvalid, "window-size", names="31, 32, 32"):
        onnx_from_model(model, (31, 32, 32), batch=1, path=tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


class Odd(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_names_the_cause(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_module, "network_from_model", lambda _: Odd())
    with raises_reason(ExportFailed, "not-exportable", names=("UNet", "--engine eager")):
        onnx_from_model(model_of("UNet", UNET), ROI, batch=1, path=tmp_path / "m.onnx")


def test_absent_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(onnx_module, "find_spec", lambda name: None if name == "onnxscript" else 1)
    with raises_reason(BackendUnavailable, "not-installed", names="onnxscript"):
        onnx_from_model(model_of("UNet", UNET), ROI, batch=1, path=tmp_path / "m.onnx")


def choice(name, folder, precision="fp32", most=2) -> EngineRequest:
    return EngineRequest(name, "cpu", precision, ROI, (1, most), folder)


@pytest.mark.parametrize("kind", ["UNet", pytest.param("SwinUNETR", marks=pytest.mark.exhaustive)])
def test_preparing_makes_one_file_for_all_cpu_engines_and_says_so(kind, tmp_path):
    model = model_of(kind, {"UNet": UNET, "SwinUNETR": SWIN}[kind])
    told = []
    for name in ("onnxruntime", "openvino", "eager"):
        prepare_engine(choice(name, tmp_path), model, progress=lambda *args: told.append(args))
    assert told == [("prepare engine", 0, 1), ("prepare engine", 1, 1)]
    assert EngineStore(tmp_path).find(onnx_key(model, ROI))
    for name in ("onnxruntime", "openvino"):
        engine = open_engine(choice(name, tmp_path), model)
        assert engine.info.out_channels == {"UNet": 2, "SwinUNETR": 1}[kind]
        result = check_parity(engine, model, [noise(1), noise(1) * 2], logits_only=True)
        assert result.windows == 2
        assert result.relative_error < 1e-3
        engine.close()


def test_an_unknown_name_or_precision_is_refused(swin, tmp_path):
    with raises_reason(SettingsInvalid, "invalid-value", names="auto"):
        prepare_engine(choice("warp", tmp_path), swin)
    with raises_reason(BackendUnavailable, "wrong-precision", names="fp16"):
        prepare_engine(choice("openvino", tmp_path, "fp16"), swin)


class Wrong:
    """An engine that is off by a part of its logits."""

    def __init__(self, engine, wrong) -> None:
        self._engine, self._wrong, self.info = engine, wrong, engine.info

    def predict(self, windows):
        return self._wrong(self._engine.predict(windows))


@pytest.mark.parametrize(
    "wrong", [lambda t: t * 1.1, lambda t: t.flip(1), lambda t: t * torch.nan, lambda t: t + 0.1], ids=range(4)
)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_a_wrong_engine_fails_parity(activation, wrong):
    model = model_of("UNet", UNET, activation)
    engine = open_engine(choice("eager", None), model)
    assert check_parity(engine, model, [noise(1)]).dice == 1.0
    with raises_reason(ParityFailed, "differs", names="eager fp32"):
        check_parity(Wrong(engine, wrong), model, [noise(1)])
    with pytest.raises(ValueError, match="at least one"):
        check_parity(engine, model, [])


def test_an_engine_that_is_wrong_in_a_full_batch_only_fails_parity():
    model = model_of("UNet", UNET)
    engine = open_engine(choice("eager", None, most=3), model)

    def last_of_a_full_batch(logits):
        logits = logits.clone()
        if len(logits) == 3:
            logits[2] = logits[2].roll(1, -1)
        return logits

    with raises_reason(ParityFailed, "differs", names="eager fp32"):
        check_parity(Wrong(engine, last_of_a_full_batch), model, [noise(1)])
    assert check_parity(engine, model, [noise(1)]).relative_error < 1e-3
