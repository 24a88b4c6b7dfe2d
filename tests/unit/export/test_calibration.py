from __future__ import annotations

import dataclasses

import pytest
import torch

from ctflow.core.errors import BundleInvalid, NetworkNotTaken
from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import fused
from ctflow.engines.request import EngineRequest
from ctflow.engines.store.calibration import read_calibration
from ctflow.engines.store.store import EngineStore
from ctflow.export import calibration, prepare
from ctflow.export.calibration import calibration_from_phantom
from ctflow.kernels import convolution_fp8
from ctflow.networks.build import network_from_spec
from reasons import raises_reason

ROI = (64, 32, 32)
CHANNELS = ((48, 48),)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = NetworkSpec("SwinUNETR", {"in_channels": 1, "out_channels": 2, "feature_size": 48})
    spec = ModelSpec("m", "1", network, 1, 2, (), ROI, 0.25, "gaussian", 4, "softmax", None, (), "", False)
    return Model(spec, network_from_spec(network).state_dict(), "d" * 64)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Convolutions of small windows, and a window of noise."""
    monkeypatch.setattr(convolution_fp8, "_LEAST_SIDE", 32)
    generator = torch.Generator().manual_seed(1)
    windows = [torch.rand(1, 1, *ROI, generator=generator)]
    monkeypatch.setattr(calibration, "example_windows", lambda model, roi: windows)


def request_of(cache=None) -> EngineRequest:
    return EngineRequest("fused", "cuda:0", "fp8", ROI, (1, 4), cache)


def test_it_is_the_same_each_time_and_follows_the_weights(model):
    made = calibration_from_phantom(request_of(), model)
    assert made.channels == CHANNELS
    assert [len(each) for each in made.largest] == [2]
    assert calibration_from_phantom(request_of(), model) == made
    weights = dict(model.weights)
    name = "decoder1.transp_conv.conv.weight"
    scaled = dataclasses.replace(model, weights={**weights, name: 16 * weights[name]})
    found = calibration_from_phantom(request_of(), scaled)
    assert found.largest[0][0] == pytest.approx(16 * made.largest[0][0], rel=1e-3)
    assert found.exponents[0][0] == made.exponents[0][0] - 4
    assert found.exponents[0][1] == made.exponents[0][1]


def test_it_is_made_once_and_kept_beside_the_kernels(model, tmp_path, monkeypatch):
    monkeypatch.setattr(fused, "compile_forms", lambda forms, target, processes: {})
    monkeypatch.setattr(fused, "_BATCHES", (1, 1))
    asked = []

    def measured(request, model):
        asked.append(request.precision)
        return calibration_from_phantom(request, model)

    monkeypatch.setattr(prepare, "calibration_from_phantom", measured)
    for _ in range(2):
        prepare.prepare_engine(request_of(tmp_path), model)
    assert asked == ["fp8"]
    kinds = sorted(entry.key.kind for entry in EngineStore(tmp_path).entries() if entry.key and entry.state == "ready")
    assert kinds == ["calibration", "cubins"]
    path = EngineStore(tmp_path).find(fused.calibration_key(request_of(), model))
    assert read_calibration(path, CHANNELS) == calibration_from_phantom(request_of(), model)
    prepare.prepare_engine(dataclasses.replace(request_of(tmp_path), precision="fp16"), model)
    assert asked == ["fp8"]


def test_a_network_whose_values_are_not_finite_is_refused(model):
    weights = {**model.weights, "encoder1.layer.conv1.conv.weight": torch.full((48, 1, 3, 3, 3), torch.inf)}
    with raises_reason(BundleInvalid, "output-not-finite", names="fp8"):
        calibration_from_phantom(request_of(), dataclasses.replace(model, weights=weights))


def test_a_network_without_such_convolutions_is_refused(model, monkeypatch):
    monkeypatch.setattr(convolution_fp8, "_LEAST_SIDE", 48)
    with raises_reason(NetworkNotTaken, "network-not-taken"):
        calibration_from_phantom(request_of(), model)
