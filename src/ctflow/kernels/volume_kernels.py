"""Triton kernels over volumes (B, V voxels, C channels), whose channels lie side by side.

Names in capitals are sizes; those at a signature's end are constants of the compilation, of which CP is a power of two
that holds C. FLOP and bytes are counted for half precision. What each computes is
`ctflow.networks.operations.TorchOperations`; the launches are in `operations.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

SLOPE = tl.constexpr(0.01)


@triton.jit
def sum_channels(x, sums, V, C, PER, CP: tl.constexpr, BV: tl.constexpr):
    """Sums and sums of squares of PER voxels each, (B, parts, 2, C) float32.

    3 C FLOP and 2 C bytes a voxel.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    c = tl.program_id(2) * CP + tl.arange(0, CP)
    total, square = tl.zeros((BV, CP), tl.float32), tl.zeros((BV, CP), tl.float32)
    for start in range(0, PER, BV):
        v = part * PER + start + tl.arange(0, BV)
        inside = (v < V) & (start + tl.arange(0, BV) < PER)
        at = (b * V + v[:, None]).to(tl.int64) * C + c[None, :]
        value = tl.load(x + at, mask=inside[:, None] & (c < C)[None, :], other=0.0).to(tl.float32)
        total += value
        square += value * value
    at = (b * tl.num_programs(0) + part) * 2 * C + c
    tl.store(sums + at, tl.sum(total, 0), mask=c < C)
    tl.store(sums + at + C, tl.sum(square, 0), mask=c < C)


