"""Each Triton kernel against plain PyTorch; without a GPU by Triton's interpreter, in float32."""

from __future__ import annotations

import math

import pytest
import torch
from monai.networks.nets import SwinUNETR
from packaging.version import Version
from torch.nn import functional

from ctflow.networks.channels_last.swin_unetr import ChannelsLastSwinUNETR
from ctflow.networks.operations import EPS, SLOPE, BlockBegin, BlockEnd, TorchOperations
from ctflow.networks.swin_windows import window_table

triton = pytest.importorskip("triton", reason="triton has wheels for Linux on x86-64 only")

from ctflow.kernels import operations, token_kernels, volume_kernels  # noqa: E402
from ctflow.kernels.machine_code.forms import HOPPER  # noqa: E402
from ctflow.kernels.machine_code.launch import GpuKernels  # noqa: E402
from ctflow.kernels.operations import HopperOperations  # noqa: E402

if not torch.cuda.is_available() and Version(triton.__version__) < Version("3.7"):
    pytest.skip("Triton's interpreter runs no function that a kernel calls before 3.7", allow_module_level=True)

DEVICE = "cuda:0" if torch.cuda.is_available() else "cpu"
SIZE = (3, 4, 5)
COUNT = math.prod(SIZE)
PLAIN = TorchOperations(torch.float32, DEVICE)


class InterpretedKernels:
    """Triton's interpreter computes each launch on the CPU."""

    multiprocessors, target = 1, HOPPER

    def triton(self, name, grid, *arguments, warps=4, stages=3):
        kernel = getattr(volume_kernels, name, None) or getattr(token_kernels, name)
        kernel[tuple(grid)](*arguments, num_warps=warps, num_stages=stages)


KERNELS = HopperOperations(torch.float32, DEVICE, GpuKernels(DEVICE) if DEVICE != "cpu" else InterpretedKernels())


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on a GPU the plain reference is also strict
    monkeypatch.setattr(operations, "_PARTS", 6)  # programs of a sum: few, as the interpreter runs one after the other
    with torch.inference_mode():
        yield


def close(found: torch.Tensor, expected: torch.Tensor, worst: float = 2e-6) -> bool:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    return float((found - expected).abs().max()) <= worst * float(expected.abs().max())


def volume(channels: int, size=SIZE, batch=2) -> torch.Tensor:
    return torch.randn(batch, *size, channels, device=DEVICE) + 0.5


def norm_for(x: torch.Tensor) -> torch.Tensor:
    return PLAIN.norm_of(PLAIN.sums(x), math.prod(x.shape[1:4]))


@pytest.mark.parametrize("channels", [12, 48, 96])
def test_sums_of_parts_give_the_instance_norm(channels):
    x = volume(channels, (9, 10, 11))
    sums = KERNELS._sums(x)
    assert sums.shape[1] > 1
    assert close(sums.sum(1, keepdim=True), PLAIN.sums(x))
    assert close(KERNELS.norm_of(sums, 990), norm_for(x))


@pytest.mark.parametrize("channels", [64, 96])
def test_products_of_divided_steps_are_added(channels):
    products = torch.randn(3, 2, COUNT, channels, device=DEVICE)
    out, sums = torch.empty(2, COUNT, channels, device=DEVICE), torch.empty(2, 4, 2, channels, device=DEVICE)
    KERNELS.kernels.triton(
        "add_products", (4, 2, 2), products, out, sums, COUNT, channels, 2 * COUNT * channels, 3, 64, 16
    )
    assert close(out, products.sum(0))
    assert close(sums.sum(1, keepdim=True), PLAIN.sums(out))


def test_a_norm_does_not_lose_a_small_variance_beside_a_large_mean():
    x = volume(16) * 0.01 + 3
    norm = KERNELS.norm_of(PLAIN.sums(x), COUNT)
    expected = functional.instance_norm(x.double().movedim(-1, 1)).movedim(1, -1).float()
    found = x * norm[:, None, None, None, 0] + norm[:, None, None, None, 1]
    assert close(found, expected, 5e-2)  # what is left of float32 sums of squares


@pytest.mark.parametrize("channels", [12, 48])
def test_a_norm_has_its_own_scale_and_shift(channels):
    x = volume(channels)
    affine = (torch.randn(channels, device=DEVICE), torch.randn(channels, device=DEVICE))
    found = KERNELS.norm_of(PLAIN.sums(x), COUNT, affine)
    assert close(found, PLAIN.norm_of(PLAIN.sums(x), COUNT, affine))
    expected = functional.instance_norm(x.movedim(-1, 1), weight=affine[0], bias=affine[1]).movedim(1, -1)
    assert close(x * found[:, None, None, None, 0] + found[:, None, None, None, 1], expected, 1e-5)


