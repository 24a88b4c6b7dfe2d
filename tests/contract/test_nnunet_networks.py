"""The networks of nnU-Net on every engine of a CPU: the mean of two folds, against PyTorch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import nnunet_support as nnunet
from ctflow.bundle import read_bundle
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.networks.build import network_from_model

ARCHITECTURES = {"PlainConvUNet": nnunet.PLAIN, "ResidualEncoderUNet": nnunet.residual()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nnunet") / request.param
    return read_bundle(nnunet.untrained(folder, nnunet.plans(ARCHITECTURES[request.param]), nnunet.dataset(), folds=2))


@pytest.mark.parametrize("backend", ["eager", "openvino", "onnxruntime"])
def test_logits_are_those_of_pytorch(model, backend, tmp_path):
    windows = torch.randn(2, 1, *model.spec.roi, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = network_from_model(model)(windows)
    wanted = EngineRequest(backend, "cpu", "fp32", model.spec.roi, (1, 2), tmp_path)
    prepare_engine(wanted, model, logits_only=True)
    engine = open_engine(wanted, model)
    try:
        for count in (1, 2):
            found = engine.predict(windows[:count])
            assert (found - expected[:count]).abs().max() <= 1e-4 * expected.abs().max()
    finally:
        engine.close()


def test_one_fold_of_two_classes_gives_one_channel(tmp_path):
    """The last layer is folded to the difference of the two logits, as for any network of MONAI."""
    labels = {"background": 0, "liver": 1}
    model = read_bundle(nnunet.untrained(tmp_path / "two", nnunet.plans(), nnunet.dataset(labels)))
    windows = torch.randn(1, 1, *model.spec.roi, generator=torch.Generator().manual_seed(0))
    logits = network_from_model(model)(windows)
    wanted = EngineRequest("onnxruntime", "cpu", "fp32", model.spec.roi, (1, 1), tmp_path / "cache")
    prepare_engine(wanted, model, logits_only=True)
    engine = open_engine(replace(wanted), model)
    try:
        found = engine.predict(windows)
    finally:
        engine.close()
    assert found.shape[1] == 1
    assert torch.allclose(found, logits[:, 1:2] - logits[:, :1], atol=1e-3)
