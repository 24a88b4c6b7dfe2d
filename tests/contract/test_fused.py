"""What every engine promises, for the one that computes few networks: sizes, batches, poisoned memory, threads.

On a Hopper GPU with its own kernels and with those of all other GPUs.
"""

from __future__ import annotations

import math
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import fused
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.kernels import attention
from ctflow.kernels.attention import CudaAttention
from ctflow.kernels.machine_code.forms import KernelTarget
from ctflow.kernels.machine_code.launch import GpuKernels
from ctflow.networks.build import network_from_model, network_from_spec
from ctflow.networks.operations import TorchOperations
from ctflow.networks.swin_windows import window_table
from model_support import small_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not fused.is_available()[0],
        reason="no GPU that kernels are made for, or no cuda-bindings",
    ),
]
DEVICE = "cuda:0"
CACHE: list[Path] = []
# Largest difference of logits to strict fp32, relative to the largest logit.
TOLERANCE = {"fp16": 2e-3, "bf16": 2e-2, "fp32": 1e-5}
UNET_TOLERANCE = {"fp16": 5e-3, "bf16": 4e-2, "fp32": 1e-5}  # deeper networks: in fp16 1.7e-3 was seen


def model_of(feature_size: int, roi: tuple[int, int, int], classes: int = 2) -> Model:
    torch.manual_seed(feature_size)
    network = NetworkSpec("SwinUNETR", {"in_channels": 1, "out_channels": classes, "feature_size": feature_size})
    return random_model(network, roi, classes)


def unet_of(name: str, features: list[int], roi: tuple[int, int, int], classes: int = 3) -> Model:
    """One of nnU-Net's networks with two convolutions or blocks a stage, and norms that are not what they begin as."""
    torch.manual_seed(len(features))
    stages = len(features)
    arguments = {
        "input_channels": 1, "num_classes": classes, "n_stages": stages, "features_per_stage": features,
        "conv_op": "torch.nn.Conv3d", "kernel_sizes": [[3] * 3] * stages,
        "strides": [[1] * 3, *[[2] * 3] * (stages - 1)],
        "conv_bias": True, "norm_op": "torch.nn.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True}, "n_conv_per_stage_decoder": [2] * (stages - 1),
        "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage": [2] * stages,
    }  # fmt: skip
    return random_model(
        NetworkSpec(f"dynamic_network_architectures.architectures.unet.{name}", arguments), roi, classes
    )


def random_model(network: NetworkSpec, roi: tuple[int, int, int], classes: int) -> Model:
    activation = "softmax" if classes == 2 else "sigmoid"
    spec = ModelSpec(
        "m", "1", network, 1, classes, (), roi, 0.25, "gaussian", 4, activation,
        None if classes == 2 else 0.5, (), "", False,
    )  # fmt: skip
    made = network_from_spec(network)
    for module in made.modules():
        if isinstance(module, nn.InstanceNorm3d) and module.affine:
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    return Model(spec, made.state_dict(), "d" * 64)


@pytest.fixture(scope="module", autouse=True, params=["own", "portable"])
def kernels(request, tmp_path_factory):
    """A folder for compiled kernels, which are the same for all weights of a network; and which kernels they are."""
    CACHE.append(tmp_path_factory.mktemp("kernels"))
    if request.param == "own":
        yield
        return
    if fused.target_for(DEVICE).portable:
        pytest.skip("this GPU has no others")
    with fused.portable_kernels():
        yield


def engine_of(model: Model, precision: str = "fp16", most: int = 16):
    request = EngineRequest("fused", DEVICE, precision, model.spec.roi, (1, most), CACHE[-1])
    prepare_engine(request, model, logits_only=True)  # random weights have labels that any rounding changes
    return open_engine(request, model)


def strict(model: Model, windows: torch.Tensor, *, folded: bool) -> torch.Tensor:
    """Logits of the original network in strict fp32, window by window."""
    network = network_from_model(model).to(DEVICE)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            logits = torch.cat([network(window[None]) for window in windows])
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    return logits[:, 1:] - logits[:, :1] if folded else logits


def error_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("feature_size", "roi"),
    [(48, (96, 96, 96)), (48, (64, 64, 64)), (48, (128, 128, 128)), (24, (96, 96, 96)), (24, (128, 64, 96)),
     (12, (96, 96, 96)), (12, (64, 64, 64)), (36, (64, 96, 64))],
    ids=str,
)  # fmt: skip
def test_logits_are_those_of_strict_fp32(feature_size, roi, precision):
    model = model_of(feature_size, roi)
    engine = engine_of(model, precision)
    windows = torch.rand(3, 1, *roi, device=DEVICE)  # fresh ones each time
    expected = strict(model, windows, folded=True)
    for count in (1, 3):
        logits = engine.predict(windows[:count])
        assert logits.dtype == torch.float32
        assert error_of(logits, expected[:count]) <= TOLERANCE[precision]
    engine.close()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(
    ("name", "features", "roi"),
    [("PlainConvUNet", [32, 64, 128, 256, 320, 320], (128, 128, 128)), ("PlainConvUNet", [32, 64, 80], (64, 96, 40)),
     ("PlainConvUNet", [16, 48, 64], (64, 64, 64)), ("ResidualEncoderUNet", [32, 64, 128], (128, 64, 96))],
    ids=str,
)  # fmt: skip
def test_logits_of_nnunets_networks_are_those_of_strict_fp32(name, features, roi, precision):
    model = unet_of(name, features, roi)
    engine = engine_of(model, precision, most=3)
    windows = torch.rand(3, 1, *roi, device=DEVICE)
    expected = strict(model, windows, folded=False)
    for count in (1, 3):
        assert error_of(engine.predict(windows[:count]), expected[:count]) <= UNET_TOLERANCE[precision]
    assert torch.equal(engine.predict(windows).clone(), engine.predict(windows))
    engine.close()


