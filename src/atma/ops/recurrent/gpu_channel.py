"""Linear recurrences in Triton with a decay for each key channel (mixers.md, section 3.2). Not yet run on hardware.

Every chunk is first cut: the tables ⟨q_p, k_s⟩_D and ⟨k_p, k_s⟩_D, and q, k as the memory before the chunk meets them
(by e^g: "readers" and "entering") and k as the memory after it does (by e^(g_C − g): "writers"). From there on no step
knows a decay but that of the memory over a whole chunk, so the rest is that of one decay a token, without it. Backward
the same way round: gradients of what was cut, then of q, k and the decays. Rounding is that of `gpu_token`.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import dot, narrow
from atma.ops.operator import operator
from atma.ops.recurrent.gpu_tiles import (
    KEY,
    Call,
    births,
    call_of,
    edges,
    invert,
    load,
    load_row,
    neighbours,
    padded,
    shapes,
    shared,
    since,
    spread,
    store,
    until,
)
from atma.ops.recurrent.gpu_token import grad_pass_kernel, pass_kernel


@triton.jit
def _pairs(
    tables, queries, keys, rates, later, SIZE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DELTA: tl.constexpr
):
    """The entries of both tables for neighbouring halves of SIZE tokens."""
    scored, met = tables
    near, pair = tl.exp(since(rates, SIZE, C, BLOCK)), neighbours(SIZE, C)
    far = tl.trans(narrow(keys * tl.exp(until(later, SIZE, C, BLOCK)), queries.dtype))
    scored += tl.where(pair, dot(queries * near, far), 0.0)
    if DELTA:
        met += tl.where(pair, dot(keys * near, far), 0.0)
    return scored, met


@triton.jit
def _cut_kernel(
    call,
    cut,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Cut one chunk: what the module's head says, BLOCK channels at a time. `met` is float32, others in q's dtype."""
    inputs, strides, sizes = call
    readers, entering, writers, scores, products, over = cut
    q, k, _, log_decay, _, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, _ = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start = head // heads, n * C
    chunk, at = head * tl.num_programs(0) + n, head * length * width
    q += row * q_row + head % heads * q_head
    k += row * k_row + head % heads // k_group * k_head
    tables = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C, C), dtype=tl.float32)
    itself = tl.zeros((C,), dtype=tl.float32)
    for first in range(0, width, BLOCK):
        rest, place = width - first, at + first
        queries = load(q + first, start, q_step, length, rest, C, BLOCK)
        keys = load(k + first, start, k_step, length, rest, C, BLOCK)
        rates = load(log_decay + place, start, width, length, rest, C, BLOCK)
        later = load(log_decay + place, start + 1, width, length, rest, C, BLOCK)
        for exponent in tl.static_range(0, SIZES):
            tables = _pairs(tables, queries, keys, rates, later, 2**exponent, C, BLOCK, DELTA)
        itself += tl.sum(queries.to(tl.float32) * keys, 1)
        entry, last, whole = edges(rates, later, segment_ids + row * length, start, length, C, BLOCK, PACKED)
        store(readers + place, entry * queries, start, width, length, rest, C, BLOCK)
        store(writers + place, last * keys, start, width, length, rest, C, BLOCK)
        if DELTA:
            store(entering + place, entry * keys, start, width, length, rest, C, BLOCK)
        column = tl.arange(0, BLOCK)
        tl.store(over + chunk * width + first + column, whole, mask=column < rest)
    scored, met = tables
    # No decay between a token's write and its own read.
    scored = tl.where(p[:, None] == p[None, :], itself[:, None], scored)
    if PACKED:
        seen = births(segment_ids + row * length, start, length, C)
        scored = tl.where(seen[:, None] == seen[None, :], scored, 0.0)
        met = tl.where(seen[:, None] == seen[None, :], met, 0.0)
    store(scores + chunk * C * C, scored, 0, C, C, C, C, C)
    if DELTA:
        store(products + chunk * C * C, met, 0, C, C, C, C, C)


