"""MONAI's SwinUNETR for volumes, with the names of its parameters and bit for bit its results, for inference.

MONAI takes 1 to 2 s to import, a quarter of the time that a run on a GPU takes until its first window. Dropout and
checkpointing, which do nothing in inference, have no modules here.

Source: `monai.networks.nets.swin_unetr` of MONAI 1.6.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ctflow.core.volume import Size3
from ctflow.networks.native.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock, takes_norm

_STAGES = 4
MASKED = -100.0  # added to the score of a pair of tokens that must not see each other


class SwinUNETR(nn.Module):
    """MONAI's network of this name; `takes` says with which arguments."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        patch_size: int = 2,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: Sequence[int] | int = 7,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        feature_size: int = 24,
        norm_name: Any = "instance",
        drop_rate: float = 0.0,  # of training
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        normalize: bool = True,
        patch_norm: bool = False,
        use_checkpoint: bool = False,
        spatial_dims: int = 3,
        downsample: str = "merging",
        use_v2: bool = False,
    ) -> None:
        super().__init__()
        self.patch_size, self.normalize = patch_size, normalize
        width, kind = feature_size, norm_name
        window = (window_size,) * 3 if isinstance(window_size, int) else tuple(window_size)
        merging = _MERGINGS[downsample]
        stages = [
            BasicLayer(
                width * 2**i, depths[i], num_heads[i], (window[0], window[1], window[2]), mlp_ratio, qkv_bias, merging
            )
            for i in range(_STAGES)
        ]
        self.swinViT = SwinTransformer(
            in_channels,
            width,
            patch_size,
            (window[0], window[1], window[2]),
            stages,
            patch_norm=patch_norm,
            use_v2=use_v2,
        )
        self.encoder1 = UnetrBasicBlock(in_channels, width, kind)
        self.encoder2 = UnetrBasicBlock(width, width, kind)
        self.encoder3 = UnetrBasicBlock(2 * width, 2 * width, kind)
        self.encoder4 = UnetrBasicBlock(4 * width, 4 * width, kind)
        self.encoder10 = UnetrBasicBlock(16 * width, 16 * width, kind)
        self.decoder5 = UnetrUpBlock(16 * width, 8 * width, kind)
        self.decoder4 = UnetrUpBlock(8 * width, 4 * width, kind)
        self.decoder3 = UnetrUpBlock(4 * width, 2 * width, kind)
        self.decoder2 = UnetrUpBlock(2 * width, width, kind)
        self.decoder1 = UnetrUpBlock(width, width, kind)
        self.out = UnetOutBlock(width, out_channels)

    @staticmethod
    def takes(arguments: Mapping[str, Any]) -> bool:
        """Whether these are arguments of MONAI's that this class knows, with values that it supports."""
        given: dict[str, Any] = {
            "spatial_dims": 3,
            "downsample": "merging",
            "norm_name": "instance",
            "window_size": 7,
        } | dict(arguments)
        window = given["window_size"]
        lists: list[Any] = [given.get(name, (1,) * _STAGES) for name in ("depths", "num_heads")]
        counts: list[Any] = [
            given.get(name, 24) for name in ("in_channels", "out_channels", "patch_size", "feature_size")
        ]
        counts += window if isinstance(window, list | tuple) and len(window) == 3 else [window]
        counts += [each for one in lists for each in (one if isinstance(one, list | tuple) else (None,))]
        rates: list[Any] = [given.get(name, 0.0) for name in ("drop_rate", "attn_drop_rate", "dropout_path_rate")]
        switches = ("qkv_bias", "normalize", "patch_norm", "use_checkpoint", "use_v2")
        return (
            all(type(each) is int and each > 0 for each in counts)
            and all(len(one) == _STAGES for one in lists)
            and all(type(each) in (int, float) and 0 <= each <= 1 for each in rates)
            and all(type(given.get(name, False)) is bool for name in switches)
            and type(given.get("mlp_ratio", 4.0)) in (int, float)
            and given.get("mlp_ratio", 4.0) > 0
            and given.get("feature_size", 24) % 12 == 0
            and given["spatial_dims"] == 3
            and given["downsample"] in ("merging", "mergingv2")
            and takes_norm(given["norm_name"])
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, D, H, W), each a multiple of the fifth power of the patch size -> (B, C_out, D, H, W) logits."""
        if any(length % self.patch_size**5 for length in x.shape[2:]):
            raise ValueError(f"the window's {tuple(x.shape[2:])} voxels must be divisible by {self.patch_size}**5")
        hidden = self.swinViT(x, self.normalize)
        enter = self.encoder1(x)
        skips = [self.encoder2(hidden[0]), self.encoder3(hidden[1]), self.encoder4(hidden[2])]
        y = self.decoder5(self.encoder10(hidden[4]), hidden[3])
        y = self.decoder4(y, skips[2])
        y = self.decoder3(y, skips[1])
        y = self.decoder2(y, skips[0])
        logits: Tensor = self.out(self.decoder1(y, enter))
        return logits


class SwinTransformer(nn.Module):
    """The encoder: tokens of patches, and four stages of windowed attention, each half as wide as the one before."""

    def __init__(
        self,
        cin: int,
        width: int,
        patch: int,
        window: Size3,
        stages: Sequence[BasicLayer],
        *,
        patch_norm: bool,
        use_v2: bool,
    ) -> None:
        super().__init__()
        self.num_layers, self.window_size, self.use_v2 = _STAGES, window, use_v2
        self.patch_embed = PatchEmbed(cin, width, patch, has_norm=patch_norm)
        for number, stage in enumerate(stages, start=1):
            self.add_module(f"layers{number}", nn.ModuleList([stage]))
        for number in range(1, _STAGES + 1) if use_v2 else ():
            channels = width * 2 ** (number - 1)
            self.add_module(f"layers{number}c", nn.ModuleList([UnetrBasicBlock(channels, channels, "instance")]))

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """(B, C_in, D, H, W) -> the input of each stage and the last output, normalised over channels if asked."""
        x = self.patch_embed(x)
        found = [_normalised(x) if normalize else x]
        for number in range(1, _STAGES + 1):
            if self.use_v2:
                x = self.get_submodule(f"layers{number}c.0")(x.contiguous())
            x = self.get_submodule(f"layers{number}.0")(x.contiguous())
            found.append(_normalised(x) if normalize else x)
        return found


def _normalised(x: Tensor) -> Tensor:
    """A norm over channels without weights."""
    channels = int(x.shape[1])
    return functional.layer_norm(x.permute(0, 2, 3, 4, 1), [channels]).permute(0, 4, 1, 2, 3)


class PatchEmbed(nn.Module):
    """A token for each patch of voxels."""

    def __init__(self, cin: int, width: int, patch: int, *, has_norm: bool) -> None:
        super().__init__()
        self.proj = nn.Conv3d(cin, width, patch, stride=patch)
        self.norm = nn.LayerNorm(width) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, D, H, W) -> (B, C, D', H', W')."""
        y: Tensor = self.proj(x)
        if self.norm is not None:
            tokens = self.norm(y.flatten(2).transpose(1, 2))
            y = tokens.transpose(1, 2).view(y.shape)
        return y


