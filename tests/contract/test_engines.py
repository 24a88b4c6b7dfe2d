"""What every engine promises, for every engine, precision and device of this machine.

Most promises do not depend on the network, and a UNet stands for all; those about logits hold for each kind of network.
"""

from __future__ import annotations

import threading
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from monai.networks.nets import UNet

from ctflow.core.errors import BackendUnavailable, BundleInvalid
from ctflow.core.model import Model
from ctflow.engines.contract import PRECISIONS, Engine
from ctflow.engines.registry import BACKENDS, backend_module, open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import is_prepared, prepare_engine
from ctflow.networks.build import network_from_model
from model_support import SMALL, small_model, unet_model
from reasons import raises_reason

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
    return unet_model(ARGUMENTS, ROI)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randn(4, 1, *ROI, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def reference(model, windows) -> torch.Tensor:
    network = UNet(**ARGUMENTS)
    network.load_state_dict(model.weights)
    with torch.inference_mode():
        return network.eval()(windows)


def is_installed(name: str) -> bool:
    try:
        backend_module(name)
    except BackendUnavailable:
        return False
    return True


# "fused" computes few networks: test_fused.py.
NAMES = [name for name in BACKENDS if name != "fused" and is_installed(name)]


def computes(name: str, device: str, precision: str) -> bool:
    try:
        backend_module(name).check_settings(device, precision)
    except BackendUnavailable:
        return False
    return True


CPU = [
    pytest.param((name, "cpu", precision))
    for name in NAMES
    for precision in ("fp32", "bf16")
    if computes(name, "cpu", precision)
]
GPU = [
    pytest.param((name, "cuda:0", precision), marks=pytest.mark.gpu)
    for name in NAMES
    for precision in ("fp32", "tf32", "bf16", "fp16")
    if computes(name, "cuda:0", precision)
]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("engines")


def wanted(name: str, device: str, precision: str, cache: Path | None, roi=ROI, most: int = 4) -> EngineRequest:
    return EngineRequest(name, device, precision, roi, (1, most), cache)


@pytest.fixture(params=[*CPU, *GPU], ids=str)
def engine(request, model, cache_dir):
    name, device, precision = request.param
    choice = wanted(name, device, precision, cache_dir)
    # Makes its file the first time; random weights have labels that any rounding changes.
    prepare_engine(choice, model, logits_only=True)
    engine: Engine = open_engine(choice, model)
    yield engine
    engine.close()


def test_every_backend_computes_fp32_somewhere():
    for name in NAMES:
        assert any(computes(name, device, "fp32") for device in ("cpu", "cuda:0"))


@pytest.mark.parametrize("name", NAMES)
def test_what_auto_tries_is_what_a_backend_computes(name):
    module = backend_module(name)
    for device in module.DEVICES:
        assert module.precisions(device)
        for precision in module.precisions(device):
            assert precision in PRECISIONS
            module.check_settings(device, precision)


def test_logits_are_those_of_fp32_eager(engine, windows, reference):
    for count in (1, 3, 4):
        logits = engine.predict(windows[:count].to(engine.info.device))
        assert logits.dtype == torch.float32
        assert logits.shape == (count, engine.info.out_channels, *ROI)
        assert str(logits.device) == engine.info.device
        difference = (logits.cpu() - reference[:count]).abs().max() / reference.abs().max()
        assert difference <= TOLERANCE[engine.info.precision]


@pytest.mark.parametrize("network", SMALL)
@pytest.mark.parametrize("place", [*CPU, *GPU], ids=str)
def test_networks_of_each_kind(network, place, windows, cache_dir):
    """Their logits are those of fp32 eager, the same each time, and windows stay as they were."""
    name, device, precision = place
    windows = windows[:2]  # in bfloat16 a CPU takes seconds for one; other batches are tested above
    made, choice = small_model(network, ROI), wanted(name, device, precision, cache_dir)
    prepare_engine(choice, made, logits_only=True)
    with torch.inference_mode():
        expected = network_from_model(made)(windows)
    assert expected.std() > 0.01
    batch = windows.to(device)
    with closing(open_engine(choice, made)) as opened:
        logits = opened.predict(batch).clone()
        assert logits.dtype == torch.float32
        assert logits.shape == expected.shape == (2, made.spec.out_channels, *ROI)
        assert torch.equal(batch.cpu(), windows)
        assert torch.equal(opened.predict(batch), logits)
        alone = opened.predict(batch[1:]).cpu()
    largest = expected.abs().max()
    assert (logits.cpu() - expected).abs().max() / largest <= TOLERANCE[precision]
    assert (alone - expected[1:]).abs().max() / largest <= TOLERANCE[precision]


@pytest.mark.skipif(not is_installed("tensorrt-rtx"), reason="no TensorRT-RTX (pip install 'ctflow[tensorrt-rtx]')")
@pytest.mark.parametrize("network", SMALL)
def test_tensorrt_rtx_builds_a_plan_of_each_kind_without_a_gpu(network, tmp_path):
    choice = wanted("tensorrt-rtx", "cpu", "fp16", tmp_path, most=1)
    prepare_engine(choice, small_model(network, ROI), logits_only=True)
    (plan,) = (path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size > 10_000)
    assert is_prepared(choice, small_model(network, ROI))
    assert plan.stat().st_size > 10_000


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


def test_windows_that_do_not_lie_together_in_memory(engine, windows):
    scattered = torch.stack([windows[:2, 0], windows[:2, 0]], -1).to(engine.info.device)[..., 0].unsqueeze(1)
    assert not scattered.is_contiguous()
    expected = engine.predict(windows[:2].to(engine.info.device)).clone()
    assert torch.equal(engine.predict(scattered), expected)


def test_the_windows_stay_as_they_were(engine, windows):
    batch = windows[:2].to(engine.info.device)
    before = batch.clone()
    engine.predict(batch)
    assert torch.equal(batch, before)


def test_two_engines_do_not_disturb_each_other(engine, model, windows, cache_dir):
    info = engine.info
    other = open_engine(wanted(info.backend, info.device, info.precision, cache_dir), model)
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


ON_CPU = [name for name in NAMES if "cpu" in backend_module(name).DEVICES]
ON_GPU = [name for name in NAMES if "cpu" not in backend_module(name).DEVICES]


@pytest.mark.parametrize("precision", ["tf32", "fp16"])
@pytest.mark.parametrize("name", ON_CPU)
def test_a_precision_that_the_cpu_lacks_is_named(model, name, precision):
    with raises_reason(BackendUnavailable, "wrong-precision", names=precision):
        open_engine(wanted(name, "cpu", precision, None), model)


@pytest.mark.parametrize("name", ON_GPU)
def test_an_engine_of_gpus_says_so_on_a_cpu(model, name):
    with raises_reason(BackendUnavailable, "wrong-device", names="cpu"):
        open_engine(wanted(name, "cpu", "fp32", None), model)


@pytest.mark.parametrize("name", ON_CPU)
def test_a_window_that_the_network_cannot_take_is_the_bundles_fault(model, name, tmp_path):
    choice = wanted(name, "cpu", "fp32", tmp_path, roi=(30, 32, 32), most=1)
    with raises_reason(BundleInvalid, "window-size", names="30, 32, 32"):
        prepare_engine(choice, model)
        engine = open_engine(choice, model)
        engine.predict(torch.zeros(1, 1, *choice.roi))
    assert not list(tmp_path.glob("*/*"))


@pytest.mark.parametrize("name", [name for name in ON_CPU if backend_module(name).FILE is not None])
@pytest.mark.parametrize("known", [True, False])
def test_an_engine_without_its_file_says_how_to_make_it(model, name, known, tmp_path):
    choice = wanted(name, "cpu", "fp32", tmp_path if known else None)
    with raises_reason(BackendUnavailable, "not-exported", names="ctflow export"):
        open_engine(choice, model)
    # auto goes on to the next that can start at once.
    assert open_engine(replace(choice, backend="auto"), model).info.backend == "eager"


def test_auto_takes_the_first_whose_file_is_there(model, tmp_path):
    for name in ON_CPU:
        prepare_engine(wanted(name, "cpu", "fp32", tmp_path), model)
    assert open_engine(wanted("auto", "cpu", "fp32", tmp_path), model).info.backend == ON_CPU[0]
