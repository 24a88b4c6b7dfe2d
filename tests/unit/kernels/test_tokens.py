"""Layers over tokens: their kernel on a GPU, or by a C++ compiler on the CPU, against plain PyTorch."""

from __future__ import annotations

import math
import platform
import re
import sys
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.nn import functional

from ctflow.kernels import tokens
from ctflow.kernels.machine_code.compiler import compile_form
from ctflow.kernels.machine_code.forms import HOPPER, TARGETS, KernelTarget
from ctflow.kernels.machine_code.launch import GpuKernels, KernelList
from ctflow.kernels.operations import HopperOperations
from ctflow.kernels.tokens import TokenLayers, packed_layer
from ctflow.networks.operations import BlockBegin, BlockEnd, TorchOperations
from ctflow.networks.swin_windows import window_table
from warp_on_cpu import WarpOnCpu, needs_compiler

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
HALF = torch.float16
EXACT = TorchOperations(torch.float32, DEVICE)
SIZE = (4, 3, 5)
compiles = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="NVIDIA's run-time compiler is installed on Linux on x86-64 only",
)


@pytest.fixture(params=["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def kernels(request, tmp_path, monkeypatch):
    """What launches; on the CPU blocks have one warp."""
    torch.manual_seed(0)
    if request.param != DEVICE:
        pytest.skip(f"this machine computes on {DEVICE}")
    if DEVICE != "cpu":
        return GpuKernels(DEVICE)
    needs = needs_compiler.args[0]
    if needs:
        pytest.skip(needs_compiler.kwargs["reason"])
    chosen = tokens.form_for
    monkeypatch.setattr(tokens, "form_for", lambda *a, **k: replace(chosen(*a, **k), warps=1))
    return WarpOnCpu(tmp_path)


def layer(cin: int, cout: int, *, shifted: bool = True):
    weight = (torch.randn(cout, cin, device=DEVICE) / cin**0.5).to(HALF)
    return weight, torch.randn(cout, device=DEVICE).to(HALF) if shifted else None


def exact(given):
    return tuple(None if each is None else each.float() for each in given)


def norm_of(channels: int):
    return 1 + torch.randn(channels, device=DEVICE) / 4, torch.randn(channels, device=DEVICE)


def begin_of(channels: int, shift: int | None, *, shifted: bool = True) -> BlockBegin:
    """The begin of a block in windows of three tokens, or in order."""
    fetch = places = None
    if shift is not None:
        table = window_table(SIZE, (3, 3, 3), (shift,) * 3)
        padding = np.flatnonzero(table.fetch == table.tokens)
        fetch, places = (
            torch.from_numpy(each.astype(np.int32)).to(DEVICE)
            for each in (table.fetch, np.concatenate([table.back, padding]))
        )
    return BlockBegin(norm_of(channels), layer(channels, 3 * channels, shifted=shifted), fetch, places)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.shape == expected.shape
    worst = 1e-3 if found.dtype == HALF else 4e-4  # products of rounded numbers; a half itself is rounded to 5e-4
    return float((found.float() - expected).abs().max()) <= worst * float(expected.abs().max())


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("shift", [None, 1])
@pytest.mark.parametrize("channels", [12, 48, 96])
def test_the_begin_of_a_block(kernels, channels, shift, whole):
    given = torch.randn(2, math.prod(SIZE), channels, device=DEVICE) * 3 + 1
    given = given if whole else given.to(HALF)
    begin = begin_of(channels, shift, shifted=channels != 12)
    layers = TokenLayers(None, begin, HALF, kernels)
    found = layers.begin(given)
    assert found.dtype == HALF
    assert close(found, EXACT.block_begin(replace(begin, qkv=exact(begin.qkv)))(given.float()))


@pytest.mark.parametrize(("channels", "inputs"), [(12, 1), (48, 1), (24, 3)])
def test_the_embedding_of_patches(kernels, channels, inputs):
    windows = torch.randn(2, inputs, *(2 * length for length in SIZE), device=DEVICE)
    given, begin = layer(8 * inputs, channels), begin_of(channels, 1)
    found = TokenLayers(None, begin, HALF, kernels, given).embed(windows)
    expected = EXACT.embedding(exact(given), replace(begin, qkv=exact(begin.qkv)))(windows.to(HALF).float())
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == HALF
        assert close(one, other)


@pytest.mark.parametrize("follows", [True, False])
@pytest.mark.parametrize("shift", [None, 0])
@pytest.mark.parametrize("channels", [12, 48, 96])
def test_the_end_of_a_block_and_the_begin_of_the_next(kernels, channels, shift, follows):
    given = torch.randn(2, math.prod(SIZE), channels, device=DEVICE)
    begin, following = begin_of(channels, shift), begin_of(channels, None if shift is None else 1) if follows else None
    places = len(given[0]) if shift is None else len(begin.fetch)
    x = torch.randn(2, places, channels, device=DEVICE).to(HALF)
    proj, up, down = layer(channels, channels), layer(channels, 4 * channels), layer(4 * channels, channels)
    end = BlockEnd(proj, norm_of(channels), up, down)
    found, projected = TokenLayers((end, begin.places), following, HALF, kernels)(given, x)
    assert found.dtype == torch.float32
    end = replace(end, proj=exact(proj), up=exact(up), down=exact(down))
    following = following and replace(following, qkv=exact(following.qkv))
    expected, wanted = EXACT.block_end(end, begin.places, following)(given, x.float())
    assert close(found, expected)
    assert (projected is None) == (wanted is None)
    assert wanted is None or close(projected, wanted)


def test_more_numbers_than_have_places_are_computed_in_several_launches(kernels, monkeypatch):
    given, x = (torch.randn(3, math.prod(SIZE), 12, device=DEVICE) for _ in range(2))
    windows = torch.randn(3, 1, *(2 * length for length in SIZE), device=DEVICE)
    end = BlockEnd(layer(12, 12), norm_of(12), layer(12, 48), layer(48, 12))
    ending = TokenLayers((end, None), begin_of(12, 1), HALF, kernels)
    embedding = TokenLayers(None, begin_of(12, 1), HALF, kernels, layer(8, 12))
    once = (*ending(given, x.to(HALF)), *embedding.embed(windows))
    launched = []
    launch = kernels.cuda
    monkeypatch.setattr(
        kernels, "cuda", lambda form, blocks, *rest: (launched.append(blocks), launch(form, blocks, *rest))
    )
    monkeypatch.setattr(tokens, "_MOST_NUMBERS", 2 * len(begin_of(12, 1).places) * 36)
    again = (*ending(given, x.to(HALF)), *embedding.embed(windows))
    assert [first == 2 * second for first, second in zip(launched[::2], launched[1::2], strict=True)] == [True, True]
    for one, other in zip(once, again, strict=True):
        assert torch.equal(one, other)


def test_what_is_not_a_number_stays_in_its_token(kernels):
    given = torch.randn(1, math.prod(SIZE), 12, device=DEVICE)
    begin = begin_of(12, 1)
    layers = TokenLayers(None, begin, HALF, kernels)
    expected = layers.begin(given)
    given[0, 7, 3] = float("nan")
    found = layers.begin(given)
    place = int(begin.places[7])
    assert found[0, place].isnan().all()
    found[0, place] = expected[0, place]
    assert torch.equal(found, expected)


def test_gelu_is_exact_for_every_half():
    """The polynomial as tokens.cu writes it, in float32, and Phi in float64."""
    source = files("ctflow.kernels").joinpath("tokens.cu").read_text("utf-8")
    body = source[source.index("float gelu(") :].split("}\n", 1)[0]
    last, *others = (float(each) for each in re.findall(r"(-?\d\.\d+)f[,)]", body))
    assert len(others) == 5
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(HALF)
    x = x[x.isfinite()].float()
    log = torch.full_like(x, last)
    for each in others:
        log = log * x.abs() + each
    found = x.clamp_min(0) - x.abs() * log.exp2()
    assert float((found - functional.gelu(x.double())).abs().max()) < 1e-6
    assert (found.diff()[x[1:] > 0] >= 0).all()


@pytest.mark.parametrize(("cout", "cin"), [(48, 48), (20, 36)])
def test_packed_weights_are_what_each_thread_multiplies(cout, cin):
    weight, seen = torch.randn(cout, cin), torch.zeros(-(-cout // 16) * 16, -(-cin // 16) * 16)
    packed = packed_layer(weight)
    for lane in range(32):
        group, place = lane // 4, lane % 4
        for number in range(8):
            output = group // 2 * 4 + group % 2 + number // 4 * 2
            seen[output::16, place * 4 + number % 4 :: 16] = packed[:, :, lane, number]
    assert torch.equal(seen[:cout, :cin], weight)
    assert seen.count_nonzero() == weight.count_nonzero()


def test_what_is_not_taken_is_computed_step_by_step():
    assert TokenLayers.takes(12, HALF)
    assert TokenLayers.takes(96, torch.bfloat16)
    assert not TokenLayers.takes(48, torch.float32)
    assert not TokenLayers.takes(192, HALF)
    kernels = KernelList()
    ops = HopperOperations(HALF, "meta", kernels)
    for channels, names in ((192, {"normalize_tokens"}), (96, {"compute_tokens"})):
        kernels.forms.clear()
        weight = torch.empty((3 * channels, channels), dtype=HALF, device="meta")
        norm = (torch.empty(channels, device="meta"),) * 2
        given = torch.empty((2, 60, channels), device="meta")
        assert ops.block_begin(BlockBegin(norm, (weight, None)))(given).shape == (2, 60, 3 * channels)
        assert {form.name for form in kernels.forms.values()} == names


@compiles
@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("target", [HOPPER, KernelTarget((8, 0)), TARGETS[-1]], ids=lambda target: target.name)
def test_it_compiles_for_every_generation_and_fits_it(target, kind):
    for channels in (12, 48, 96):
        form = tokens.form_for(channels, 4 * channels, 3 * channels, kind, whole=False)
        cubin = compile_form(tokens.cuda_form(form), target)
        assert cubin.code.startswith(b"\x7fELF")
        assert cubin.shared <= target.shared