@pytest.mark.parametrize(("channels", "outputs"), [(24, 1), (32, 3), (32, 40), (320, 2)])
def test_a_head_of_the_leaky_relu_of_the_norm(channels, outputs):
    x = volume(channels)
    head = (torch.randn(outputs, channels, device=DEVICE), torch.randn(outputs, device=DEVICE))
    found = KERNELS.activated_head(x, norm_for(x), head)
    assert close(found, PLAIN.activated_head(x, norm_for(x), head), 1e-5)


def test_a_leaky_relu_of_the_norm():
    x = volume(24)
    norm = norm_for(x)
    assert close(KERNELS.activated(x, norm), PLAIN.activated(x, norm))
    assert close(KERNELS.activated(x, norm), PLAIN.residual(x, norm, torch.zeros_like(x)))


def test_a_residual_of_the_same_shape():
    x, other = volume(48), volume(48)
    assert close(KERNELS.residual(x, norm_for(x), other), PLAIN.residual(x, norm_for(x), other))


@pytest.mark.parametrize("size", [(3, 4, 16), (3, 4, 5)], ids=str)
def test_a_residual_through_a_pointwise_convolution_of_one_channel(size):
    x, weight = volume(48, size), torch.randn(48, device=DEVICE)
    windows = torch.randn(2, 1, *size, device=DEVICE) * 3 + 2
    arguments = (x, norm_for(x), windows, weight)
    found = KERNELS.channel_residual(*arguments)
    assert close(found, PLAIN.channel_residual(*arguments), 1e-5)
    shares, weights = [windows.movedim(1, -1)], [weight[None]]
    beside = PLAIN.norm_of(PLAIN.pointwise_sums(shares, weights), math.prod(size))
    assert close(found, PLAIN.pointwise_residual(x, norm_for(x), shares, weights, beside, None), 1e-5)


def test_the_norm_of_one_channel_is_exact_where_its_mean_is_large():
    size = (48, 48, 48)
    x, weight = torch.zeros(1, *size, 16, device=DEVICE), torch.randn(16, device=DEVICE)
    windows = torch.randn(1, 1, *size, device=DEVICE) * 0.01 + 3
    found = KERNELS.channel_residual(x, torch.zeros(1, 2, 16, device=DEVICE), windows, weight)
    volumes = windows.double().movedim(1, -1) * weight.double()
    centred = volumes - volumes.mean((1, 2, 3), keepdim=True)
    expected = centred / (centred.square().mean((1, 2, 3), keepdim=True) + EPS).sqrt()
    assert close(found, functional.leaky_relu(expected, SLOPE).float(), 2e-3)  # squares are summed in float32


@pytest.mark.parametrize("shares", [(16,), (48, 32), (192, 192)], ids=str)
@pytest.mark.parametrize("channels", [24, 96])
def test_a_residual_through_a_pointwise_convolution(shares, channels):
    x, parts = volume(channels), [volume(count) for count in shares]
    weights = [torch.randn(count, channels, device=DEVICE) / 10 for count in shares]
    sums = PLAIN.pointwise_sums(parts, weights)
    beside = PLAIN.norm_of(sums, COUNT)
    assert close(KERNELS.pointwise_sums(parts, weights).sum(1, keepdim=True), sums, 1e-5)
    for head in (None, (torch.randn(3, channels, device=DEVICE), torch.randn(3, device=DEVICE))):
        arguments = (x, norm_for(x), parts, weights, beside, head)
        assert close(KERNELS.pointwise_residual(*arguments), PLAIN.pointwise_residual(*arguments), 1e-5)


@pytest.mark.parametrize("channels", [12, 96])
def test_layer_norms_fetch_their_tokens(channels):
    tokens = torch.randn(2, 50, channels, device=DEVICE) * 3 + 1
    scale, shift = torch.randn(2, channels, device=DEVICE)
    fetch = torch.randperm(50).repeat(2)[:64].to(DEVICE, torch.int32)
    fetch[5] = 50  # a place of zeros
    for arguments in ((None, None, None), (scale, shift, None), (scale, shift, fetch)):
        assert close(KERNELS.layer_norm(tokens, *arguments), PLAIN.layer_norm(tokens, *arguments), 1e-5)
    assert KERNELS.layer_norm(tokens, scale, shift, fetch)[:, 5].eq(0).all()