@triton.jit
def add_products(products, out, sums, V, C, TOTAL, SPLITS, CP: tl.constexpr, BV: tl.constexpr):
    """Volumes (SPLITS, B, V, C) float32, each of TOTAL numbers, added to one; and its sums as `sum_channels`.

    (SPLITS + 3) C FLOP and (4 SPLITS + 2) C bytes a voxel.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    v, c = part * BV + tl.arange(0, BV), tl.program_id(2) * CP + tl.arange(0, CP)
    at = (b * V + v[:, None]).to(tl.int64) * C + c[None, :]
    inside = (v < V)[:, None] & (c < C)[None, :]
    value, place = tl.zeros((BV, CP), tl.float32), at
    for _ in range(0, SPLITS):
        value += tl.load(products + place, mask=inside, other=0.0)
        place += TOTAL
    tl.store(out + at, value, mask=inside)
    at = (b * tl.num_programs(0) + part) * 2 * C + c
    tl.store(sums + at, tl.sum(value, 0), mask=c < C)
    tl.store(sums + at + C, tl.sum(value * value, 0), mask=c < C)


@triton.jit
def norm_from_sums(
    sums, own_scale, own_shift, norm, P, C, COUNT, EPS, AFFINE: tl.constexpr, CP: tl.constexpr, BP: tl.constexpr
):
    """Scale and shift (B, 2, C) of the instance norm of COUNT voxels, from the sums of P parts, and of its own ones.

    Added in float64: the variance is a small difference where the mean is large.
    """
    b = tl.program_id(0)
    c = tl.program_id(1) * CP + tl.arange(0, CP)
    total, square = tl.zeros((CP,), tl.float64), tl.zeros((CP,), tl.float64)
    for start in range(0, P, BP):
        part = start + tl.arange(0, BP)
        at = (b * P + part[:, None]) * 2 * C + c[None, :]
        inside = (part < P)[:, None] & (c < C)[None, :]
        total += tl.sum(tl.load(sums + at, mask=inside, other=0.0).to(tl.float64), 0)
        square += tl.sum(tl.load(sums + at + C, mask=inside, other=0.0).to(tl.float64), 0)
    mean = total / COUNT
    variance = tl.maximum(square / COUNT - mean * mean, 0.0)
    scale = 1.0 / tl.sqrt(variance + EPS)
    if AFFINE:
        scale = scale * tl.load(own_scale + c, mask=c < C, other=0.0).to(tl.float64)
    shift = -mean * scale
    if AFFINE:
        shift += tl.load(own_shift + c, mask=c < C, other=0.0).to(tl.float64)
    tl.store(norm + b * 2 * C + c, scale.to(tl.float32), mask=c < C)
    tl.store(norm + b * 2 * C + C + c, shift.to(tl.float32), mask=c < C)


@triton.jit
def _product(x, weight, rows, inside, K, C, KP: tl.constexpr, CP: tl.constexpr):
    """(BV, CP) float32: voxels' K channels times (K, C) weights."""
    k, c = tl.arange(0, KP), tl.arange(0, CP)
    a = tl.load(x + rows[:, None] * K + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
    w = tl.load(weight + k[:, None] * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0)
    return tl.dot(a, w, input_precision="ieee")


@triton.jit
def sum_pointwise(
    x, weight, y, other, sums, V, C, KX, KY, PER,
    TWO: tl.constexpr, KXP: tl.constexpr, KYP: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Sums, as `sum_channels`, of a 1 x 1 x 1 convolution of one or two shares of channels; it is not stored.

    2 K C FLOP and 2 K bytes a voxel.
    """
    part, b = tl.program_id(0), tl.program_id(1)
    c = tl.arange(0, CP)
    total, square = tl.zeros((BV, CP), tl.float32), tl.zeros((BV, CP), tl.float32)
    for start in range(0, PER, BV):
        v = part * PER + start + tl.arange(0, BV)
        inside = (v < V) & (start + tl.arange(0, BV) < PER)
        rows = (b * V + v).to(tl.int64)
        value = _product(x, weight, rows, inside, KX, C, KXP, CP)
        if TWO:
            value += _product(y, other, rows, inside, KY, C, KYP, CP)
        total += value
        square += value * value
    at = (b * tl.num_programs(0) + part) * 2 * C + c
    tl.store(sums + at, tl.sum(total, 0), mask=c < C)
    tl.store(sums + at + C, tl.sum(square, 0), mask=c < C)


@triton.jit
def add_residual(z, norm, x, beside, out, V, C, NORMED: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr):
    """Store leaky(z normalised + x), with NORMED x normalised by `beside`. 6 C bytes a voxel."""
    b = tl.program_id(1)
    v, c = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, CP)
    mask = (v < V)[:, None] & (c < C)[None, :]
    at = (b * V + v).to(tl.int64)[:, None] * C + c[None, :]
    of = b * 2 * C + c
    value = tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(norm + of, mask=c < C, other=0.0)[None, :]
    value += tl.load(norm + of + C, mask=c < C, other=0.0)[None, :]
    other = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if NORMED:
        other = other * tl.load(beside + of, mask=c < C, other=0.0)[None, :]
        other += tl.load(beside + of + C, mask=c < C, other=0.0)[None, :]
    value += other
    value = tl.where(value > 0, value, value * SLOPE)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_channel(z, norm, x, sums, weight, out, V, C, EPS, CP: tl.constexpr, BV: tl.constexpr):
    """Store leaky(z normalised + (x weight) normalised) of one channel x (B, V) float32; `sums` (B, 2) float64.

    4 C + 4 bytes a voxel.
    """
    b = tl.program_id(1)
    v, c = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, CP)
    mask = (v < V)[:, None] & (c < C)[None, :]
    mean = tl.load(sums + 2 * b) / V
    variance = tl.load(sums + 2 * b + 1) / V - mean * mean
    w = tl.load(weight + c, mask=c < C, other=0.0)
    w = w / tl.sqrt(w * w * tl.maximum(variance, 0.0).to(tl.float32) + EPS)
    of, at = b * 2 * C + c, (b * V + v).to(tl.int64)
    value = tl.load(z + at[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(norm + of, mask=c < C, other=0.0)[None, :]
    value += tl.load(norm + of + C, mask=c < C, other=0.0)[None, :]
    value += (tl.load(x + at, mask=v < V, other=0.0) - mean.to(tl.float32))[:, None] * w[None, :]
    value = tl.where(value > 0, value, value * SLOPE)
    tl.store(out + at[:, None] * C + c[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _voxels_of_part(z, start, b, V, C, PER, CP: tl.constexpr, BV: tl.constexpr):
    """(BV, CP): the voxels from `start` on of this program's PER; those behind its last are zeros."""
    n, c = start + tl.arange(0, BV), tl.arange(0, CP)
    v = tl.program_id(0) * PER + n
    at = (b * V + v).to(tl.int64)[:, None] * C + c[None, :]
    return tl.load(z + at, mask=((v < V) & (n < PER))[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def add_pointwise(
    z, norm, x, weight, y, other, beside, head, shift, out, V, C, KX, KY, O, PER,
    TWO: tl.constexpr, HEAD: tl.constexpr, KXP: tl.constexpr, KYP: tl.constexpr, CP: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Store leaky(z normalised + (x weight + y other) normalised by `beside`) of PER voxels.

    With HEAD, what is stored is (B, O, V) float32 of (O, C) head and (O,) shift. 2 K C FLOP, 2 (K + 2 C) bytes a voxel.
    Triton begins the loop's loads of its products' factors early, and no others: z is loaded a step ahead here.
    """
    b, c = tl.program_id(1), tl.arange(0, CP)
    of = b * 2 * C + c
    scale = tl.load(norm + of, mask=c < C, other=0.0)
    scale_beside = tl.load(beside + of, mask=c < C, other=0.0)
    offset = tl.load(norm + of + C, mask=c < C, other=0.0) + tl.load(beside + of + C, mask=c < C, other=0.0)
    ahead = _voxels_of_part(z, 0, b, V, C, PER, CP, BV)
    for start in range(0, PER, BV):
        v = tl.program_id(0) * PER + start + tl.arange(0, BV)
        inside = (v < V) & (start + tl.arange(0, BV) < PER)
        rows = (b * V + v).to(tl.int64)
        value = ahead.to(tl.float32) * scale[None, :] + offset[None, :]
        ahead = _voxels_of_part(z, start + BV, b, V, C, PER, CP, BV)
        added = _product(x, weight, rows, inside, KX, C, KXP, CP)
        if TWO:
            added += _product(y, other, rows, inside, KY, C, KYP, CP)
        value += added * scale_beside[None, :]
        value = tl.where(value > 0, value, value * SLOPE)
        if HEAD:
            for o in range(O):
                row = tl.load(head + o * C + c, mask=c < C, other=0.0)
                logit = tl.sum(value * row[None, :], 1) + tl.load(shift + o)
                tl.store(out + (b * O + o).to(tl.int64) * V + v, logit, mask=inside)
        else:
            at = rows[:, None] * C + c[None, :]
            tl.store(out + at, value.to(out.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def activate(x, norm, out, V, C, CP: tl.constexpr, BV: tl.constexpr):
    """Store leaky(x normalised). 4 C bytes a voxel."""
    b = tl.program_id(1)
    v, c = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, CP)
    mask = (v < V)[:, None] & (c < C)[None, :]
    at = (b * V + v[:, None]).to(tl.int64) * C + c[None, :]
    of = b * 2 * C + c
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(norm + of, mask=c < C, other=0.0)[None, :]
    value += tl.load(norm + of + C, mask=c < C, other=0.0)[None, :]
    value = tl.where(value > 0, value, value * SLOPE)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def activate_head(
    x, norm, head, added, out, V, C, O, CP: tl.constexpr, BO: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Store (O, C) head and (O,) `added` of leaky(x normalised) as (B, O, V) float32.

    2 C O FLOP and 2 C + 4 O bytes a voxel.
    The head's numbers are rounded to the volume's type, in two parts: nearly as exact as float32.
    """
    b = tl.program_id(1)
    v, c = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, CP)
    mask = (v < V)[:, None] & (c < C)[None, :]
    at = (b * V + v[:, None]).to(tl.int64) * C + c[None, :]
    of = b * 2 * C + c
    value = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = value * tl.load(norm + of, mask=c < C, other=0.0)[None, :]
    value += tl.load(norm + of + C, mask=c < C, other=0.0)[None, :]
    value = tl.where(value > 0, value, value * SLOPE).to(x.dtype.element_ty)
    for start in range(0, O, BO):
        o = start + tl.arange(0, BO)
        whole = (c < C)[:, None] & (o < O)[None, :]
        w = tl.load(head + o[None, :] * C + c[:, None], mask=whole, other=0.0)
        first = w.to(value.dtype)
        logits = tl.dot(value, first, input_precision="ieee")
        logits += tl.dot(value, (w - first.to(tl.float32)).to(value.dtype), input_precision="ieee")
        logits += tl.load(added + o, mask=o < O, other=0.0)[None, :]
        to = (b * O + o[None, :]).to(tl.int64) * V + v[:, None]
        tl.store(out + to, logits, mask=(v < V)[:, None] & (o < O)[None, :])


@triton.jit
def fill_channels(x, out, V, C, O, CP: tl.constexpr, BV: tl.constexpr):
    """Volumes (B, C, V) float32 as (B, V, O), the last channels zeros. 4 C + 2 O bytes a voxel."""
    b = tl.program_id(1)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    c = tl.arange(0, CP)
    at = (b * C + c[None, :]).to(tl.int64) * V + v[:, None]
    value = tl.load(x + at, mask=(v < V)[:, None] & (c < C)[None, :], other=0.0)
    at = (b * V + v[:, None]).to(tl.int64) * O + c[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(v < V)[:, None] & (c < O)[None, :])


@triton.jit
def spread_neighbours(x, out, V, H, W, O, CP: tl.constexpr, BV: tl.constexpr):
    """Volumes (B, V) float32 of planes (H, W) as (B, V, O): of each voxel the 3 x 3 of its plane around it, and zeros.

    4 + 2 O bytes a voxel.
    """
    b = tl.program_id(1)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    c = tl.arange(0, CP)
    h, w = (v // W % H)[:, None] + (c // 3 - 1)[None, :], (v % W)[:, None] + (c % 3 - 1)[None, :]
    inside = (v < V)[:, None] & (c < 9)[None, :] & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    at = (b * V + v[:, None]).to(tl.int64) + ((c // 3 - 1) * W + c % 3 - 1)[None, :]
    value = tl.load(x + at, mask=inside, other=0.0)
    at = (b * V + v[:, None]).to(tl.int64) * O + c[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(v < V)[:, None] & (c < O)[None, :])


@triton.jit
def upsample(
    x, weight, added, out, V, D, H, W, K, C, BLOCKS,
    SHIFTED: tl.constexpr, WHOLE: tl.constexpr, PAIRS: tl.constexpr,
    KP: tl.constexpr, BC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Transposed 2 x 2 x 2 convolution of stride 2: each voxel's products go straight to their four pairs of places.

    C are the channels of a pair, which lie side by side. A program computes PAIRS of the four; where KP holds all K
    (WHOLE) it reads its voxels once. 8 K C FLOP and 2 K + 8 C bytes a voxel of x; weight is (K, 4, C). With SHIFTED
    plus (C,) `added`.
    """
    first, b = tl.program_id(1) // BLOCKS * PAIRS, tl.program_id(2)
    v = tl.program_id(0) * BV + tl.arange(0, BV)
    k, c = tl.arange(0, KP), tl.program_id(1) % BLOCKS * BC + tl.arange(0, BC)
    d, h, w = v // (H * W), v // W % H, v % W
    mask = (v < V)[:, None] & (c < C)[None, :]
    rows = (b * V + v[:, None]).to(tl.int64) * K
    a = tl.load(x + rows + k[None, :], mask=(v < V)[:, None] & (k < K)[None, :], other=0.0)
    for place in tl.static_range(PAIRS):
        pair = first + place
        m = tl.load(
            weight + (k[:, None] * 4 + pair) * C + c[None, :], mask=(k < K)[:, None] & (c < C)[None, :], other=0.0
        )
        total = tl.dot(a, m, input_precision="ieee")
        if not WHOLE:
            for start in range(KP, K, KP):
                row = start + k
                e = tl.load(x + rows + row[None, :], mask=(v < V)[:, None] & (row < K)[None, :], other=0.0)
                at = (row[:, None] * 4 + pair) * C + c[None, :]
                m = tl.load(weight + at, mask=(row < K)[:, None] & (c < C)[None, :], other=0.0)
                total += tl.dot(e, m, input_precision="ieee")
        if SHIFTED:
            total += tl.load(added + c, mask=c < C, other=0.0)[None, :]
        at = ((b * 2 * D + 2 * d + pair // 2) * 2 * H + 2 * h + pair % 2).to(tl.int64) * W + w
        tl.store(out + at[:, None] * C + c[None, :], total.to(out.dtype.element_ty), mask=mask)
