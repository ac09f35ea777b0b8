"""Streamed attention statistics on a GPU, in Triton. Its tests pass on an H100, and interpreted.

The sums are those of `cpu.py`. A program holds a block of rows in registers and walks over the keys they see. The rows
of one key/value head are its queries times the H/G query heads that share it, heads fastest, so every key and value is
read once for all of them and a single query still fills a matrix product. Which keys a query sees is a range
[first, last), non-decreasing over the queries: a row block needs a mask only at the two edges of what it sees.

Few rows over many keys (decoding) cannot fill the device with row blocks. Then the keys are split over programs and a
second kernel merges the partial sums by the exact rule. Keys may lie in pages. The backward pass computes weights again
from M in two kernels, one owning keys and one owning queries: no atomics, so gradients are the same in every run.

Products take the storage dtype and add up in float32; float32 goes through three TF32 products, whose error is near
float32's own. Gradients arrive at the products in the storage dtype too: float16 needs the usual loss scaling.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import unit_stride
from atma.ops.operator import operator
from atma.ops.polar.operator import statistics_operator

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROCESSORS = 132
"""Multiprocessors of an H100 or H200. A constant, so that the same shapes give the same sums on any device."""
MOST_SPLITS = 256
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)
"""The maximum over no keys. Finite, so that two of them differ by 0 and not by NaN; its weight beside any key is 0."""


class Tiles(NamedTuple):
    """The block a program works on: rows, keys, and how many warps and pipeline stages carry it."""

    rows: int
    keys: int
    warps: int
    stages: int


FORWARD = {
    16: Tiles(128, 64, 4, 3),
    32: Tiles(128, 64, 4, 3),
    64: Tiles(128, 64, 4, 3),
    128: Tiles(128, 128, 8, 2),
    256: Tiles(128, 32, 8, 2),
}
KEY_GRADIENT = {
    16: Tiles(64, 128, 4, 2),
    32: Tiles(64, 128, 8, 3),
    64: Tiles(64, 128, 8, 3),
    128: Tiles(32, 128, 8, 3),
    256: Tiles(32, 64, 8, 2),
}
QUERY_GRADIENT = {
    16: Tiles(128, 64, 4, 3),
    32: Tiles(128, 64, 4, 3),
    64: Tiles(128, 64, 8, 3),
    128: Tiles(128, 64, 8, 2),
    256: Tiles(64, 32, 8, 2),
}
"""The three kernels' blocks by head width, in 16 bits: what fits an H100's registers and shared memory, unmeasured."""
SINGLE = {
    16: Tiles(64, 32, 4, 2),
    32: Tiles(64, 32, 4, 2),
    64: Tiles(64, 32, 8, 2),
    128: Tiles(32, 32, 8, 2),
    256: Tiles(16, 16, 4, 1),
}  # all three kernels in float32


def tiles(table: dict[int, Tiles], width: int, dtype: torch.dtype) -> Tiles:
    """The block for a head width and a storage dtype."""
    return SINGLE[width] if dtype == torch.float32 else table[width]


def forward_tiles(rows: int, width: int, dtype: torch.dtype) -> Tiles:
    """As `tiles`, with a row block no larger than `rows` asks for: decoding is bound by reading keys."""
    usual = tiles(FORWARD, width, dtype)
    if rows > usual.rows // 2:
        return usual
    keys = usual.keys if dtype == torch.float32 else max(32, min(128, 8192 // width))
    return Tiles(max(16, triton.next_power_of_2(rows)), keys, 4, usual.stages if dtype == torch.float32 else 3)


def splits_for(programs: int, keys: int, block: int) -> int:
    """Over how many programs to split the keys of each row block: a function of shapes alone.

    1 unless the row blocks of all heads leave half the processors idle; then two programs a processor, each with at
    least four key blocks.
    """
    if 2 * programs > PROCESSORS:
        return 1
    return max(1, min(2 * PROCESSORS // programs, keys // (4 * block), MOST_SPLITS))


@triton.jit
def _row_span(first, last, block, length, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Of a row block: keys that any row sees, [low, high), and keys that all rows see, [inner_low, inner_high)."""
    earliest = block * ROWS // GROUP
    latest = (tl.minimum(block * ROWS + ROWS, length * GROUP) - 1) // GROUP
    low, high = tl.load(first + earliest), tl.load(last + latest)
    inner_low, inner_high = tl.load(first + latest), tl.load(last + earliest)
    return low, high, inner_low, inner_high


