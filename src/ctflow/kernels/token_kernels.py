"""Triton kernels over tokens (B, T tokens, C channels), whose channels lie side by side; see `volume_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

NOTHING = tl.constexpr(-1e30)  # a score below every other


@triton.jit
def _layer_norm(x, mask, C, EPS):
    """Rows of x, whose masked places are zero, with mean 0 and variance 1 over C channels."""
    mean = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mean[:, None], 0.0)
    return centred * (1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + EPS))[:, None]


@triton.jit
def normalize_tokens(
    tokens, fetch, scale, shift, out, T, N, C, EPS,
    FETCH: tl.constexpr, AFFINE: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Layer norm of the tokens that `fetch` names for N places; a place that names T is zeros.

    6 C bytes a place where tokens are float32.
    """
    b = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, CP)
    t = tl.load(fetch + n, mask=n < N, other=0) if FETCH else n
    inside = (n < N) & (t < T)
    mask = inside[:, None] & (c < C)[None, :]
    x = tl.load(tokens + (b * T + t[:, None]).to(tl.int64) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    y = _layer_norm(x, mask, C, EPS)
    if AFFINE:
        y = y * tl.load(scale + c, mask=c < C, other=0.0)[None, :] + tl.load(shift + c, mask=c < C, other=0.0)[None, :]
    y = tl.where(inside[:, None], y, 0.0)
    at = (b * N + n[:, None]).to(tl.int64) * C + c[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=(n < N)[:, None] & (c < C)[None, :])


@triton.jit
def merge_tokens(tokens, scale, shift, out, D, H, W, C, EPS, CP: tl.constexpr, BN: tl.constexpr):
    """Eight neighbours of tokens (B, D, H, W, C) side by side, zeros beyond odd sizes; their layer norm.

    CP holds 8 C. 6 C bytes a token where tokens are float32.
    """
    b = tl.program_id(1)
    half_h, half_w = (H + 1) // 2, (W + 1) // 2
    count = (D + 1) // 2 * half_h * half_w
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    j = tl.arange(0, CP)
    neighbour, c = j // C, j % C
    d = (n // (half_h * half_w) * 2)[:, None] + (neighbour // 4)[None, :]
    h = (n // half_w % half_h * 2)[:, None] + (neighbour // 2 % 2)[None, :]
    w = (n % half_w * 2)[:, None] + (neighbour % 2)[None, :]
    whole = (n < count)[:, None] & (j < 8 * C)[None, :]
    at = (((b * D + d) * H + h) * W + w).to(tl.int64) * C + c[None, :]
    x = tl.load(tokens + at, mask=whole & (d < D) & (h < H) & (w < W), other=0.0).to(tl.float32)
    y = _layer_norm(x, whole, 8 * C, EPS)
    y = (
        y * tl.load(scale + j, mask=j < 8 * C, other=0.0)[None, :]
        + tl.load(shift + j, mask=j < 8 * C, other=0.0)[None, :]
    )
    tl.store(out + (b * count + n[:, None]).to(tl.int64) * 8 * C + j[None, :], y.to(out.dtype.element_ty), mask=whole)


@triton.jit
def add_tokens(tokens, x, back, out, T, N, C, FETCH: tl.constexpr, CP: tl.constexpr, BN: tl.constexpr):
    """Store tokens + x, of which `back` names the place of each token. 10 C bytes a token, float32 in and out."""
    b = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    c = tl.arange(0, CP)
    mask = (n < T)[:, None] & (c < C)[None, :]
    place = tl.load(back + n, mask=n < T, other=0) if FETCH else n
    at = (b * T + n[:, None]).to(tl.int64) * C + c[None, :]
    y = tl.load(tokens + at, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(x + (b * N + place[:, None]).to(tl.int64) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out + at, y, mask=mask)


@triton.jit
def attend(
    qkv, bias, regions, out, W, HEADS, MASKED_FROM, MASKED,
    N: tl.constexpr, NP: tl.constexpr, WIDTH: tl.constexpr, WP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM queries of one head in one window: softmax(q k' + bias [+ MASKED]) v, over BN keys at a time.

    Scores are logarithms to base 2: queries, bias and MASKED come multiplied by log2(e). The bias is (HEADS, NP, NP),
    its columns beyond N so small that their keys do not count. Windows before MASKED_FROM have one region only.

    4 N^2 WIDTH FLOP and N^2 exponentials a head and window; the bias is read from the L2 cache.
    """
    image, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)  # only the first axis may be long
    window = image % W
    C = HEADS * WIDTH
    base = qkv + image.to(tl.int64) * N * 3 * C + head * WIDTH
    i, k = block * BM + tl.arange(0, BM), tl.arange(0, WP)
    whole = (k < WIDTH)[None, :]
    q = tl.load(base + i[:, None] * 3 * C + k[None, :], mask=(i < N)[:, None] & whole, other=0.0)
    masked = window >= MASKED_FROM
    own = tl.load(regions + window * N + i, mask=i < N, other=0)
    best, total = tl.full((BM,), NOTHING, tl.float32), tl.zeros((BM,), tl.float32)
    seen = tl.zeros((BM, WP), tl.float32)
    for start in range(0, N, BN):
        j = start + tl.arange(0, BN)
        at = j[:, None] * 3 * C + k[None, :]
        keys = tl.load(base + C + at, mask=(j < N)[:, None] & whole, other=0.0)
        values = tl.load(base + 2 * C + at, mask=(j < N)[:, None] & whole, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="ieee")
        scores += tl.load(bias + (head * NP + i[:, None]) * NP + j[None, :]).to(tl.float32)
        if masked:
            others = tl.load(regions + window * N + j, mask=j < N, other=0)
            scores = tl.where(own[:, None] == others[None, :], scores, scores + MASKED)
        top = tl.maximum(best, tl.max(scores, 1))
        weights = tl.exp2(scores - top[:, None])
        kept = tl.exp2(best - top)
        total = total * kept + tl.sum(weights, 1)
        seen = seen * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
        best = top
    seen = seen / total[:, None]
    at = (image.to(tl.int64) * N + i[:, None]) * C + head * WIDTH + k[None, :]
    tl.store(out + at, seen.to(out.dtype.element_ty), mask=(i < N)[:, None] & whole)