class BasicLayer(nn.Module):
    """A stage: blocks whose windows are shifted in every second, and a merging of eight neighbours."""

    use_hyena = False  # MONAI's other kind of stage

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        window: Size3,
        mlp_ratio: float,
        qkv_bias: bool,
        merging: type[PatchMergingV2],
    ) -> None:
        super().__init__()
        self.window_size, self.shift_size = window, (window[0] // 2, window[1] // 2, window[2] // 2)
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(dim, heads, window, self.shift_size if i % 2 else (0, 0, 0), mlp_ratio, qkv_bias)
            for i in range(depth)
        )
        self.downsample = merging(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, 2 C, D / 2, H / 2, W / 2), odd sizes rounded up."""
        _, _, d, h, w = x.shape
        window, shift = _fitting((d, h, w), self.window_size, self.shift_size)
        mask = _mask(_padded((d, h, w), window), window, shift, x.device)
        x = x.permute(0, 2, 3, 4, 1)
        for block in self.blocks:
            x = block(x, mask)
        merged: Tensor = self.downsample(x)
        return merged.permute(0, 4, 1, 2, 3)


def _fitting(size: Size3, window: Size3, shift: Size3) -> tuple[Size3, Size3]:
    """An axis not longer than the window is one window, which is not shifted."""
    fits = [length <= most for length, most in zip(size, window, strict=True)]
    lengths = [length if fit else most for fit, length, most in zip(fits, size, window, strict=True)]
    shifts = [0 if fit else by for fit, by in zip(fits, shift, strict=True)]
    return (lengths[0], lengths[1], lengths[2]), (shifts[0], shifts[1], shifts[2])


def _padded(size: Size3, window: Size3) -> Size3:
    d, h, w = (-(-length // part) * part for length, part in zip(size, window, strict=True))
    return d, h, w


def _mask(size: Size3, window: Size3, shift: Size3, device: torch.device) -> Tensor:
    """(windows, n, n): what is added to the score of two places of a window of the shifted grid."""
    regions = torch.zeros((1, *size, 1), device=device)
    parts = [(slice(-length), slice(-length, -by), slice(-by, None)) for length, by in zip(window, shift, strict=True)]
    for number, (d, h, w) in enumerate(itertools.product(*parts)):
        regions[:, d, h, w, :] = number
    places = _windows(regions, window).squeeze(-1)
    apart = places.unsqueeze(1) - places.unsqueeze(2)
    return apart.masked_fill(apart != 0, MASKED).masked_fill(apart == 0, 0.0)


def _windows(x: Tensor, window: Size3) -> Tensor:
    """(B, D, H, W, C) -> (windows, n, C)."""
    b, d, h, w, c = x.shape
    x = x.view(b, d // window[0], window[0], h // window[1], window[1], w // window[2], window[2], c)
    return x.permute(0, 1, 3, 5, 2, 4, 6, 7).contiguous().view(-1, window[0] * window[1] * window[2], c)


def _volume(windows: Tensor, window: Size3, batch: int, size: Size3) -> Tensor:
    """(windows, n, C) -> (B, D, H, W, C)."""
    grid = (size[0] // window[0], size[1] // window[1], size[2] // window[2])
    x = windows.view(batch, *grid, *window, -1).permute(0, 1, 4, 2, 5, 3, 6, 7)
    return x.contiguous().view(batch, *size, -1)


class SwinTransformerBlock(nn.Module):
    """Attention within windows, and a perceptron, each added to the tokens."""

    def __init__(self, dim: int, heads: int, window: Size3, shift: Size3, mlp_ratio: float, qkv_bias: bool) -> None:
        super().__init__()
        self.window_size, self.shift_size = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, window, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio) or dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, D, H, W, C) tokens -> the same."""
        x = x + self._attended(self.norm1(x), mask)
        result: Tensor = x + self.mlp(self.norm2(x))
        return result

    def _attended(self, x: Tensor, mask: Tensor) -> Tensor:
        b, d, h, w, c = x.shape
        window, shift = _fitting((d, h, w), self.window_size, self.shift_size)
        dp, hp, wp = size = _padded((d, h, w), window)
        x = functional.pad(x, (0, 0, 0, wp - w, 0, hp - h, 0, dp - d))
        if any(shift):
            x = torch.roll(x, shifts=tuple(-by for by in shift), dims=(1, 2, 3))
        x = self.attn(_windows(x, window), mask if any(shift) else None)
        x = _volume(x.view(-1, *window, c), window, b, size)
        if any(shift):
            x = torch.roll(x, shifts=shift, dims=(1, 2, 3))
        return x[:, :d, :h, :w, :].contiguous() if size != (d, h, w) else x