@triton.jit
def _write_kernel(
    call,
    cut,
    inverse,
    solved,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Of one chunk: T = (I + β ∘ ⟨k, k⟩_D)⁻¹, U's part T β V that knows no memory, and what is taken off, T β (g k)."""
    inputs, strides, sizes = call
    _, entering, _, _, products, _ = cut
    fresh, removed = solved
    _, _, v, _, beta, _ = inputs
    _, _, _, _, _, _, v_row, v_head, v_step = strides
    heads, _, v_group, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, chunk = n * C, head * tl.num_programs(0) + n
    rates = load_row(beta + head * length, start, length, C)
    if DELTA:
        A = rates[:, None] * load(products + chunk * C * C, 0, C, C, C, C, C)
        low = narrow(invert(A, C), inverse.dtype.element_ty)
        store(inverse + chunk * C * C, low, 0, C, C, C, C, C)
        keys = load(entering + head * length * width, start, width, length, width, C, WIDTH)
        taken = dot(low, narrow(rates[:, None] * keys, keys.dtype))
        store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    v += head // heads * v_row + head % heads // v_group * v_head
    fresh += head * length * depth
    for first in tl.static_range(0, DEPTH, BLOCK):
        written = rates[:, None] * load(v + first, start, v_step, length, depth - first, C, BLOCK)
        if DELTA:
            written = dot(low, narrow(written, low.dtype))
        store(fresh + first, written, start, depth, length, depth - first, C, BLOCK)


@triton.jit
def _read_kernel(call, scores, writes, before, out, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What one chunk reads: R = (g q) N + ⟨q, k⟩_D U, BLOCK value columns at a time."""
    inputs, _, sizes = call
    _, _, _, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, chunk = n * C, head * tl.num_programs(0) + n
    queries = load(inputs[0] + head * length * width, start, width, length, width, C, WIDTH)
    table = load(scores + chunk * C * C, 0, C, C, C, C, C)
    for first in range(0, depth, BLOCK):
        rest, at = depth - first, head * length * depth + first
        held = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        read = dot(queries, held) + dot(table, load(writes + at, start, depth, length, rest, C, BLOCK))
        store(out + at, read, start, depth, length, rest, C, BLOCK)


@triton.jit
def _grad_local_kernel(
    call,
    grad,
    cut,
    inverse,
    solved,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Of one chunk: grad U through its own reads, ⟨q, k⟩_Dᵀ grad R; and T β (g k) again."""
    inputs, _, sizes = call
    _, entering, _, scores, _, _ = cut
    grad_writes, removed = solved
    _, _, _, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, chunk = n * C, head * tl.num_programs(0) + n
    if DELTA:
        rates = load_row(inputs[4] + head * length, start, length, C)
        keys = load(entering + head * length * width, start, width, length, width, C, WIDTH)
        solution = load(inverse + chunk * C * C, 0, C, C, C, C, C)
        taken = dot(solution, narrow(rates[:, None] * keys, keys.dtype))
        store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    table = tl.trans(load(scores + chunk * C * C, 0, C, C, C, C, C))
    for first in tl.static_range(0, DEPTH, BLOCK):
        rest, at = depth - first, head * length * depth + first
        read = dot(table, load(grad + at, start, depth, length, rest, C, BLOCK))
        store(grad_writes + at, read, start, depth, length, rest, C, BLOCK)


@triton.jit
def _grad_values_kernel(
    call,
    grad,
    held,
    results,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Gradients of one chunk's values, β and what was cut; what sums over value columns, BLOCK at a time."""
    inputs, strides, sizes = call
    before, after, inverse, grad_writes, entering, products = held
    _, writers, v, _, beta, segment_ids = inputs
    _, _, _, _, _, _, v_row, v_head, v_step = strides
    heads, _, v_group, length, width, depth = sizes
    cut, grad_v, grad_beta = results
    grad_readers, grad_entering, grad_writers, grad_scores, grad_products, across = cut
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start = head // heads, n * C
    chunk = head * tl.num_programs(0) + n
    keys = load(writers + head * length * width, start, width, length, width, C, WIDTH)
    rates = load_row(beta + head * length, start, length, C)
    scored, read = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C, WIDTH), dtype=tl.float32)
    through, learned = tl.zeros((C, WIDTH), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    decayed = tl.zeros((WIDTH,), dtype=tl.float32)
    if DELTA:
        solution = load(inverse + chunk * C * C, 0, C, C, C, C, C)
        met = load(entering + head * length * width, start, width, length, width, C, WIDTH)
        corrected, taken = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C, WIDTH), dtype=tl.float32)
    v += row * v_row + head % heads // v_group * v_head
    for first in range(0, depth, BLOCK):
        rest, at = depth - first, head * length * depth + first
        old = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        new = load(after + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        upper = load(grad + at, start, depth, length, rest, C, BLOCK)
        errors = load(v + first, start, v_step, length, rest, C, BLOCK).to(tl.float32)
        solved = load(grad_writes + at, start, depth, length, rest, C, BLOCK)
        if DELTA:
            # U = T (β ∘ errors) again; Tᵀ grad U is the gradient of β ∘ errors, and −Tᵀ grad U Uᵀ that of A.
            errors -= dot(met, old)
            written = narrow(dot(solution, narrow(rates[:, None] * errors, keys.dtype)), keys.dtype)
            solved = dot(tl.trans(solution), solved)
            corrected += dot(solved, tl.trans(written))
            # The errors' (g k) N.
            taken -= dot(rates[:, None] * solved, tl.trans(old))
        else:
            written = narrow(rates[:, None] * errors, keys.dtype)
            solved = solved.to(tl.float32) + dot(keys, new)
        store(grad_v + at, rates[:, None] * solved, start, depth, length, rest, C, BLOCK)
        learned += tl.sum(solved * errors, 1)
        scored += dot(upper, tl.trans(written))
        read += dot(upper, tl.trans(old))
        through += dot(written, tl.trans(new))
        decayed += tl.sum(new.to(tl.float32) * old.to(tl.float32), 1)
    at, column = head * length * width, tl.arange(0, WIDTH)
    store(grad_readers + at, read, start, width, length, width, C, WIDTH)
    store(grad_writers + at, through, start, width, length, width, C, WIDTH)
    tl.store(across + chunk * width + column, decayed, mask=column < width)
    within = p[:, None] >= p[None, :]
    if PACKED:
        seen = births(segment_ids + row * length, start, length, C)
        within = within & (seen[:, None] == seen[None, :])
    store(grad_scores + chunk * C * C, tl.where(within, scored, 0.0), 0, C, C, C, C, C)
    if DELTA:
        store(grad_entering + at, taken, start, width, length, width, C, WIDTH)
        grad_A = tl.where(within & (p[:, None] > p[None, :]), -corrected, 0.0)
        learned += tl.sum(grad_A * load(products + chunk * C * C, 0, C, C, C, C, C), 1)
        store(grad_products + chunk * C * C, rates[:, None] * grad_A, 0, C, C, C, C, C)
    tl.store(grad_beta + head * length + start + p, learned, mask=start + p < length)


@triton.jit
def _grad_pairs(sums, tiles, tables, SIZE: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr, DELTA: tl.constexpr):
    """`sums`, the gradients of q, k and the decays, with those by neighbouring halves of SIZE tokens."""
    grad_q, grad_k, grad_decay = sums
    queries, keys, rates, later = tiles
    scored, met = tables
    near, far = tl.exp(since(rates, SIZE, C, BLOCK)), tl.exp(until(later, SIZE, C, BLOCK))
    pair, written = neighbours(SIZE, C), narrow(keys * far, keys.dtype)
    table = tl.where(pair, scored, 0.0)
    by_query = near * dot(table, written)
    by_writer = dot(tl.trans(table), narrow(queries * near, keys.dtype))
    reads = queries * by_query
    if DELTA:
        table = tl.where(pair, met, 0.0)
        by_reader = near * dot(table, written)
        by_writer += dot(tl.trans(table), narrow(keys * near, keys.dtype))
        reads += keys * by_reader
        grad_k += by_reader
    by_writer *= far
    # A decay between s and p has the gradient of each product that it is in, from p's end or from s's.
    grad_decay += spread(reads, keys * by_writer, SIZE, C, BLOCK)
    return grad_q + by_query, grad_k + by_writer, grad_decay


@triton.jit
def _grad_cut_kernel(
    call,
    cut,
    over,
    results,
    C: tl.constexpr,
    SIZES: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Gradients of BLOCK channels of q, k and the decays of one chunk, from those of what it was cut into."""
    inputs, strides, sizes = call
    grad_readers, grad_entering, grad_writers, grad_scores, grad_products, across = cut
    grad_q, grad_k, grad_decay = results
    q, k, _, log_decay, _, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, _ = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    first = tl.program_id(2) * BLOCK
    row, start, rest = head // heads, n * C, width - first
    chunk, at = head * tl.num_programs(0) + n, head * length * width + first
    queries = load(q + row * q_row + head % heads * q_head + first, start, q_step, length, rest, C, BLOCK)
    keys = load(k + row * k_row + head % heads // k_group * k_head + first, start, k_step, length, rest, C, BLOCK)
    rates = load(log_decay + at, start, width, length, rest, C, BLOCK)
    later = load(log_decay + at, start + 1, width, length, rest, C, BLOCK)
    entry, last, _ = edges(rates, later, segment_ids + row * length, start, length, C, BLOCK, PACKED)
    scored = load(grad_scores + chunk * C * C, 0, C, C, C, C, C)
    met = scored
    # By the memory before the chunk, and by that after it.
    by_query = entry * load(grad_readers + at, start, width, length, rest, C, BLOCK)
    by_key = last * load(grad_writers + at, start, width, length, rest, C, BLOCK)
    reads, tails = queries * by_query, keys * by_key
    if DELTA:
        by_reader = entry * load(grad_entering + at, start, width, length, rest, C, BLOCK)
        reads += keys * by_reader
        by_key += by_reader
        met = load(grad_products + chunk * C * C, 0, C, C, C, C, C)
    # The memory's own decay over the chunk is in every rate of it.
    place = chunk * width + first
    whole = load_row(over + place, 0, rest, BLOCK) * load_row(across + place, 0, rest, BLOCK)
    # A token's own write, without decay.
    itself = tl.sum(tl.where(p[:, None] == p[None, :], scored, 0.0).to(tl.float32), 1)[:, None]
    sums = (
        by_query + itself * keys,
        by_key + itself * queries,
        spread(reads, tails, C, C, BLOCK) + whole[None, :],
    )
    for exponent in tl.static_range(0, SIZES):
        sums = _grad_pairs(sums, (queries, keys, rates, later), (scored, met), 2**exponent, C, BLOCK, DELTA)
    by_query, by_key, by_rate = sums
    store(grad_q + at, by_query, start, width, length, rest, C, BLOCK)
    store(grad_k + at, by_key, start, width, length, rest, C, BLOCK)
    store(grad_decay + at, by_rate, start, width, length, rest, C, BLOCK)


class _Cut(NamedTuple):
    """What a call is cut into, or the gradients of that. Of the rule `add`, two are empty."""

    readers: Tensor  # (B, H, T, K), as the next two
    entering: Tensor
    writers: Tensor
    scores: Tensor  # (B, H, N, C, C), as the next
    products: Tensor
    over: Tensor  # (B, H, N, K): the memory's decay over each chunk


def _cut_of(call: Call, delta: bool, rows: torch.dtype | None, products: torch.dtype | None) -> _Cut:
    """Uninitialised, the rows and the products in these dtypes (None: q's)."""
    (*_, length, width, _), chunks, size = call.sizes, call.chunks, call.chunk
    readers, writers = (call.buffer(length, width, dtype=rows) for _ in range(2))
    entering = call.buffer(length, width if delta else 0, dtype=rows)
    scores = call.buffer(chunks, size, size)
    of_keys = call.buffer(chunks, size, size if delta else 0, dtype=products)
    return _Cut(readers, entering, writers, scores, of_keys, call.buffer(chunks, width, dtype=torch.float32))


def _channels(call: Call) -> dict[str, int | bool]:
    """How a kernel runs that takes key channels a block at a time."""
    block = min(padded(call.sizes[4]), 32)
    how = {name: value for name, value in call.parallel.items() if name != "WIDTH"}
    return how | {"SIZES": call.chunk.bit_length() - 1, "BLOCK": block, "num_stages": 1}


def _cut(call: Call, delta: bool) -> _Cut:
    cut = _cut_of(call, delta, None, torch.float32)
    _cut_kernel[call.chunks, call.heads](call[:3], cut, DELTA=delta, **_channels(call))
    return cut


def _of_cut(call: Call, cut: _Cut) -> tuple:
    """The call that reads with the readers and writes with the writers, for the passes."""
    (heads, _, *rest), inputs = call.sizes, (cut.readers, cut.writers, *call.inputs[2:])
    strides = *cut.readers.stride()[:3], *cut.writers.stride()[:3], *call.strides[6:]
    return inputs, strides, (heads, 1, *rest)


def _without(names: str, how: dict) -> dict:
    return {name: value for name, value in how.items() if name not in names.split()}


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    segment_ids: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, memory after, memory before each chunk (B, H, N, K, V), T (B, H, N, C, C) or empty; both in q's dtype."""
    call, memory = call_of(q, k, v, log_decay, beta, segment_ids), memory.contiguous()
    (*_, length, width, depth), chunks, grid = call.sizes, call.chunks, (call.chunks, call.heads)
    inverse, before = call.buffer(chunks, call.chunk, call.chunk if delta else 0), call.buffer(chunks, width, depth)
    writes, removed = call.buffer(length, depth), call.buffer(length, width if delta else 0)
    out, after, how = call.buffer(length, depth), memory.new_empty(memory.shape), _without("PACKED", call.parallel)
    with torch.cuda.device_of(q):
        cut = _cut(call, delta)
        common, solved = _of_cut(call, cut), (writes, removed, cut.over, cut.over)
        _write_kernel[grid](common, cut, inverse, solved[:2], DELTA=delta, **call.depth, **how)
        pass_kernel[call.passes](common, solved, memory, before, after, DELTA=delta, AXIS=KEY, **call.sequential)
        _read_kernel[grid](common, cut.scores, writes, before, out, BLOCK=call.columns(2), **how)
    return out, after, before, inverse


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
    inverse: Tensor,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, grad_after = call_of(q, k, v, log_decay, beta, segment_ids), grad_after.contiguous()
    (*_, length, width, depth), grid, grad = call.sizes, (call.chunks, call.heads), grad_out.contiguous()
    grad_writes, removed = call.buffer(length, depth), call.buffer(length, width if delta else 0)
    after, grad_memory, grad_v = torch.empty_like(before), torch.empty_like(grad_after), call.buffer(length, depth)
    grad_q, grad_k = call.buffer(length, width), call.buffer(length, width)
    grad_decay, grad_beta = (call.buffer(*shape, dtype=torch.float32) for shape in ((length, width), (length,)))
    back, channels = _cut_of(call, delta, torch.float32, None), _channels(call)
    how, grads = {"DELTA": delta, "AXIS": KEY, **call.sequential}, (grad_q, grad_k, grad_decay)
    with torch.cuda.device_of(q):
        cut = _cut(call, delta)
        common, solved = _of_cut(call, cut), (grad_writes, removed, cut.over, cut.over)
        local = call.depth | _without("PACKED", call.parallel)
        _grad_local_kernel[grid](common, grad, cut, inverse, solved[:2], DELTA=delta, **local)
        grad_pass_kernel[call.passes](common, grad, solved, grad_after, after, grad_memory, **how)
        held, results = (before, after, inverse, grad_writes, cut.entering, cut.products), (back, grad_v, grad_beta)
        _grad_values_kernel[grid](common, grad, held, results, BLOCK=call.columns(1), DELTA=delta, **call.parallel)
        blocks = triton.cdiv(width, channels["BLOCK"])
        _grad_cut_kernel[*grid, blocks](call[:3], back, cut.over, grads, DELTA=delta, **channels)
    return grad_q, shared(grad_k, k), shared(grad_v, v), grad_decay, grad_beta, grad_memory


by_channel = operator(
    "atma::recurrence_channel_gpu",
    _forward,
    _backward,
    shapes,
    ("out", "after", "before", "inverse"),
    {"memory": "grad_after"},
)

__all__ = ["by_channel"]
