"""Linear recurrences in Triton with a decay for each value channel, rule `add` (mixers.md, section 3.4, equation 3.6).

Value columns decay each at its own rate, so the table Q Kᵀ is one for all, with the decays on both sides of it: of the
pairs in neighbouring halves of a chunk, R = e^(g_p − g_b) ∘ (Q Kᵀ) (e^(g_b − g_s) ∘ U), U = β V. The memory's columns
decay over a chunk, and writes enter it as e^(g_C − g) ∘ U. Rounding is that of `gpu_token`. Not yet run on hardware.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import dot, narrow
from atma.ops.operator import operator
from atma.ops.recurrent.gpu_tiles import (
    CHUNK,
    VALUE,
    Call,
    births,
    call_of,
    edges,
    load,
    load_row,
    neighbours,
    padded,
    shared,
    since,
    spread,
    store,
    until,
)
from atma.ops.recurrent.gpu_token import grad_pass_kernel, pass_kernel


@triton.jit
def _scale_kernel(
    call,
    grad,
    scaled,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    BACK: tl.constexpr,
):
    """Of one chunk: e^(g_C − g) ∘ U, or for the gradient (BACK) e^g ∘ grad R; and the decay over the chunk."""
    inputs, strides, sizes = call
    rows, over = scaled
    _, _, v, log_decay, beta, segment_ids = inputs
    _, _, _, _, _, _, v_row, v_head, v_step = strides
    heads, _, v_group, length, _, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start, first = head // heads, n * C, tl.program_id(2) * BLOCK
    rest, at, column = depth - first, head * length * depth + first, tl.arange(0, BLOCK)
    rates = load(log_decay + at, start, depth, length, rest, C, BLOCK)
    later = load(log_decay + at, start + 1, depth, length, rest, C, BLOCK)
    entry, last, whole = edges(rates, later, segment_ids + row * length, start, length, C, BLOCK, PACKED)
    if BACK:
        made = entry * load(grad + at, start, depth, length, rest, C, BLOCK)
    else:
        v += row * v_row + head % heads // v_group * v_head + first
        weight = load_row(beta + head * length, start, length, C)
        made = last * (weight[:, None] * load(v, start, v_step, length, rest, C, BLOCK))
    store(rows + at, made, start, depth, length, rest, C, BLOCK)
    chunk = head * tl.num_programs(0) + n
    tl.store(over + chunk * depth + first + column, whole, mask=column < rest)


@triton.jit
def _table(queries, keys, segment_ids, start, length, C: tl.constexpr, PACKED: tl.constexpr):
    """Q Kᵀ (C, C), and which pairs count: not above the diagonal, nor across documents."""
    p = tl.arange(0, C)
    counts = p[:, None] >= p[None, :]
    if PACKED:
        seen = births(segment_ids, start, length, C)
        counts = counts & (seen[:, None] == seen[None, :])
    return tl.where(counts, dot(queries, tl.trans(keys)), 0.0), counts


@triton.jit
def _read_kernel(
    call,
    before,
    out,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """What BLOCK value columns of one chunk read."""
    inputs, strides, sizes = call
    q, k, v, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, k_group, v_group, length, width, depth = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start, first = head // heads, n * C, tl.program_id(2) * BLOCK
    rest, at, chunk = depth - first, head * length * depth + first, head * tl.num_programs(0) + n
    queries = load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    segment_ids += row * length
    scores, _ = _table(queries, keys, segment_ids, start, length, C, PACKED)
    v += row * v_row + head % heads // v_group * v_head + first
    weight = load_row(beta + head * length, start, length, C)
    writes = weight[:, None] * load(v, start, v_step, length, rest, C, BLOCK)
    rates = load(log_decay + at, start, depth, length, rest, C, BLOCK)
    later = load(log_decay + at, start + 1, depth, length, rest, C, BLOCK)
    entry, _, _ = edges(rates, later, segment_ids, start, length, C, BLOCK, PACKED)
    # R = e^g ∘ Q N, and each token's own write without decay …
    held = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
    itself = tl.sum(tl.where(p[:, None] == p[None, :], scores, 0.0), 1)
    read = entry * dot(queries, held) + itself[:, None] * writes
    # … and what the second of two neighbouring halves reads of the first.
    for exponent in tl.static_range(0, SIZES):
        far = narrow(writes * tl.exp(until(later, 2**exponent, C, BLOCK)), keys.dtype)
        table = tl.where(neighbours(2**exponent, C), scores, 0.0)
        read += tl.exp(since(rates, 2**exponent, C, BLOCK)) * dot(table, far)
    store(out + at, read, start, depth, length, rest, C, BLOCK)


@triton.jit
def _grad_pairs(sums, tiles, scores, SIZE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """`sums`, the gradients of Q Kᵀ, U and the decays, with those by neighbouring halves of SIZE tokens."""
    grad_scores, grad_writes, grad_decay = sums
    upper, writes, rates, later = tiles
    near, far, pair = tl.exp(since(rates, SIZE, C, BLOCK)), tl.exp(until(later, SIZE, C, BLOCK)), neighbours(SIZE, C)
    written, reached = narrow(writes * far, upper.dtype), narrow(upper * near, upper.dtype)
    table = tl.where(pair, scores, 0.0)
    by_write = far * dot(tl.trans(table), reached)
    grad_scores += tl.where(pair, dot(reached, tl.trans(written)), 0.0)
    grad_decay += spread(upper * near * dot(table, written), writes * by_write, SIZE, C, BLOCK)
    return grad_scores, grad_writes + by_write, grad_decay


@triton.jit
def _grad_values_kernel(
    call,
    grad,
    held,
    results,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Gradients of BLOCK value columns of one chunk and of their decays, and their share of those of Q Kᵀ and β."""
    inputs, strides, sizes = call
    before, after, over = held
    q, k, v, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, k_group, v_group, length, width, depth = sizes
    grad_v, grad_decay, grad_scores, grad_beta = results
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start, first = head // heads, n * C, tl.program_id(2) * BLOCK
    rest, at, chunk = depth - first, head * length * depth + first, head * tl.num_programs(0) + n
    share = chunk * tl.num_programs(2) + tl.program_id(2)
    queries = load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    segment_ids += row * length
    scores, counts = _table(queries, keys, segment_ids, start, length, C, PACKED)
    old = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
    new = load(after + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
    upper = load(grad + at, start, depth, length, rest, C, BLOCK)
    weight = load_row(beta + head * length, start, length, C)
    v += row * v_row + head % heads // v_group * v_head + first
    values = load(v, start, v_step, length, rest, C, BLOCK)
    rates = load(log_decay + at, start, depth, length, rest, C, BLOCK)
    later = load(log_decay + at, start + 1, depth, length, rest, C, BLOCK)
    entry, last, _ = edges(rates, later, segment_ids, start, length, C, BLOCK, PACKED)
    writes = weight[:, None] * values
    # By the memory before the chunk, which is read, and by that after it, in which U lives on.
    by_write = last * dot(keys, new)
    by_rate = spread(entry * upper * dot(queries, old), writes * by_write, C, C, BLOCK)
    # The memory's own decay over the chunk is in every rate of it.
    whole = load_row(over + chunk * depth + first, 0, rest, BLOCK)
    by_rate += (whole * tl.sum(new.to(tl.float32) * old.to(tl.float32), 0))[None, :]
    # A token's own write, without decay.
    by_write += tl.sum(tl.where(p[:, None] == p[None, :], scores, 0.0), 1)[:, None] * upper
    own = tl.sum(upper * writes, 1)
    sums = tl.where(p[:, None] == p[None, :], own[:, None], 0.0), by_write, by_rate
    for exponent in tl.static_range(0, SIZES):
        sums = _grad_pairs(sums, (upper, writes, rates, later), scores, 2**exponent, C, BLOCK)
    scored, by_write, by_rate = sums
    store(grad_decay + at, by_rate, start, depth, length, rest, C, BLOCK)
    store(grad_v + at, weight[:, None] * by_write, start, depth, length, rest, C, BLOCK)
    store(grad_scores + share * C * C, tl.where(counts, scored, 0.0), 0, C, C, C, C, C)
    tl.store(grad_beta + share * C + p, tl.sum(by_write * values, 1))


@triton.jit
def _grad_keys_kernel(call, held, shares, results, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Gradients of q, k and β of one chunk: what sums over value columns, BLOCK at a time."""
    inputs, strides, sizes = call
    before, after, read, written = held
    grad_scores, grad_shares = shares
    grad_q, grad_k, grad_beta = results
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, depth = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start, chunk = head // heads, n * C, head * tl.num_programs(0) + n
    q = inputs[0] + row * q_row + head % heads * q_head
    k = inputs[1] + row * k_row + head % heads // k_group * k_head
    scored, learned = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    by_query, by_key = tl.zeros((C, WIDTH), dtype=tl.float32), tl.zeros((C, WIDTH), dtype=tl.float32)
    share = chunk * tl.cdiv(depth, BLOCK)
    for first in range(0, depth, BLOCK):
        rest, at = depth - first, head * length * depth + first
        old = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        new = load(after + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        # e^g ∘ grad R by the memory before the chunk, e^(g_C − g) ∘ U by that after it.
        by_query += dot(load(read + at, start, depth, length, rest, C, BLOCK), tl.trans(old))
        by_key += dot(load(written + at, start, depth, length, rest, C, BLOCK), tl.trans(new))
        scored += load(grad_scores + share * C * C, 0, C, C, C, C, C)
        learned += tl.load(grad_shares + share * C + p)
        share += 1
    by_query += dot(scored, load(k, start, k_step, length, width, C, WIDTH))
    by_key += dot(tl.trans(scored), load(q, start, q_step, length, width, C, WIDTH))
    at = head * length * width
    store(grad_q + at, by_query, start, width, length, width, C, WIDTH)
    store(grad_k + at, by_key, start, width, length, width, C, WIDTH)
    tl.store(grad_beta + head * length + start + p, learned, mask=start + p < length)


def _columns(call: Call) -> dict[str, int | bool]:
    """How a kernel runs that takes value columns a block at a time."""
    how = {"SIZES": call.chunk.bit_length() - 1, "BLOCK": min(padded(call.sizes[5]), 32), "num_stages": 1}
    return call.parallel | how


def _scaled(call: Call, grad: Tensor | None) -> tuple[Tensor, Tensor]:
    """e^(g_C − g) ∘ U, or of `grad` e^g ∘ grad, in q's dtype; and the decay over each chunk (B, H, N, V)."""
    length, _, depth = call.sizes[3:]
    scaled = call.buffer(length, depth), call.buffer(call.chunks, depth, dtype=torch.float32)
    how = {name: value for name, value in _columns(call).items() if name not in ("WIDTH", "SIZES")}
    grid = call.chunks, call.heads, triton.cdiv(depth, how["BLOCK"])
    _scale_kernel[grid](call[:3], scaled[0] if grad is None else grad, scaled, BACK=grad is not None, **how)
    return scaled


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, memory after, memory before each chunk (B, H, N, K, V) in q's dtype."""
    call, memory = call_of(q, k, v, log_decay, beta, segment_ids), memory.contiguous()
    length, width, depth = call.sizes[3:]
    out, before, after = call.buffer(length, depth), call.buffer(call.chunks, width, depth), torch.empty_like(memory)
    how, run = _columns(call), {"DELTA": False, "AXIS": VALUE, **call.sequential}
    with torch.cuda.device_of(q):
        writes, over = _scaled(call, None)
        pass_kernel[call.passes](call[:3], (writes, writes, over, over), memory, before, after, **run)
        grid = call.chunks, call.heads, triton.cdiv(depth, how["BLOCK"])
        _read_kernel[grid](call[:3], before, out, **how)
    return out, after, before


def _backward(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    segment_ids: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, grad_after = call_of(q, k, v, log_decay, beta, segment_ids), grad_after.contiguous()
    (length, width, depth), grad = call.sizes[3:], grad_out.contiguous()
    after, grad_memory = torch.empty_like(before), torch.empty_like(grad_after)
    grad_q, grad_k, grad_v = (call.buffer(length, columns) for columns in (width, width, depth))
    grad_decay, grad_beta = (call.buffer(*shape, dtype=torch.float32) for shape in ((length, depth), (length,)))
    run, how = {"DELTA": False, "AXIS": VALUE, **call.sequential}, _columns(call)
    grid, blocks = (call.chunks, call.heads), triton.cdiv(depth, how["BLOCK"])
    of_scores = call.buffer(call.chunks, blocks, call.chunk, call.chunk, dtype=torch.float32)
    of_beta = call.buffer(call.chunks, blocks, call.chunk, dtype=torch.float32)
    once = {name: value for name, value in how.items() if name not in ("SIZES", "PACKED")}
    with torch.cuda.device_of(q):
        scaled, over = _scaled(call, grad)
        unused = scaled, scaled, over, over
        grad_pass_kernel[call.passes](call[:3], scaled, unused, grad_after, after, grad_memory, **run)
        results = grad_v, grad_decay, of_scores, of_beta
        _grad_values_kernel[*grid, blocks](call[:3], grad, (before, after, over), results, **how)
        (writes, _), results = _scaled(call, None), (grad_q, grad_k, grad_beta)
        _grad_keys_kernel[grid](call[:3], (before, after, scaled, writes), (of_scores, of_beta), results, **once)
    return grad_q, shared(grad_k, k), shared(grad_v, v), grad_decay, grad_beta, grad_memory


def _shapes(q, k, v, log_decay, beta, memory, segment_ids):
    before = q.new_empty(*q.shape[:2], -(-q.shape[2] // CHUNK[q.dtype]), q.shape[3], v.shape[3])
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape), before


over_values = operator(
    "atma::recurrence_value_gpu",
    _forward,
    _backward,
    _shapes,
    ("out", "after", "before"),
    {"memory": "grad_after"},
)

__all__ = ["over_values"]