class Mlp(nn.Module):
    """Two layers."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> the same."""
        result: Tensor = self.linear2(functional.gelu(self.linear1(x)))
        return result


class WindowAttention(nn.Module):
    """Attention with a bias by relative position."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window: Size3, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (dim // heads) ** -0.5
        d, h, w = (2 * length - 1 for length in window)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(d * h * w, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        places = torch.stack(torch.meshgrid(*(torch.arange(length) for length in window), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0) + torch.tensor(window) - 1
        self.register_buffer("relative_position_index", (apart * torch.tensor([h * w, w, 1])).sum(-1))
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=qkv_bias), nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """(windows, n, C) -> the same."""
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        bias = self.relative_position_bias_table[self.relative_position_index[:n, :n].reshape(-1)].reshape(n, n, -1)
        scores = q * self.scale @ k.transpose(-2, -1) + bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            of_windows = scores.view(b // len(mask), len(mask), self.num_heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = of_windows.view(-1, self.num_heads, n, n)
        seen = (torch.softmax(scores, dim=-1).to(v.dtype) @ v).transpose(1, 2).reshape(b, n, c)
        result: Tensor = self.proj(seen)
        return result


class PatchMergingV2(nn.Module):
    """Eight neighbours become one token of twice the channels."""

    order: tuple[Size3, ...] = tuple((i, j, k) for i, j, k in itertools.product(range(2), repeat=3))

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.reduction, self.norm = nn.Linear(8 * dim, 2 * dim, bias=False), nn.LayerNorm(8 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, H, W, C) -> (B, D / 2, H / 2, W / 2, 2 C), odd sizes rounded up."""
        _, d, h, w, _ = x.shape
        if d % 2 or h % 2 or w % 2:
            x = functional.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
        merged: Tensor = self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.order], -1)))
        return merged


class PatchMerging(PatchMergingV2):
    """The same, with the neighbours in the order of MONAI's first version."""

    order = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))


_MERGINGS = {"merging": PatchMerging, "mergingv2": PatchMergingV2}
