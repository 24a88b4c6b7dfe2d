from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from ctflow.networks.eight_bits import (
    LARGEST,
    RecordingOperations,
    RoundingOperations,
    activated_in_full,
    convolve_rounded,
    exponent_of,
    rounded_input,
    rounded_weights,
)
from ctflow.networks.operations import TorchOperations

SIZE = (6, 7, 8)


@pytest.mark.parametrize(
    ("largest", "exponent"), [(256.0, 0), (255.9, 0), (256.1, -1), (9.5, 4), (1.0, 8), (1e-30, 64), (1e30, -64)]
)
def test_the_largest_value_becomes_at_most_256(largest, exponent):
    assert exponent_of(largest) == exponent
    if exponent not in (64, -64):
        assert 128 < largest * 2.0**exponent <= 256


@pytest.mark.parametrize("largest", [0.0, -1.0, math.inf, math.nan])
def test_what_is_no_size_changes_nothing(largest):
    assert exponent_of(largest) == 0


def test_inputs_are_rounded_to_the_nearest_and_what_is_too_large_to_the_largest():
    x = torch.tensor([1.0, 1.0624, 1.0626, -1.19, 3.0, 900.0, -1e9, math.inf, math.nan])
    found = rounded_input(x, 0).float()
    assert found[:-1].tolist() == [1.0, 1.0, 1.125, -1.25, 3.0, LARGEST, -LARGEST, LARGEST]
    assert found[-1].isnan()
    assert torch.equal(rounded_input(x[:5] / 64, 6).float(), found[:5])


@pytest.mark.parametrize("exponents", [(0, 0), (5, 3), (-2, 7)])
def test_weights_undo_what_each_share_is_multiplied_with(exponents):
    torch.manual_seed(0)
    weight, parts = torch.randn(8, 32, 3, 3, 3), [torch.randn(2, *SIZE, 16) * 2.0 ** (6 - e) for e in exponents]
    made = rounded_weights(weight, (16, 16), exponents)
    assert made.values.float().abs().flatten(1).amax(1).eq(LARGEST).all()  # every output channel uses the whole range
    found = convolve_rounded(parts, exponents, made)
    expected = functional.conv3d(torch.cat(parts, -1).movedim(-1, 1), weight, padding=1).movedim(1, -1)
    error = float((found - expected).std() / expected.std())
    assert 0.01 < error < 0.06  # two numbers of 3 bits each


def test_an_output_channel_without_weights_gives_zeros():
    weight = torch.randn(2, 16, 3, 3, 3)
    weight[1] = 0
    found = convolve_rounded([torch.randn(1, *SIZE, 16)], [0], rounded_weights(weight, (16,), (0,)))
    assert found[..., 0].any()
    assert not found[..., 1].any()


def takes(weight, shares, size):
    return weight[1] == 32


def test_the_largest_inputs_of_the_chosen_convolutions_are_noted():
    torch.manual_seed(0)
    operations = RecordingOperations(torch.float32, "cpu", takes)
    plain = TorchOperations(torch.float32, "cpu")
    weights = [torch.randn(8, 16, 3, 3, 3), torch.randn(8, 32, 3, 3, 3), torch.randn(8, 32, 3, 3, 3)]
    operations.convolution(weights[0], (16,), SIZE)
    apart = operations.convolution(weights[1], (16, 16), SIZE)
    normed = operations.convolution(weights[2], (32,), SIZE)
    strided = operations.convolution(weights[2], (32,), (6, 8, 8), (2, 2, 2))
    assert operations.channels == [(16, 16), (32,)]
    x, norm = torch.randn(2, *SIZE, 32), torch.randn(2, 2, 32)
    parts = [x[..., :16], 3 * x[..., 16:]]
    for scale in (1, 0.5):
        found = apart([scale * part for part in parts], None)
    assert torch.equal(found[0], plain.convolution(weights[1], (16, 16), SIZE)([part / 2 for part in parts], None)[0])
    normed([x], norm)
    strided([torch.randn(1, 6, 8, 8, 32)], None)
    activated = float(activated_in_full(x, norm).abs().max())
    assert operations.largest == [[float(part.abs().max()) for part in parts], [pytest.approx(activated)]]
    for scale in (math.nan, 1):
        normed([scale * x], norm)
    assert math.isnan(operations.largest[1][0])


@pytest.mark.parametrize("normalized", [True, False])
@pytest.mark.parametrize("shares", [(32,), (16, 16)])
def test_the_reference_rounds_the_chosen_convolutions_alone(shares, normalized):
    torch.manual_seed(0)
    operations = RoundingOperations(torch.float32, "cpu", takes, [[4] * len(shares)])
    plain = TorchOperations(torch.float32, "cpu")
    weight, other = torch.randn(8, 32, 3, 3, 3), torch.randn(8, 16, 3, 3, 3)
    x, norm = torch.randn(1, *SIZE, 32), torch.randn(1, 2, 32) if normalized else None
    parts = list(torch.split(x, list(shares), -1))
    found, sums = operations.convolution(weight, shares, SIZE)(parts, norm)
    given = parts if norm is None else list(torch.split(activated_in_full(x, norm), list(shares), -1))
    exact = convolve_rounded(given, [4] * len(shares), rounded_weights(weight, shares, [4] * len(shares)))
    assert torch.equal(found, exact)
    assert torch.equal(sums, plain.sums(exact))
    unchanged = operations.convolution(other, (16,), SIZE)([x[..., :16]], None)[0]
    assert torch.equal(unchanged, plain.convolution(other, (16,), SIZE)([x[..., :16]], None)[0])
