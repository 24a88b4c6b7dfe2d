"""What every engine promises, for every engine, precision and device of this machine."""

from __future__ import annotations

import threading

import pytest
import torch
from monai.networks.nets import UNet

from ctflow.engines.choose import backends, open_engine
from ctflow.engines.contract import Engine
from ctflow.errors import BackendUnavailable, BundleInvalid
from ctflow.model import Model, ModelSpec, NetworkSpec

ROI = (32, 32, 32)
# Largest difference of logits to fp32 eager, relative to the largest logit.
TOLERANCE = {"fp32": 1e-5, "tf32": 1e-2, "bf16": 5e-2, "fp16": 1e-2}
ARGUMENTS = {
    "spatial_dims": 3,
    "in_channels": 1,
    "out_channels": 2,
    "channels": [8, 16, 32],
    "strides": [2, 2],
    "num_res_units": 1,
}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    network = UNet(**ARGUMENTS)
    spec = ModelSpec(
        "m", "1", NetworkSpec("UNet", ARGUMENTS), 1, 2, (), ROI, 0.25, "gaussian", 4, "softmax", None, (), "", False
    )
    return Model(spec, network.state_dict(), "d" * 64)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randn(4, 1, *ROI, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference(model, windows) -> torch.Tensor:
    network = UNet(**ARGUMENTS)
    network.load_state_dict(model.weights)
    with torch.inference_mode():
        return network.eval()(windows)


NAMES = [name for name, available, _ in backends() if available]
CPU = [pytest.param((name, "cpu", precision)) for name in NAMES for precision in ("fp32", "bf16")]
GPU = [
    pytest.param((name, "cuda:0", precision), marks=pytest.mark.gpu)
    for name in NAMES
    for precision in ("fp32", "tf32", "bf16", "fp16")
]


@pytest.fixture(params=[*CPU, *GPU], ids=str)
def engine(request, model):
    name, device, precision = request.param
    engine: Engine = open_engine(name, model, device=device, precision=precision, roi=ROI, batch_range=(1, 4))
    yield engine
    engine.close()


def test_logits_are_those_of_fp32_eager(engine, windows, reference):
    for count in (1, 3, 4):
        logits = engine.predict(windows[:count].to(engine.info.device))
        assert logits.dtype == torch.float32
        assert str(logits.device) == engine.info.device
        difference = (logits.cpu() - reference[:count]).abs().max() / reference.abs().max()
        assert difference <= TOLERANCE[engine.info.precision]


def test_the_same_windows_give_the_same_logits(engine, windows):
    batch = windows[:2].to(engine.info.device)
    assert torch.equal(engine.predict(batch).clone(), engine.predict(batch))


def test_it_says_what_it_is(engine, model):
    info = engine.info
    assert info.backend in NAMES
    assert info.roi == ROI
    assert info.batch_range == (1, 4)
    assert info.weights_digest == model.weights_digest
    assert info.versions["torch"] == torch.__version__


@pytest.mark.parametrize("shape", [(5, 1, *ROI), (0, 1, *ROI), (1, 1, 32, 32, 16), (1, *ROI)])
def test_another_batch_or_window_is_a_programming_mistake(engine, shape):
    with pytest.raises(ValueError, match="takes 1 to 4 windows"):
        engine.predict(torch.zeros(shape, device=engine.info.device))


def test_it_closes_twice_and_then_refuses(engine, windows):
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.predict(windows[:1].to(engine.info.device))


def test_two_engines_do_not_disturb_each_other(engine, model, windows):
    info = engine.info
    other = open_engine(info.backend, model, device=info.device, precision=info.precision, roi=ROI, batch_range=(1, 4))
    first = engine.predict(windows[:1].to(info.device)).clone()
    second = other.predict(windows[1:2].to(info.device)).clone()
    other.close()
    assert torch.equal(engine.predict(windows[:1].to(info.device)), first)
    assert not torch.equal(first, second)


def test_it_works_from_another_thread(engine, windows):
    batch = windows[:1].to(engine.info.device)
    expected, found = engine.predict(batch).clone(), []
    thread = threading.Thread(target=lambda: found.append(engine.predict(batch).clone()))
    thread.start()
    thread.join()
    assert torch.equal(found[0], expected)


def test_global_switches_stay_as_they_were(engine, windows):
    def switches():
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.deterministic

    before = switches()
    engine.predict(windows[:1].to(engine.info.device))
    assert switches() == before


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_precision_that_the_cpu_lacks_is_named(model, name, precision):
    with pytest.raises(BackendUnavailable, match=precision):
        open_engine(name, model, device="cpu", precision=precision, roi=ROI, batch_range=(1, 1))


@pytest.mark.parametrize("name", NAMES)
def test_a_window_that_the_network_cannot_take_is_the_bundles_fault(model, name):
    odd = (30, 32, 32)
    engine = open_engine(name, model, device="cpu", precision="fp32", roi=odd, batch_range=(1, 1))
    with pytest.raises(BundleInvalid, match="30, 32, 32"):
        engine.predict(torch.zeros(1, 1, *odd))
    engine.close()