def test_tokens_are_added_from_their_places():
    tokens, x = torch.randn(2, 50, 24, device=DEVICE), torch.randn(2, 64, 24, device=DEVICE)
    back = torch.randperm(64)[:50].to(DEVICE, torch.int32)
    assert close(KERNELS.add(tokens, x, back), PLAIN.add(tokens, x, back))
    assert close(KERNELS.add(tokens, x[:, :50].contiguous(), None), PLAIN.add(tokens, x[:, :50], None))


def layer(cin: int, cout: int, *, shifted: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight = torch.randn(cout, cin, device=DEVICE) / cin**0.5
    return weight, torch.randn(cout, device=DEVICE) if shifted else None


@pytest.mark.parametrize("follows", [True, False])
def test_the_end_of_a_block_of_many_channels_step_by_step(follows):
    tokens, x = (torch.randn(2, count, 192, device=DEVICE) for count in (70, 90))
    places = torch.randperm(90).to(DEVICE, torch.int32)
    fetch = torch.full((90,), 70, dtype=torch.int32, device=DEVICE)  # a place of zeros
    fetch[places[:70].long()] = torch.arange(70, dtype=torch.int32, device=DEVICE)
    norm = (torch.randn(192, device=DEVICE), torch.randn(192, device=DEVICE))
    begin = BlockBegin(norm, layer(192, 576, shifted=False), fetch, places)
    end = BlockEnd(layer(192, 192), norm, layer(192, 768), layer(768, 192))
    arguments = (end, places, begin if follows else None)
    for found, expected in zip(KERNELS.block_end(*arguments)(tokens, x), PLAIN.block_end(*arguments)(tokens, x),
                               strict=True):  # fmt: skip
        assert (found is None and expected is None) or close(found, expected, 1e-5)


@pytest.mark.parametrize(("given", "channels"), [(1, 16), (3, 48), (16, 16)])
def test_windows_get_channels_of_zeros(given, channels):
    windows = torch.randn(2, given, 9, 10, 11, device=DEVICE)
    assert torch.equal(KERNELS.filled(windows, channels), PLAIN.filled(windows, channels))


def test_the_neighbours_of_a_plane_make_a_convolution_of_planes():
    windows, weight = torch.randn(2, 1, 5, 6, 7, device=DEVICE), torch.randn(24, 1, 3, 3, 3)
    spread = KERNELS.spread(windows)
    assert torch.equal(spread, PLAIN.spread(windows))
    taps = functional.pad(weight[:, 0].flatten(2).movedim(2, 1), (0, 0, 0, 7))[..., None, None]
    expected = functional.conv3d(windows, weight.to(DEVICE), padding=1).movedim(1, -1)
    for operations_ in (KERNELS, PLAIN):
        assert close(operations_.convolution(taps, (16,), (5, 6, 7))([spread], None)[0], expected, 1e-5)


@pytest.mark.parametrize("size", [(4, 2, 6), (3, 4, 5), (1, 1, 1)], ids=str)
def test_merging_fills_odd_sizes_with_zeros(size):
    tokens = torch.randn(2, math.prod(size), 12, device=DEVICE)
    scale, shift = torch.randn(2, 96, device=DEVICE)
    assert close(KERNELS.merge(tokens, size, scale, shift), PLAIN.merge(tokens, size, scale, shift), 1e-5)


@pytest.mark.parametrize(
    ("size", "window", "shift", "heads", "width"),
    [((4, 6, 5), 3, 1, 2, 8), ((7, 7, 7), 5, 2, 1, 16), ((6, 6, 6), 7, 3, 2, 4), ((4, 4, 8), 4, 0, 1, 16)],
    ids=str,
)
def test_attention_within_windows(size, window, shift, heads, width):
    table = window_table(size, (window,) * 3, (shift,) * 3)
    n, windows = math.prod(table.length), sum(table.counts)
    bias = torch.randn(heads, n, n) * 3
    qkv = torch.randn(2, windows * n, 3 * heads * width, device=DEVICE) * 2
    found = KERNELS.attention(bias, table, width)(qkv)
    assert close(found, PLAIN.attention(bias, table, width)(qkv), 1e-5)


def test_attention_with_large_scores_neither_overflows_nor_dilutes():
    table = window_table((4, 4, 4), (4, 4, 4), (0, 0, 0))
    qkv = torch.randn(1, 64, 48, device=DEVICE) * 30
    found = KERNELS.attention(torch.zeros(1, 64, 64), table, 16)(qkv)
    assert close(found, PLAIN.attention(torch.zeros(1, 64, 64), table, 16)(qkv), 1e-4)


@pytest.mark.parametrize("many", [1, 100_000], ids=["all pairs in one program", "a program for each pair"])
@pytest.mark.parametrize(("cin", "cout", "size"), [(48, 24, (3, 4, 5)), (160, 96, (2, 1, 3))], ids=str)
def test_upsampling_stores_each_parity_in_its_place(cin, cout, size, many, monkeypatch):
    monkeypatch.setattr(operations, "_MANY", many)
    programs = []
    launch = KERNELS.kernels.triton
    monkeypatch.setattr(
        KERNELS.kernels,
        "triton",
        lambda name, grid, *rest, **more: (programs.append(grid[1]), launch(name, grid, *rest, **more)),
    )
    weight, shift, x = (each.half() for each in (torch.randn(cin, cout, 2, 2, 2), torch.randn(cout), volume(cin, size)))
    halves = HopperOperations(torch.float16, DEVICE, KERNELS.kernels)
    for added in (None, shift):
        found = halves.upsampling(weight, added)(x).float()
        expected = PLAIN.upsampling(weight.float(), None if added is None else added.float())(x.float())
        assert close(found, expected, 1e-3)
    assert set(programs) == {1 if many == 1 and cin <= 64 else 4 * -(-2 * cout // 128)}
    programs.clear()
    weight, x = weight.float(), x.float()
    assert close(KERNELS.upsampling(weight)(x), PLAIN.upsampling(weight)(x), 1e-5)
    assert close(KERNELS.upsampling(weight, shift)(x), PLAIN.upsampling(weight, shift.float())(x), 1e-5)
    assert set(programs) == {4 * -(-2 * cout // 128)}  # in float32 a program computes one pair


def test_upsampling_along_two_axes():
    weight, shift, x = torch.randn(24, 16, 1, 2, 2), torch.randn(16), volume(24)
    found = KERNELS.upsampling(weight, shift)(x)
    assert close(found, PLAIN.upsampling(weight, shift)(x), 1e-5)
    assert found.shape[1:4] == (3, 8, 10)


@pytest.mark.parametrize("stride", [(2, 2, 2), (1, 2, 2)], ids=str)
def test_convolutions_with_strides(stride):
    weight, x = torch.randn(24, 48, 3, 3, 3) / 30, volume(48, (4, 6, 8))
    found, sums = KERNELS.convolution(weight, (48,), (4, 6, 8), stride)([x], None)
    expected, wanted = PLAIN.convolution(weight, (48,), (4, 6, 8), stride)([x], None)
    assert found.is_contiguous()
    assert close(found, expected, 1e-5)
    assert close(sums.sum(1, keepdim=True), wanted, 1e-5)


def test_small_convolutions_are_cudnns_with_norm_and_sums_of_ours():
    weight = torch.randn(24, 48, 3, 3, 3) / 30
    shares = [volume(32), volume(16)]
    found, sums = KERNELS.convolution(weight, (32, 16), SIZE)(shares, None)
    expected, wanted = PLAIN.convolution(weight, (32, 16), SIZE)(shares, None)
    assert close(found, expected, 1e-5)
    assert close(sums.sum(1, keepdim=True), wanted, 1e-5)
    norm = norm_for(shares[0])
    found, _ = KERNELS.convolution(weight[:, :32], (32,), SIZE)(shares[:1], norm)
    assert close(found, PLAIN.convolution(weight[:, :32], (32,), SIZE)(shares[:1], norm)[0], 1e-5)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_norm_belongs_to_the_last_shares_for_which_it_has_channels(count):
    weight, shares = torch.randn(24, 56, 3, 3, 3) / 30, [volume(32), volume(16), volume(8)]
    norm = torch.cat([norm_for(x) for x in shares[-count:]], -1)
    normed = [*shares[:-count], *(PLAIN.activated(x, norm_for(x)) for x in shares[-count:])]
    expected, _ = PLAIN.convolution(weight, (32, 16, 8), SIZE)(normed, None)
    for operations_ in (KERNELS, PLAIN):
        assert close(operations_.convolution(weight, (32, 16, 8), SIZE)(shares, norm)[0], expected, 1e-5)


@pytest.mark.gpu  # the interpreter takes minutes
@pytest.mark.parametrize("channels", [1, 16])  # filled up with zeros, and not
def test_a_whole_network_of_kernels(channels):
    network = SwinUNETR(in_channels=channels, out_channels=2, feature_size=12, window_size=2).eval()
    windows = torch.rand(1, channels, 64, 32, 32)
    found = ChannelsLastSwinUNETR(network, (64, 32, 32), KERNELS)(windows.to(DEVICE))
    assert close(found.cpu(), network(windows), 1e-5)
