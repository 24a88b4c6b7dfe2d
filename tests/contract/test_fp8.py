"""Convolutions in e4m3 on a Hopper GPU: the kernel against its plain reference, and what the engine promises."""

from __future__ import annotations

from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from ctflow.core.model import Model, ModelSpec, NetworkSpec
from ctflow.engines import fused
from ctflow.engines.registry import open_engine
from ctflow.engines.request import EngineRequest
from ctflow.export.prepare import prepare_engine
from ctflow.kernels.convolution_fp8 import Fp8Convolution, is_in_eight_bits
from ctflow.kernels.machine_code.launch import GpuKernels
from ctflow.networks.build import network_from_spec
from ctflow.networks.channels_last.choice import channels_last_network
from ctflow.networks.eight_bits import (
    RoundedWeights,
    RoundingOperations,
    activated_in_full,
    convolve_rounded,
    exponent_of,
    rounded_weights,
)
from ctflow.networks.operations import TorchOperations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0) or not fused.is_available()[0],
        reason="no Hopper GPU, or no cuda-bindings",
    ),
]
DEVICE, ROI = "cuda:0", (96, 96, 96)


@contextmanager
def strict():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def filled_with_nan():
    """All memory that is asked for is filled with NaN first."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3, device=DEVICE).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def parts_of(batch, size, shares, exponents_apart):
    return [
        (torch.randn(batch, *size, share, device=DEVICE) * 2.0 ** (number * exponents_apart)).half()
        for number, share in enumerate(shares)
    ]


@pytest.mark.parametrize(
    ("shares", "cout", "batch", "size", "normalized"),
    [
        ((48,), 48, 2, (96, 96, 96), True), ((48,), 48, 2, (48, 48, 48), False), ((48,), 48, 1, (50, 70, 51), True),
        ((48,), 48, 3, (49, 48, 100), False), ((48, 48), 48, 2, (96, 96, 96), False),
        ((48, 48), 48, 1, (50, 57, 64), False), ((48, 48), 48, 2, (49, 48, 48), True),
        ((32,), 32, 2, (64, 50, 48), True), ((32, 32), 32, 2, (48, 50, 64), False), ((64,), 32, 1, (48, 48, 48), True),
        ((16, 16), 16, 1, (48, 48, 48), False),
    ],
    ids=str,
)  # fmt: skip
def test_the_kernel_is_its_reference(shares, cout, batch, size, normalized):
    cin = sum(shares)
    weight = torch.randn(cout, cin, 3, 3, 3) / (27 * cin) ** 0.5
    parts = parts_of(batch, size, shares, 2)
    norm = None
    if normalized:
        norm = torch.stack([torch.rand(batch, cin, device=DEVICE) + 0.5, torch.randn(batch, cin, device=DEVICE)], 1)
    given = parts
    if norm is not None:
        norms = torch.split(norm, list(shares), -1)
        given = [activated_in_full(part, own) for part, own in zip(parts, norms, strict=True)]
    exponents = [exponent_of(float(part.abs().amax())) for part in given]
    made = rounded_weights(weight, shares, exponents)
    with strict():
        expected = convolve_rounded(given, exponents, RoundedWeights(made.values.to(DEVICE), made.factors.to(DEVICE)))
    convolution = Fp8Convolution(weight, shares, exponents, DEVICE, GpuKernels(DEVICE))
    with filled_with_nan():
        found, sums = convolution(parts, norm)
    largest = float(expected.abs().max())
    assert float((found.float() - expected).abs().max()) <= 4e-3 * largest
    assert float((found.float() - expected).std() / expected.std()) <= 1e-3
    wanted = TorchOperations.sums(expected)[:, 0]
    voxels = size[0] * size[1] * size[2]
    total = sums.sum(1)
    assert float((total[:, 1] - wanted[:, 1]).abs().max() / wanted[:, 1].abs().max()) <= 1e-3
    # Hopper cuts its sums of such products off, towards one side: 2.4e-4 was seen behind a norm.
    assert float((total[:, 0] - wanted[:, 0]).abs().max()) / voxels <= 5e-4 * float(expected.std())
    assert torch.equal(convolution(parts, norm)[0], found)


def model_of_width(classes: int = 2) -> Model:
    torch.manual_seed(48)
    network = NetworkSpec("SwinUNETR", {"in_channels": 1, "out_channels": classes, "feature_size": 48})
    spec = ModelSpec(
        "m", "1", network, 1, classes, (), ROI, 0.25, "gaussian", 4, "softmax", None, (), "", False
    )  # fmt: skip
    return Model(spec, network_from_spec(network).state_dict(), "d" * 64)


@pytest.fixture(scope="module")
def model() -> Model:
    return model_of_width()


@pytest.fixture(scope="module")
def request_of_fp8(tmp_path_factory) -> EngineRequest:
    return EngineRequest("fused", DEVICE, "fp8", ROI, (1, 8), tmp_path_factory.mktemp("kernels"))


@pytest.fixture(scope="module")
def engine(model, request_of_fp8):
    prepare_engine(request_of_fp8, model, logits_only=True)
    with closing(open_engine(request_of_fp8, model)) as opened:
        yield opened


def test_logits_are_those_of_the_reference_and_near_strict_fp32(model, request_of_fp8, engine):
    windows = torch.rand(3, 1, *ROI, device=DEVICE)
    network, _ = fused._network(request_of_fp8, model)
    calibration = fused._calibration(request_of_fp8, model, network)
    with strict():
        exact = channels_last_network(network, ROI, TorchOperations(torch.float32, DEVICE))(windows)
        rounding = RoundingOperations(torch.float16, DEVICE, is_in_eight_bits(ROI), calibration.exponents)
        rounded = channels_last_network(network, ROI, rounding)(windows)
    found = engine.predict(windows)
    assert found.dtype == torch.float32
    assert float((found - exact).abs().max() / exact.abs().max()) <= 0.15  # 0.072 was seen
    # A value between two of e4m3 falls to either, which the layers after it spread: not 1e-3 as in half precision.
    assert float((found - rounded).std() / rounded.std()) <= 0.5 * float((found - exact).std() / exact.std())


@pytest.mark.parametrize("batch", [1, 5, 8])
def test_every_batch_gives_each_window_the_same_in_fp8(engine, batch):
    windows = torch.randn(8, 1, *ROI, device=DEVICE)
    expected = torch.cat([engine.predict(window[None]).clone() for window in windows[:batch]])
    found = engine.predict(windows[:batch]).clone()
    # Sums for the norms are added in other parts, which moves some values of e4m3 by a step.
    assert float((found - expected).abs().max() / expected.abs().max()) <= 5e-2
    assert torch.equal(engine.predict(windows[:batch]), found)


def test_nothing_is_read_that_was_not_written_in_fp8(engine, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    windows = torch.randn(2, 1, *ROI, device=DEVICE)
    with torch.no_grad():
        expected = engine.launch(windows)
        with filled_with_nan():
            found = engine.launch(windows)
    assert torch.isfinite(found).all()
    assert torch.equal(found, expected)


def test_windows_that_are_not_numbers_stay_in_their_place_in_fp8(engine):
    windows = torch.randn(2, 1, *ROI, device=DEVICE)
    expected = engine.predict(windows)[0].clone()
    windows[1] = float("nan")
    found = engine.predict(windows)
    assert torch.equal(found[0], expected)
    assert not torch.isfinite(found[1]).any()


def test_windows_of_a_single_value_are_finite(engine):
    windows = torch.stack([torch.full((1, *ROI), value, device=DEVICE) for value in (0.0, 1.0)])
    assert torch.isfinite(engine.predict(windows)).all()


def test_the_kernels_of_fp8_come_from_the_stored_file(model, request_of_fp8, engine):
    stored = fused._cubins(request_of_fp8, model)
    assert "convolve_fp8" in {cubin.name for cubin in stored.values()}
    assert [path.name for path in Path(request_of_fp8.folder).glob("calibration-*/engine.calibration")]
