"""Closed lines to the pixels inside them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ctflow.core.volume import FloatArray

Pixels = npt.NDArray[np.bool_]
_SIDES_AT_ONCE = 2**14  # each crosses as many rows as there are at most: a file of a stranger must not fill the memory


def filled(line: FloatArray, shape: tuple[int, int]) -> Pixels:
    """The pixels whose centres a closed line encloses, by the even-odd rule.

    Own code: scikit-image and matplotlib treat a centre on the line as inside or outside wherever it is, so that a
    keyhole's channel marks a row of the hole or leaves one of the region out; Pillow and OpenCV round points to pixels.
    Here a centre on the line counts at a region's upper and left sides alone, so that both banks of a channel cancel.

    Args:
        line: (n, 2) row and column of its points; the last is joined to the first.
        shape: (H, W); the line may lead outside.
    """
    height, width = shape
    down, across = line.T
    next_down, next_across = np.roll(down, -1), np.roll(across, -1)
    first = np.clip(np.ceil(np.minimum(down, next_down)), 0, height).astype(np.int64)
    last = np.clip(np.ceil(np.maximum(down, next_down)), 0, height).astype(np.int64)  # excluded
    inside: Pixels = np.zeros(shape, bool)
    top, bottom = int(first.min()), int(last.max())
    turns = np.zeros((bottom - top, width + 1), np.int32)
    for start in range(0, len(line), _SIDES_AT_ONCE):
        some = slice(start, start + _SIDES_AT_ONCE)
        crossed = (last - first)[some]
        side = start + np.repeat(np.arange(len(crossed)), crossed)
        row = np.arange(len(side)) - np.repeat(np.cumsum(crossed) - crossed, crossed) + first[side]
        share = (row - down[side]) / (next_down - down)[side]
        at = across[side] + share * (next_across - across)[side]
        np.add.at(turns, (row - top, np.clip(np.ceil(at), 0, width).astype(np.int64)), 1)
    inside[top:bottom] = turns.cumsum(axis=1)[:, :width] % 2 == 1
    return inside


def region_of_lines(lines: Sequence[FloatArray], shape: tuple[int, int], *, by_exclusion: bool) -> Pixels:
    """The region that several closed lines of a slice make.

    Args:
        lines: The lines, as of `filled`; one that is there twice counts once, unless it is excluded.
        shape: (H, W).
        by_exclusion: Whether they are combined by exclusive or. Otherwise one within what larger ones have made is a
            hole, and any other is added.
    """
    region: Pixels = np.zeros(shape, bool)
    if by_exclusion:
        for line in lines:
            region ^= filled(line, shape)
        return region
    known: dict[frozenset[tuple[float, ...]], tuple[int, npt.NDArray[np.uint8]]] = {}
    for line in lines:
        points = frozenset(map(tuple, line.tolist()))
        if points not in known:
            mask = filled(line, shape)
            known[points] = int(mask.sum()), np.packbits(mask)  # a file may have thousands
    for _, packed in sorted(known.values(), key=lambda each: -each[0]):
        mask = np.unpackbits(packed, count=region.size).reshape(shape).astype(bool)
        is_hole = not (mask & ~region).any()
        region = region & ~mask if is_hole else region | mask
    return region
