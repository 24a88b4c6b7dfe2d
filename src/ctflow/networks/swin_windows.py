"""Index tables that cut the stages of MONAI's SwinUNETR into windows, for one size of the network's input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ctflow.core.volume import Size3
from ctflow.networks.native import MODULES, swin_unetr

MOST_PATTERNS = 8  # a window is or is not the last one along each of three axes
MASKED = swin_unetr.MASKED
_MODULES = (MODULES["SwinUNETR"], swin_unetr.__name__)

_Index = npt.NDArray[np.int64]


def stages_of(network: nn.Module) -> list[Any]:
    """The four stages of a SwinUNETR's transformer, finest first."""
    transformer: Any = network.swinViT
    return [getattr(transformer, f"layers{number}")[0] for number in range(1, 5)]


def stage_sizes(network: nn.Module, roi: Size3) -> list[Size3] | None:
    """(D, H, W) in tokens of each stage, or None if this SwinUNETR is not rewritten here."""
    patch: Any = network.patch_size
    if len(roi) != 3 or not isinstance(patch, int) or any(length % patch**5 for length in roi):
        return None
    transformer: Any = network.swinViT
    if transformer.num_layers != 4 or len(transformer.window_size) != 3:
        return None
    size: Size3 = (roi[0] // patch, roi[1] // patch, roi[2] // patch)
    sizes = []
    for stage in stages_of(network):
        if stage.use_hyena or not _is_of_swin(stage.downsample, "PatchMerging", "PatchMergingV2"):
            return None
        sizes.append(size)
        size = (-(-size[0] // 2), -(-size[1] // 2), -(-size[2] // 2))
    return sizes


def is_swin_unetr(network: nn.Module) -> bool:
    """Whether a network is a SwinUNETR, MONAI's or ours."""
    return _is_of_swin(network, "SwinUNETR")


def _is_of_swin(module: nn.Module, *names: str) -> bool:
    """Whether a module's class has one of these names, in MONAI or here; MONAI is not imported to find out."""
    return type(module).__name__ in names and type(module).__module__ in _MODULES


@dataclass(frozen=True, eq=False)
class WindowTable:
    """How tokens go into attention windows and back, for one stage and shift.

    Attributes:
        length: Tokens per side of a window.
        fetch: (windows * n) the token of each place, windows sorted by pattern; `tokens` is a place that padding fills.
        back: (tokens) the place of each token among the fetched.
        tokens: How many tokens there are.
        regions: (patterns, n) which region a place belongs to; places of different regions do not see each other.
        counts: Windows of each pattern.
    """

    length: Size3
    fetch: _Index
    back: _Index
    tokens: int
    regions: npt.NDArray[np.int64]
    counts: tuple[int, ...]

    @property
    def pads(self) -> bool:
        """Whether some places are padding."""
        return len(self.fetch) > self.tokens


def window_table(size: Size3, window: Size3, shift: Size3) -> WindowTable:
    """The table of one stage.

    Args:
        size: (D, H, W) in tokens.
        window: Largest window in tokens; an axis not longer than it is one unshifted window.
        shift: By how many tokens the windows are shifted.

    Returns:
        The table, with `counts` in the order of `regions`.
    """
    axes = [_axis(*lengths) for lengths in zip(size, window, shift, strict=True)]
    length = (axes[0][2], axes[1][2], axes[2][2])
    # Place (window, position) along each axis -> token along that axis, and region of the mask.
    tokens = _combined([np.where(token < extent, token, -1) for (token, _, _), extent in zip(axes, size, strict=True)],
                       size, length)  # fmt: skip
    # Three regions along an axis, as in MONAI's compute_mask.
    regions = _combined([region for _, region, _ in axes], (3, 3, 3), length)
    patterns, chosen = _patterns(regions)
    order = np.argsort(chosen, kind="stable")
    count = int(np.prod(size))
    fetch = tokens[order].ravel()
    fetch = np.where(fetch < 0, count, fetch)
    back = np.empty(count + 1, np.int64)
    back[fetch] = np.arange(len(fetch))
    counts = tuple(int(n) for n in np.bincount(chosen, minlength=len(patterns)))
    return WindowTable(length, fetch, back[:count], count, patterns, counts)


def _axis(size: int, window: int, shift: int) -> tuple[_Index, _Index, int]:
    """Along one axis: the token and the region of each place after padding and rolling, and the window's length."""
    if size <= window:
        window, shift = size, 0
    padded = -(-size // window) * window
    places = np.arange(padded)
    region = (places >= padded - window).astype(np.int64) + (places >= padded - shift) if shift else 0 * places
    return (places + shift) % padded, region, window


def _combined(axes: list[_Index], sizes: Size3, window: Size3) -> _Index:
    """(windows, n): indices along three axes as one flat index, window by window; -1 where an axis has -1."""
    d, h, w = np.meshgrid(*axes, indexing="ij")
    flat = np.where((d < 0) | (h < 0) | (w < 0), -1, (d * sizes[1] + h) * sizes[2] + w)
    a, b, c = (len(axis) // length for axis, length in zip(axes, window, strict=True))
    split = flat.reshape(a, window[0], b, window[1], c, window[2]).transpose(0, 2, 4, 1, 3, 5)
    return split.reshape(a * b * c, -1)


def _patterns(regions: _Index) -> tuple[_Index, _Index]:
    """Distinct masks: (patterns, n) regions numbered from 0 in order of appearance, and each window's pattern."""
    found: dict[bytes, int] = {}
    rows: list[_Index] = []
    chosen = []
    for row in regions:
        _, first, inverse = np.unique(row, return_index=True, return_inverse=True)
        named = np.argsort(np.argsort(first))[inverse]
        if named.tobytes() not in found:
            found[named.tobytes()] = len(rows)
            rows.append(named)
        chosen.append(found[named.tobytes()])
    return np.stack(rows), np.array(chosen)


def columns_of_merging(merging: Any) -> Tensor:
    """Which column of a merging's weights belongs to each channel, with neighbours in the array's order."""
    first, second = swin_unetr.PatchMerging.order, swin_unetr.PatchMergingV2.order
    order = first if type(merging).__name__ == "PatchMerging" else second
    width: int = merging.dim
    blocks = [order.index(offset) for offset in second]
    return torch.cat([torch.arange(block * width, (block + 1) * width) for block in blocks])