@triton.jit
def _walk(low, high, inner_low, inner_high, part, parts, BLOCK: tl.constexpr):
    """Blocks of `part` out of `parts` of [low, high): begin and end, and within it those that need no mask."""
    begin, end = low // BLOCK, tl.cdiv(high, BLOCK)
    each = tl.cdiv(end - begin, parts)
    begin = tl.minimum(begin + part * each, end)
    end = tl.minimum(begin + each, end)
    inner_begin = tl.minimum(tl.maximum(tl.cdiv(inner_low, BLOCK), begin), end)
    inner_end = tl.maximum(tl.minimum(inner_high // BLOCK, end), inner_begin)
    return begin, end, inner_begin, inner_end


@triton.jit
def _rows_of(block, head, length, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Row numbers of a block, their query heads and queries (int64), and which rows exist; the rest repeat the last."""
    rows = block * ROWS + tl.arange(0, ROWS)
    valid = rows < length * GROUP
    rows = tl.minimum(rows, length * GROUP - 1)
    return (head * GROUP + rows % GROUP).to(tl.int64), (rows // GROUP).to(tl.int64), valid


@triton.jit
def _load_keys(
    x, index, start, held, columns, stride, page_stride, table,
    KEYS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(KEYS, K): keys or values start … start + KEYS − 1, which lie in one piece (PAGE 0) or in pages of PAGE keys."""
    if PAGE > 0:
        page = tl.load(table + index // PAGE, held, 0) if MASKED else tl.load(table + index // PAGE)
        x += (page.to(tl.int64) * page_stride + index % PAGE * stride)[:, None] + columns[None, :]
    else:
        x += start.to(tl.int64) * stride
        x += (tl.arange(0, KEYS) * stride)[:, None] + columns[None, :]
    if MASKED:
        return tl.load(x, mask=held[:, None], other=0.0)
    return tl.load(x)


@triton.jit
def _add_keys(
    S, L, Q, M, q, scale, first, last, low, high, k, v, table, k_strides, v_strides, begin, count, gap_at, gap,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The statistics after `count` more key blocks from `begin` on, of which the `gap_at`-th skips `gap` blocks."""
    columns = tl.arange(0, WIDTH)
    for i in tl.range(0, count):
        start = begin + i
        if MASKED:
            start += tl.where(i >= gap_at, gap, 0)
        start *= KEYS
        index = start + tl.arange(0, KEYS)
        held = (index >= low) & (index < high)
        keys = _load_keys(k, index, start, held, columns, k_strides[2], k_strides[0], table, KEYS, PAGE, MASKED)
        a = tl.dot(q, tl.trans(keys), input_precision="tf32x3")
        if MASKED:
            seen = (index[None, :] >= first[:, None]) & (index[None, :] < last[:, None])
            # Scaled before it is masked: −∞ times a scale of 0 would be NaN.
            a = tl.where(seen, a * scale[:, None], float("-inf"))
            # The running maximum M; logits are to base 2, with log₂e in `scale`.
            top = tl.maximum(M, tl.max(a, 1))
            p = tl.exp2(a - top[:, None])
        else:
            top = tl.maximum(M, tl.max(a, 1) * scale)
            p = tl.exp2(a * scale[:, None] - top[:, None])
        # L and S shrink by α = 2^(M_old − M_new), Q by α².
        alpha = tl.exp2(M - top)
        L = L * alpha + tl.sum(p, 1)
        Q = Q * (alpha * alpha) + tl.sum(p * p, 1)
        M = top
        values = _load_keys(v, index, start, held, columns, v_strides[2], v_strides[0], table, KEYS, PAGE, MASKED)
        S = tl.dot(p.to(values.dtype), values, S * alpha[:, None], input_precision="tf32x3")
    return S, L, Q, M


@triton.jit(do_not_specialize=["pages", "splits"])
def _forward_kernel(
    q, k, v, scale, first, last, table, S_out, L_out, Q_out, M_out, q_strides, k_strides, v_strides, scale_strides,
    length, groups, pages, splits,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """One row block of one key/value head over one split of its keys; the blocks that see most start first."""
    blocks = tl.cdiv(length * GROUP, ROWS)
    block = blocks - 1 - tl.program_id(0) % blocks
    split = tl.program_id(0) // blocks % splits
    pair = tl.program_id(0) // (blocks * splits)
    batch, head = (pair // groups).to(tl.int64), pair % groups
    first += batch * length
    last += batch * length
    low, high, inner_low, inner_high = _row_span(first, last, block, length, GROUP, ROWS)
    begin, end, inner_begin, inner_end = _walk(low, high, inner_low, inner_high, split, splits, KEYS)

    heads, queries, valid = _rows_of(block, head, length, GROUP, ROWS)
    columns = tl.arange(0, WIDTH)
    q += batch * q_strides[0] + (heads * q_strides[1] + queries * q_strides[2])[:, None] + columns[None, :]
    queries_held = tl.load(q, mask=valid[:, None], other=0.0)
    factor = tl.load(scale + batch * scale_strides[0] + heads * scale_strides[1] + queries * scale_strides[2])
    # With the sign moved into q the factor is at least 0, so the largest logit is the factor times the largest product.
    sign = tl.where(factor < 0, -1.0, 1.0)
    queries_held = (queries_held.to(tl.float32) * sign[:, None]).to(q.dtype.element_ty)
    factor = tl.abs(factor) * LOG2E
    row_first, row_last = tl.load(first + queries), tl.load(last + queries)
    if PAGE > 0:
        table += batch * pages
        k += head.to(tl.int64) * k_strides[1]
        v += head.to(tl.int64) * v_strides[1]
    else:
        k += batch * k_strides[0] + head.to(tl.int64) * k_strides[1]
        v += batch * v_strides[0] + head.to(tl.int64) * v_strides[1]

    S, M = tl.zeros([ROWS, WIDTH], tl.float32), tl.full([ROWS], NOTHING, tl.float32)
    L, Q = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    inner = inner_end - inner_begin
    S, L, Q, M = _add_keys(
        S, L, Q, M, queries_held, factor, row_first, row_last, low, high, k, v, table, k_strides, v_strides,
        inner_begin, inner, 0, 0, KEYS, WIDTH, PAGE, False,
    )  # fmt: skip
    S, L, Q, M = _add_keys(
        S, L, Q, M, queries_held, factor, row_first, row_last, low, high, k, v, table, k_strides, v_strides,
        begin, end - begin - inner, inner_begin - begin, inner, KEYS, WIDTH, PAGE, True,
    )  # fmt: skip

    rows = tl.num_programs(0) // (blocks * splits) * GROUP
    out = (split.to(tl.int64) * rows + batch * groups * GROUP + heads) * length + queries
    tl.store(S_out + out[:, None] * WIDTH + columns[None, :], S, mask=valid[:, None])
    tl.store(L_out + out, L, mask=valid)
    tl.store(Q_out + out, Q, mask=valid)
    tl.store(M_out + out, M * LN2, mask=valid)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    S_parts, L_parts, Q_parts, M_parts, S_out, L_out, Q_out, M_out, rows, splits,
    WIDTH: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row out of its partial statistics (splits, rows, …), in the order of the splits."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    top = tl.full([CHUNK], NOTHING, tl.float32)
    for i in tl.range(0, splits, CHUNK):
        part = i + tl.arange(0, CHUNK)
        top = tl.maximum(top, tl.load(M_parts + part.to(tl.int64) * rows + row, mask=part < splits, other=NOTHING))
    M = tl.max(top, 0)
    S = tl.zeros([CHUNK, WIDTH], tl.float32)
    L, Q = tl.zeros([CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32)
    for i in tl.range(0, splits, CHUNK):
        part = i + tl.arange(0, CHUNK)
        at = part.to(tl.int64) * rows + row
        # Disjoint keys: each part shrinks to the common M, then L, Q and S add.
        alpha = tl.exp2((tl.load(M_parts + at, mask=part < splits, other=NOTHING) - M) * LOG2E)
        L += alpha * tl.load(L_parts + at, mask=part < splits, other=0.0)
        Q += alpha * alpha * tl.load(Q_parts + at, mask=part < splits, other=0.0)
        partial = tl.load(S_parts + at[:, None] * WIDTH + columns[None, :], mask=(part < splits)[:, None], other=0.0)
        S += alpha[:, None] * partial
    tl.store(S_out + row * WIDTH + columns, tl.sum(S, 0))
    tl.store(L_out + row, tl.sum(L, 0))
    tl.store(Q_out + row, tl.sum(Q, 0))
    tl.store(M_out + row, M)


@triton.jit
def _add_rows(
    dk, dv, keys, values, index, q, g, packed, first, last, q_strides, head, length, plane, begin, count, gap_at,
    gap,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The gradients of a key block after `count` more row blocks from `begin` on; `gap` as in `_add_keys`."""
    columns = tl.arange(0, WIDTH)[None, :]
    for i in tl.range(0, count):
        block = begin + i
        if MASKED:
            block += tl.where(i >= gap_at, gap, 0)
        rows = block * ROWS + tl.arange(0, ROWS)
        heads, queries = (head * GROUP + rows % GROUP).to(tl.int64), (rows // GROUP).to(tl.int64)
        q_at = q + (heads * q_strides[1] + queries * q_strides[2])[:, None] + columns
        g_at = g + ((heads * length + queries) * WIDTH)[:, None] + columns
        # Each load stands just before its use: the four factors a row together would not fit the registers.
        if MASKED:
            valid = rows < length * GROUP
            q_rows = tl.load(q_at, valid[:, None], 0.0)
            factor, top = tl.load(packed + rows, valid, 0.0), tl.load(packed + plane + rows, valid, 0.0)
        else:
            q_rows = tl.load(q_at)
            factor, top = tl.load(packed + rows), tl.load(packed + plane + rows)
        logits = tl.dot(keys, tl.trans(q_rows), input_precision="tf32x3") * factor[None, :] - top[None, :]
        if MASKED:
            row_first, row_last = tl.load(first + queries, valid, 0), tl.load(last + queries, valid, 0)
            seen = (index[:, None] >= row_first[None, :]) & (index[:, None] < row_last[None, :])
            logits = tl.where(seen, logits, float("-inf"))
        # The weights again, from M: p = 2^(a − M).
        p = tl.exp2(logits)
        g_rows = tl.load(g_at, valid[:, None], 0.0) if MASKED else tl.load(g_at)
        # dp = g_S·v, already times the scale, as g_L and g_Q are packed: da is then the gradient of q·k.
        dp = tl.dot(values, tl.trans(g_rows), input_precision="tf32x3") * (factor * LN2)[None, :]
        dv = tl.dot(p.to(g_rows.dtype), g_rows, dv, input_precision="tf32x3")
        if MASKED:
            g_L = tl.load(packed + 2 * plane + rows, valid, 0.0)
            g_Q = tl.load(packed + 3 * plane + rows, valid, 0.0)
        else:
            g_L, g_Q = tl.load(packed + 2 * plane + rows), tl.load(packed + 3 * plane + rows)
        # da = p (g_S·v + g_L + 2 p g_Q); the 2 is in g_Q.
        da = (dp + (g_L[None, :] + g_Q[None, :] * p)) * p
        if MASKED:
            da = tl.where(seen, da, 0.0)
        dk = tl.dot(da.to(q_rows.dtype), q_rows, dk, input_precision="tf32x3")
    return dk, dv


@triton.jit
def _key_gradient_kernel(
    q, k, v, g, packed, first, last, bounds, grad_k, grad_v, q_strides, k_strides, v_strides, length, capacity,
    groups,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values, summed over all rows that see it; 0 where none does."""
    blocks = tl.cdiv(capacity, KEYS)
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = (pair // groups).to(tl.int64), pair % groups
    bounds += (batch * blocks + block) * 4
    low, high = tl.load(bounds) * GROUP, tl.load(bounds + 1) * GROUP
    inner_low, inner_high = tl.load(bounds + 2) * GROUP, tl.load(bounds + 3) * GROUP
    begin, end, inner_begin, inner_end = _walk(low, high, inner_low, inner_high, 0, 1, ROWS)

    index = block * KEYS + tl.arange(0, KEYS)
    held = (index < capacity)[:, None]
    columns = tl.arange(0, WIDTH)[None, :]
    wide = index.to(tl.int64)[:, None]
    k += batch * k_strides[0] + head.to(tl.int64) * k_strides[1]
    v += batch * v_strides[0] + head.to(tl.int64) * v_strides[1]
    keys = tl.load(k + wide * k_strides[2] + columns, mask=held, other=0.0)
    values = tl.load(v + wide * v_strides[2] + columns, mask=held, other=0.0)

    q += batch * q_strides[0]
    g += batch * groups * GROUP * length * WIDTH
    first += batch * length
    last += batch * length
    packed += pair.to(tl.int64) * GROUP * length
    plane = (tl.num_programs(0) // blocks).to(tl.int64) * GROUP * length
    dk, dv = tl.zeros([KEYS, WIDTH], tl.float32), tl.zeros([KEYS, WIDTH], tl.float32)
    inner = inner_end - inner_begin
    dk, dv = _add_rows(
        dk, dv, keys, values, index, q, g, packed, first, last, q_strides, head, length, plane,
        inner_begin, inner, 0, 0, GROUP, WIDTH, ROWS, False,
    )  # fmt: skip
    dk, dv = _add_rows(
        dk, dv, keys, values, index, q, g, packed, first, last, q_strides, head, length, plane,
        begin, end - begin - inner, inner_begin - begin, inner, GROUP, WIDTH, ROWS, True,
    )  # fmt: skip
    out = (pair.to(tl.int64) * capacity + wide) * WIDTH + columns
    tl.store(grad_k + out, dk.to(grad_k.dtype.element_ty), mask=held)
    tl.store(grad_v + out, dv.to(grad_v.dtype.element_ty), mask=held)


@triton.jit
def _add_key_slopes(
    total, q, g, factor, top, g_L, g_Q, first, last, low, high, k, v, k_stride, v_stride, begin, count, gap_at, gap,
    KEYS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Σ da·k after `count` more key blocks from `begin` on; `gap` as in `_add_keys`."""
    columns = tl.arange(0, WIDTH)
    for i in tl.range(0, count):
        start = begin + i
        if MASKED:
            start += tl.where(i >= gap_at, gap, 0)
        start *= KEYS
        index = start + tl.arange(0, KEYS)
        held = (index >= low) & (index < high)
        keys = _load_keys(k, index, start, held, columns, k_stride, 0, k, KEYS, 0, MASKED)
        values = _load_keys(v, index, start, held, columns, v_stride, 0, v, KEYS, 0, MASKED)
        logits = tl.dot(q, tl.trans(keys), input_precision="tf32x3") * factor[:, None] - top[:, None]
        if MASKED:
            seen = (index[None, :] >= first[:, None]) & (index[None, :] < last[:, None])
            logits = tl.where(seen, logits, float("-inf"))
        p = tl.exp2(logits)
        dp = tl.dot(g, tl.trans(values), input_precision="tf32x3")
        da = (dp + g_L[:, None] + g_Q[:, None] * p) * p
        total = tl.dot(da.to(keys.dtype), keys, total, input_precision="tf32x3")
    return total


@triton.jit
def _query_gradient_kernel(
    q, k, v, scale, first, last, M, grad_S, grad_L, grad_Q, grad_q, grad_scale, q_strides, k_strides, v_strides,
    scale_strides, length, groups,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Gradients of one row block's queries and scales."""
    blocks = tl.cdiv(length * GROUP, ROWS)
    block, pair = blocks - 1 - tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = (pair // groups).to(tl.int64), pair % groups
    first += batch * length
    last += batch * length
    low, high, inner_low, inner_high = _row_span(first, last, block, length, GROUP, ROWS)
    begin, end, inner_begin, inner_end = _walk(low, high, inner_low, inner_high, 0, 1, KEYS)

    heads, queries, valid = _rows_of(block, head, length, GROUP, ROWS)
    columns = tl.arange(0, WIDTH)[None, :]
    row = (batch * groups * GROUP + heads) * length + queries
    q += batch * q_strides[0] + (heads * q_strides[1] + queries * q_strides[2])[:, None] + columns
    q_rows = tl.load(q, mask=valid[:, None], other=0.0)
    g = tl.load(grad_S + row[:, None] * WIDTH + columns, mask=valid[:, None], other=0.0)
    factor = tl.load(scale + batch * scale_strides[0] + heads * scale_strides[1] + queries * scale_strides[2])
    top, g_L, g_Q = tl.load(M + row) * LOG2E, tl.load(grad_L + row), tl.load(grad_Q + row) * 2
    row_first, row_last = tl.load(first + queries), tl.load(last + queries)
    k += batch * k_strides[0] + head.to(tl.int64) * k_strides[1]
    v += batch * v_strides[0] + head.to(tl.int64) * v_strides[1]

    total = tl.zeros([ROWS, WIDTH], tl.float32)
    inner = inner_end - inner_begin
    total = _add_key_slopes(
        total, q_rows, g, factor * LOG2E, top, g_L, g_Q, row_first, row_last, low, high, k, v, k_strides[2],
        v_strides[2], inner_begin, inner, 0, 0, KEYS, WIDTH, False,
    )  # fmt: skip
    total = _add_key_slopes(
        total, q_rows, g, factor * LOG2E, top, g_L, g_Q, row_first, row_last, low, high, k, v, k_strides[2],
        v_strides[2], begin, end - begin - inner, inner_begin - begin, inner, KEYS, WIDTH, True,
    )  # fmt: skip
    # Σ da k is the gradient of t q: times t for q, along q for t.
    grad = (total * factor[:, None]).to(grad_q.dtype.element_ty)
    tl.store(grad_q + row[:, None] * WIDTH + columns, grad, mask=valid[:, None])
    tl.store(grad_scale + row, tl.sum(total * q_rows.to(tl.float32), 1), mask=valid)


def statistics(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """S (B, H, T, K), L, Q, M (B, H, T), float32, over logits a = scale q·k of visible keys (maths.md, section 4).

    q (B, H, T, K), k, v (B, G, S, K) in one of float32, bfloat16, float16, with H a multiple of G and K one of 16, 32,
    64, 128, 256; scale (B, H, T) float32; first, last (B, T) int32: query i of row b sees keys first[b, i] ≤ s <
    last[b, i] ≤ S, at least one, both non-decreasing in i. M, the largest logit, is a constant for gradients. q and k
    are taken in v's dtype: autocast widens what a norm returns. ValueError where the arguments do not fit.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)
    _check(q, k, v, scale, first, last)
    return _operation(q, k, v, scale, first, last)


def statistics_paged(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `statistics`, for keys in pages: k_pages, v_pages (pages, G, page_size, K), page_table (B, max_pages) int32.

    Key s of row b is key s mod page_size of page page_table[b, s // page_size]; entries past last are never read.
    For inference: ValueError where a gradient is asked for.
    """
    _check(q, k_pages, v_pages, scale, first, last, page_table)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k_pages, v_pages, scale)):
        raise ValueError("paged statistics have no gradients: call them under torch.no_grad()")
    return _paged_operation(q, k_pages, v_pages, page_table, scale, first, last)


def _check(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor, page_table: Tensor | None = None
) -> None:
    batch, heads, length, width = q.shape
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in DTYPES:
        raise ValueError(f"q, k and v must share one dtype of {DTYPES}, not {q.dtype}, {k.dtype}, {v.dtype}")
    if width not in WIDTHS:
        raise ValueError(f"head width {width} is not supported on the GPU; supported: {', '.join(map(str, WIDTHS))}")
    rows = k.shape[0] if page_table is None else page_table.shape[0]
    if k.shape != v.shape or rows != batch or k.shape[3] != width or heads % k.shape[1] != 0:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if scale.shape != q.shape[:3] or scale.dtype != torch.float32:
        raise ValueError(f"scale must be {tuple(q.shape[:3])} float32, not {tuple(scale.shape)} {scale.dtype}")
    for name, x in (("first", first), ("last", last)):
        if x.shape != (batch, length) or x.dtype != torch.int32:
            raise ValueError(f"{name} must be {(batch, length)} int32, not {tuple(x.shape)} {x.dtype}")
    if page_table is not None and (page_table.dtype != torch.int32 or page_table.ndim != 2):
        raise ValueError(f"page_table must be (B, pages) int32, not {tuple(page_table.shape)} {page_table.dtype}")


def _new(q: Tensor, *leading: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for S, L, Q and M, with `leading` dimensions before theirs."""
    S = q.new_empty((*leading, *q.shape), dtype=torch.float32)
    L, Q, M = (q.new_empty((*leading, *q.shape[:-1]), dtype=torch.float32) for _ in range(3))
    return S, L, Q, M


def _forward(
    q: Tensor, k: Tensor, v: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(q, k, v, None, scale, first, last)


def _paged_forward(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, page_table: Tensor, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _launch(q, k_pages, v_pages, page_table.contiguous(), scale, first, last)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, scale: Tensor, first: Tensor, last: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass over keys in one piece, or in pages where there is a table."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    batch, heads, length, width = q.shape
    groups, keys, page, pages = k.shape[1], k.shape[2], 0, 0
    if table is not None:
        page, pages = keys, table.shape[1]
        keys *= pages
    rows = length * heads // groups
    tile = forward_tiles(rows, width, q.dtype)
    programs = batch * groups * triton.cdiv(rows, tile.rows)
    out = _new(q)
    if programs == 0:
        return out
    splits = splits_for(programs, keys, tile.keys)
    parts = out if splits == 1 else _new(q, splits)
    # A load through a table waits for the table's entry: two more stages keep as many keys under way.
    stages = tile.stages if table is None else tile.stages + 2
    with torch.cuda.device_of(q):
        _forward_kernel[(programs * splits,)](
            q, k, v, scale, first.contiguous(), last.contiguous(), first if table is None else table, *parts,
            q.stride()[:3], k.stride()[:3], v.stride()[:3], scale.stride(), length, groups, pages, splits,
            GROUP=heads // groups, WIDTH=width, ROWS=tile.rows, KEYS=tile.keys, PAGE=page,
            num_warps=tile.warps, num_stages=stages,
        )  # fmt: skip
        if splits > 1:
            merged = batch * heads * length
            _merge_kernel[(merged,)](*parts, *out, merged, splits, WIDTH=width, CHUNK=16, num_warps=2)
    return out


def _row_bounds(first: Tensor, last: Tensor, keys: int, block: int) -> Tensor:
    """(B, key blocks, 4) int32: queries that see any key of a block, [low, high), and all of it, [inner_low, …high)."""
    start = torch.arange(0, keys, block, device=first.device, dtype=torch.int32).expand(first.shape[0], -1).contiguous()
    end = (start + block).clamp(max=keys)
    low, inner_low = (torch.searchsorted(last, x, out_int32=True, right=r) for x, r in ((start, True), (end, False)))
    high, inner_high = (torch.searchsorted(first, x, out_int32=True, right=r) for x, r in ((end, False), (start, True)))
    return torch.stack((low, high, inner_low, inner_high), -1)


def _pack_rows(groups: int, scale: Tensor, M: Tensor, grad_L: Tensor, grad_Q: Tensor) -> Tensor:
    """(4, B, G, T, H/G): per row, scale and M for logits to base 2, and the gradients of scaled logits from L and Q."""
    rows = torch.stack((scale * LOG2E.value, M * LOG2E.value, grad_L * scale, grad_Q * scale * 2))
    return rows.unflatten(2, (groups, -1)).transpose(-1, -2).contiguous()


def _backward(
    grad_S: Tensor,
    grad_L: Tensor,
    grad_Q: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor,
    M: Tensor,
    first: Tensor,
    last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    first, last, M, grad_L, grad_Q = (x.contiguous() for x in (first, last, M, grad_L, grad_Q))
    grad_S = grad_S.to(q.dtype).contiguous()
    batch, heads, length, width = q.shape
    groups, keys = k.shape[1], k.shape[2]
    group = heads // groups
    grad_q, grad_scale = q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)
    grad_k, grad_v = k.new_empty(k.shape), v.new_empty(v.shape)
    if grad_scale.numel() == 0:
        return grad_q, grad_k.zero_(), grad_v.zero_(), grad_scale
    strides = (q.stride()[:3], k.stride()[:3], v.stride()[:3])
    with torch.cuda.device_of(q):
        tile = tiles(KEY_GRADIENT, width, q.dtype)
        # First the kernel that owns keys, then the one that owns queries.
        bounds, packed = _row_bounds(first, last, keys, tile.keys), _pack_rows(groups, scale, M, grad_L, grad_Q)
        _key_gradient_kernel[(batch * groups * bounds.shape[1],)](
            q, k, v, grad_S, packed, first, last, bounds, grad_k, grad_v, *strides, length, keys, groups, GROUP=group,
            WIDTH=width, ROWS=tile.rows, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        tile = tiles(QUERY_GRADIENT, width, q.dtype)
        _query_gradient_kernel[(batch * groups * triton.cdiv(length * group, tile.rows),)](
            q, k, v, scale, first, last, M, grad_S, grad_L, grad_Q, grad_q, grad_scale, *strides, scale.stride(),
            length, groups, GROUP=group, WIDTH=width, ROWS=tile.rows, KEYS=tile.keys,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return grad_q, grad_k, grad_v, grad_scale


_operation = statistics_operator("atma::attention_statistics_gpu", _forward, _backward)
_paged_operation = operator("atma::attention_statistics_paged", _paged_forward, None, lambda q, *_: _new(q))