@pytest.mark.parametrize("name", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_kernels_and_strides_that_differ_between_axes(name):
    model = small_model(name, (32, 32, 32))
    engine = engine_of(model, "fp16", most=4)
    windows = torch.rand(4, 1, 32, 32, 32, device=DEVICE)
    assert error_of(engine.predict(windows), strict(model, windows, folded=False)) <= UNET_TOLERANCE["fp16"]
    engine.close()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize(
    ("size", "window", "shift", "heads", "width"),
    [((14, 14, 14), 7, 0, 3, 16), ((14, 15, 9), 7, 3, 3, 16), ((6, 6, 6), 7, 3, 24, 16), ((9, 10, 11), 4, 2, 2, 12),
     ((6, 7, 8), 3, 1, 5, 8), ((4, 4, 4), 2, 1, 1, 4), ((16, 8, 8), 8, 0, 2, 16)],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("held", ["as here", "as 8.6"])
def test_attention_within_windows_is_that_of_fp32(size, window, shift, heads, width, precision, held, monkeypatch):
    """One kernel alone, in memory that held NaN before; also in the parts into which less shared memory divides it."""
    dtype, worst = {"fp16": (torch.float16, 3e-3), "bf16": (torch.bfloat16, 2e-2)}[precision]
    target = fused.target_for(DEVICE)
    table = window_table(size, (window,) * 3, (shift,) * 3)
    n = math.prod(table.length)
    if held == "as 8.6":
        chosen, other = attention.attention_form, KernelTarget((8, 6))
        monkeypatch.setattr(attention, "attention_form", lambda *of, masks: chosen(*of[:4], other, masks=masks))
    if not CudaAttention.takes(n, width, dtype, target):
        pytest.skip("windows too large for this GPU's shared memory")
    bias = torch.randn(heads, n, n) * 2
    kernel = CudaAttention(bias, table, width, dtype, DEVICE, GpuKernels(DEVICE, target=target))
    reference = TorchOperations(torch.float32, DEVICE).attention(bias, table, width)
    for batch in (1, 3):
        qkv = torch.randn(batch, len(table.fetch), 3 * heads * width, device=DEVICE).to(dtype)
        torch.use_deterministic_algorithms(True)  # fills what is allocated with NaN
        try:
            found = kernel(qkv)
        finally:
            torch.use_deterministic_algorithms(False)
        assert error_of(found.float(), reference(qkv.float())) <= worst
        assert torch.equal(kernel(qkv), found)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of(48, (96, 96, 96), classes=3)


@pytest.fixture(scope="module")
def engine(model, kernels):
    engine = engine_of(model)
    yield engine
    engine.close()


@pytest.mark.parametrize("batch", [1, 2, 5, 8, 16])
def test_every_batch_gives_each_window_the_same(model, engine, batch):
    windows = torch.randn(batch, 1, 96, 96, 96, device=DEVICE)
    found = engine.predict(windows).clone()
    assert error_of(found, strict(model, windows, folded=False)) <= TOLERANCE["fp16"]
    assert torch.equal(engine.predict(windows), found)


def test_nothing_is_read_that_was_not_written(engine, monkeypatch):
    """All memory that is asked for is filled with NaN first."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    windows = torch.randn(2, 1, 96, 96, 96, device=DEVICE)
    with torch.no_grad():
        expected = engine.launch(windows)
        torch.use_deterministic_algorithms(True)
        try:
            assert torch.utils.deterministic.fill_uninitialized_memory
            assert torch.empty(3, device=DEVICE).isnan().all()
            found = engine.launch(windows)
        finally:
            torch.use_deterministic_algorithms(False)
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


def test_the_answer_is_written_wholly(engine):
    windows = torch.randn(2, 1, 96, 96, 96, device=DEVICE)
    first = engine.predict(windows)
    expected = first.clone()
    first.fill_(float("nan"))
    assert torch.equal(engine.predict(windows), expected)


def test_windows_that_are_not_numbers_stay_in_their_place(engine):
    windows = torch.randn(2, 1, 96, 96, 96, device=DEVICE)
    expected = engine.predict(windows)[0].clone()
    windows[1] = float("nan")
    assert torch.equal(engine.predict(windows)[0], expected)


def test_two_engines_and_two_threads_do_not_disturb_each_other(model, engine):
    other, windows, found = engine_of(model), torch.randn(2, 1, 96, 96, 96, device=DEVICE), []
    expected = engine.predict(windows).clone()
    thread = threading.Thread(target=lambda: found.append(other.predict(windows.flip(0)).clone()))
    thread.start()
    again = engine.predict(windows).clone()
    thread.join()
    other.close()
    assert torch.equal(again, expected)
    assert torch.equal(found[0].flip(0), expected)


def test_switches_stay_and_a_closed_engine_says_so(model):
    def switches():
        return (
            torch.backends.cuda.matmul.allow_tf32,
            torch.backends.cudnn.allow_tf32,
            torch.backends.cudnn.deterministic,
        )

    before, engine = switches(), engine_of(model)
    engine.predict(torch.zeros(1, 1, 96, 96, 96, device=DEVICE))
    assert switches() == before
    with pytest.raises(ValueError, match="takes 1 to 16 windows"):
        engine.predict(torch.zeros(17, 1, 96, 96, 96, device=DEVICE))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="closed"):
        engine.predict(torch.zeros(1, 1, 96, 96, 96, device=DEVICE))
