"""The gated delta rule in Triton (maths.md, section 5): in chunks, gradient by hand. Its tests pass on an H100.

The letters are those of `cpu.py`. Forward: every chunk on its own solves T = (I + A)⁻¹ and its share of the writes; one
pass over the chunks, with the memory's value rows split over programs, carries the memory and finishes the writes;
every chunk on its own reads. Backward: the same three steps for the gradients. What tensor cores multiply is rounded to
q's dtype; decays, T's solution, the memory and all sums are float32, and products of float32 are IEEE, never tf32.
No atomics: equal bits every time. A query head finds its key/value head by itself; gradients of shared keys and values
are summed afterwards.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import dot, narrow, unit_stride
from atma.ops.operator import operator

CHUNK = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
"""Tokens of a chunk. Float32 has no tensor core to fill; its products in chunks of 64 would not fit in registers."""
WIDEST = 128


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, K); k (B, G, T, K), v (B, G, T, V) of q's dtype; the rest float32, as in the reference.

    Returns out (B, H, T, V) in q's dtype and the memory after the last token. A single token without gradient reads
    and writes the memory once.
    """
    if q.dtype not in CHUNK or k.dtype != q.dtype or v.dtype != q.dtype:
        found = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"the Triton delta rule takes q, k, v all float16, bfloat16 or float32, not {found}")
    if max(q.shape[-1], v.shape[-1]) > WIDEST:
        raise ValueError(f"the Triton delta rule takes widths up to {WIDEST}, not {q.shape[-1]} and {v.shape[-1]}")
    for tensor in (log_decay, beta, memory):
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"log_decay, beta and memory must be float32 for the Triton delta rule, not {tensor.dtype}"
            )
    if q.shape[2] == 1 and not torch.is_grad_enabled():
        return _one_token(q, k, v, log_decay, beta, memory)
    out, after, _, _ = _chunked(q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


@triton.jit
def _load(pointer, start, stride, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) from row `start` on, zero past `length` rows or `width` columns."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (start + row < length)[:, None] & (column < width)[None, :]
    return tl.load(pointer + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :], mask, other=0)


@triton.jit
def _store(pointer, x, start, stride, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (start + row < length)[:, None] & (column < width)[None, :]
    at = pointer + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, narrow(x, pointer.dtype.element_ty), mask)


@triton.jit
def _load_row(pointer, start, length, C: tl.constexpr):
    at = start + tl.arange(0, C)
    return tl.load(pointer + at, mask=at < length, other=0)


@triton.jit
def _decays(log_decay, segment_ids, start, length, C: tl.constexpr, PACKED: tl.constexpr):
    """D (C, C), zero above the diagonal and across documents; g (C), zero once a document has begun in the chunk.

    Padding does not decay. Every sum begins at the token whose write it carries.
    """
    p = tl.arange(0, C)
    rates = _load_row(log_decay, start, length, C)
    # Column s sums log γ from s + 1 on: D never is a difference of sums, which would cancel and cross documents.
    sums = tl.cumsum(tl.where(p[:, None] > p[None, :], rates[:, None], 0.0), 0)
    within = p[:, None] >= p[None, :]
    entry = tl.exp(tl.cumsum(rates, 0))
    if PACKED:
        at = start + p
        followed = (at > 0) & (at < length)
        ids = tl.load(segment_ids + at, mask=followed, other=0)
        before = tl.load(segment_ids + at - 1, mask=followed, other=0)
        # Tokens of one document have seen the same number of births; D between others, and g after the first, are 0.
        births = tl.cumsum((ids != before).to(tl.int32), 0)
        within = within & (births[:, None] == births[None, :])
        entry = tl.where(births == 0, entry, 0.0)
    return tl.where(within, tl.exp(sums), 0.0), entry


@triton.jit
def _last_row(x, C: tl.constexpr):
    """Row C − 1 of (C, C) as (C)."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x, 0.0), 0)


@triton.jit
def _joined(blocks, A, PAIRS: tl.constexpr, SIZE: tl.constexpr):
    """From the inverses (2 · PAIRS, SIZE, SIZE) of I + A's diagonal blocks to those of the blocks twice as large."""
    pair, half = tl.arange(0, PAIRS), tl.arange(0, 2)
    halves = tl.reshape(blocks, (PAIRS, 2, SIZE, SIZE))
    is_first = (half == 0)[None, :, None, None]
    first = tl.sum(tl.where(is_first, halves, 0.0), 1)
    second = tl.sum(tl.where(is_first, 0.0, halves), 1)
    same = pair[:, None, None, None, None, None] == pair[None, None, None, :, None, None]
    below = (half[:, None, None, None, None] > half[None, None, None, :, None])[None]
    between = tl.where(same & below, tl.reshape(A, (PAIRS, 2, SIZE, PAIRS, 2, SIZE)), 0.0)
    between = tl.sum(tl.sum(tl.sum(between, 4), 3), 1)
    # [[F, 0], [B, S]]⁻¹ = [[F⁻¹, 0], [−S⁻¹ B F⁻¹, S⁻¹]], for all pairs of blocks at once.
    corner = -tl.dot(tl.dot(second, between, input_precision="ieee"), first, input_precision="ieee")
    row, column = half[None, :, None, None, None], half[None, None, None, :, None]
    left = tl.where(row == 0, first[:, None, :, None, :], corner[:, None, :, None, :])
    right = tl.where(row == 0, 0.0, second[:, None, :, None, :])
    return tl.reshape(tl.where(column == 0, left, right), (PAIRS, 2 * SIZE, 2 * SIZE))


@triton.jit
def _inverse(A, C: tl.constexpr):
    """(I + A)⁻¹ for strictly lower A: forward substitution in diagonal blocks of 16, which are then joined in pairs.

    Substitution, not powers of A: those grow like binomials where tokens repeat, and cancel.
    """
    SMALL: tl.constexpr = 16
    COUNT: tl.constexpr = C // SMALL
    block, i, j = tl.arange(0, COUNT), tl.arange(0, SMALL)[None, :, None], tl.arange(0, SMALL)[None, None, :]
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    a = tl.sum(tl.where(diagonal, tl.reshape(A, (COUNT, SMALL, COUNT, SMALL)), 0.0), 2)
    blocks = tl.where((i == j) & (block >= 0)[:, None, None], 1.0, 0.0)
    for r in range(1, SMALL):
        # Row r of each block's inverse: e_r less A's row r times the rows already there.
        row = tl.sum(tl.where(i == r, a, 0.0), 1)
        solved = tl.sum(row[:, :, None] * blocks, 1)
        blocks = tl.where(i == r, blocks - solved[:, None, :], blocks)
    blocks = _joined(blocks, A, COUNT // 2, SMALL)
    if COUNT > 2:
        blocks = _joined(blocks, A, COUNT // 4, 2 * SMALL)
    return tl.reshape(blocks, (C, C))


@triton.jit
def _solve_kernel(
    call, inverse, solved, C: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr
):
    """Of one chunk: T; its products with β v and β g k; g and the decays to the chunk's end."""
    inputs, strides, sizes = call
    fresh, removed, entries, lasts = solved
    _, k, v, log_decay, beta, segment_ids = inputs
    _, _, _, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, group, length, width, depth = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, key_head, start = head // heads, head % heads // group, n * C
    chunk = head * tl.num_programs(0) + n
    keys = _load(k + row * k_row + key_head * k_head, start, k_step, length, width, C, WIDTH)
    rates = _load_row(beta + head * length, start, length, C)
    decay, entry = _decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    # A = β ∘ strictly-lower(D ∘ K Kᵀ), T = (I + A)⁻¹.
    A = tl.where(p[:, None] > p[None, :], dot(keys, tl.trans(keys)) * decay * rates[:, None], 0.0)
    low = narrow(_inverse(A, C), keys.dtype)
    _store(inverse + chunk * C * C, low, 0, C, C, C, C, C)
    tl.store(entries + chunk * C + p, entry)
    # g, and D's last row: what each write is still worth at the chunk's end.
    tl.store(lasts + chunk * C + p, _last_row(decay, C))
    # U = T β V − (T β g K) N: neither factor knows the memory N, so all chunks make theirs at once.
    taken = dot(low, narrow((rates * entry)[:, None] * keys, keys.dtype))
    _store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    values = _load(v + row * v_row + key_head * v_head, start, v_step, length, depth, C, DEPTH)
    written = dot(low, narrow(rates[:, None] * values, keys.dtype))
    _store(fresh + head * length * depth, written, start, depth, length, depth, C, DEPTH)


@triton.jit
def _pass_kernel(call, solved, memory, before, after, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Carry BLOCK value rows of one memory over all chunks; `writes` holds the fresh part and is finished in place.

    The memory is held as (K, BLOCK), the larger width first, as tensor cores like it; `before` is (B, H, N, K, V).
    """
    inputs, strides, sizes = call
    writes, removed, entries, lasts = solved
    _, _, _, k_row, k_head, k_step, _, _, _ = strides
    heads, group, length, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    k = inputs[1] + head // heads * k_row + head % heads // group * k_head
    removed += head * length * width
    writes += head * length * depth + first
    # N = Mᵀ, of which these value rows depend on no others.
    held = tl.trans(_load(memory + head * depth * width, first, width, depth, width, BLOCK, WIDTH))
    chunks = tl.cdiv(length, C)
    for n in range(chunks):
        start, chunk = n * C, head * chunks + n
        # The memory before this chunk is kept, for the reads and for the gradient.
        low = narrow(held, k.dtype.element_ty)
        _store(before + chunk * depth * width + first, low, 0, depth, width, depth - first, WIDTH, BLOCK)
        taken = _load(removed, start, width, length, width, C, WIDTH)
        written = _load(writes, start, depth, length, depth - first, C, BLOCK).to(tl.float32)
        # U = fresh − removed N.
        written -= dot(taken, low)
        _store(writes, written, start, depth, length, depth - first, C, BLOCK)
        last = tl.load(lasts + chunk * C + tl.arange(0, C))
        keys = _load(k, start, k_step, length, width, C, WIDTH)
        # N ← g_C N + Kᵀ (last ∘ U).
        held = held * tl.load(entries + chunk * C + C - 1) + dot(
            tl.trans(keys), narrow(last[:, None] * written, keys.dtype)
        )
    _store(after + head * depth * width, tl.trans(held), first, width, depth, width, BLOCK, WIDTH)


@triton.jit
def _read_kernel(
    call, writes, before, out, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """What one chunk's queries read, BLOCK value columns at a time."""
    inputs, strides, sizes = call
    q, k, _, log_decay, _, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, group, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start = head // heads, n * C
    queries = _load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = _load(k + row * k_row + head % heads // group * k_head, start, k_step, length, width, C, WIDTH)
    decay, entry = _decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    # R = g ∘ Q N + (D ∘ Q Kᵀ) U; D is 0 above the diagonal.
    scores = narrow(dot(queries, tl.trans(keys)) * decay, keys.dtype)
    before += (head * tl.num_programs(0) + n) * depth * width
    for first in range(0, depth, BLOCK):
        held = _load(before + first, 0, depth, width, depth - first, WIDTH, BLOCK)
        written = _load(writes + head * length * depth + first, start, depth, length, depth - first, C, BLOCK)
        read = entry[:, None] * dot(queries, held) + dot(scores, written)
        _store(out + head * length * depth + first, read, start, depth, length, depth - first, C, BLOCK)


@triton.jit
def _grad_local_kernel(
    call, grad, inverse, solved, C: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, PACKED: tl.constexpr
):
    """Of one chunk: the gradient of its writes through its own reads; again T β g k, g and the decays to its end."""
    inputs, strides, sizes = call
    grad_writes, removed, entries, lasts = solved
    q, k, _, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, group, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start = head // heads, n * C
    chunk = head * tl.num_programs(0) + n
    queries = _load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = _load(k + row * k_row + head % heads // group * k_head, start, k_step, length, width, C, WIDTH)
    decay, entry = _decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    tl.store(entries + chunk * C + tl.arange(0, C), entry)
    tl.store(lasts + chunk * C + tl.arange(0, C), _last_row(decay, C))
    # T β g K again; T itself was kept, as solving for it is the longest step.
    scaled = (_load_row(beta + head * length, start, length, C) * entry)[:, None] * keys
    taken = dot(_load(inverse + chunk * C * C, 0, C, C, C, C, C), narrow(scaled, keys.dtype))
    _store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    # grad U from the chunk's own reads: (D ∘ Q Kᵀ)ᵀ grad R.
    scores = dot(queries, tl.trans(keys)) * decay
    upper = _load(grad + head * length * depth, start, depth, length, depth, C, DEPTH)
    _store(grad_writes + head * length * depth, dot(tl.trans(scores), upper), start, depth, length, depth, C, DEPTH)


@triton.jit
def _grad_pass_kernel(
    call, grad, solved, grad_after, after, grad_memory, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Carry the gradient of BLOCK value rows of the memory back over all chunks, finishing `grad_writes` in place.

    `after` (B, H, N, K, V) becomes the gradient of the memory after each chunk.
    """
    inputs, strides, sizes = call
    grad_writes, removed, entries, lasts = solved
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, group, length, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    q = inputs[0] + head // heads * q_row + head % heads * q_head
    k = inputs[1] + head // heads * k_row + head % heads // group * k_head
    removed += head * length * width
    grad += head * length * depth + first
    grad_writes += head * length * depth + first
    held = tl.trans(_load(grad_after + head * depth * width, first, width, depth, width, BLOCK, WIDTH))
    chunks = tl.cdiv(length, C)
    for back in range(chunks):
        n = chunks - 1 - back
        start, chunk = n * C, head * chunks + n
        low = narrow(held, k.dtype.element_ty)
        _store(after + chunk * depth * width + first, low, 0, depth, width, depth - first, WIDTH, BLOCK)
        last = tl.load(lasts + chunk * C + tl.arange(0, C))
        keys = _load(k, start, k_step, length, width, C, WIDTH)
        written = _load(grad_writes, start, depth, length, depth - first, C, BLOCK).to(tl.float32)
        # … and from the memory after the chunk, which U lives on in: (last ∘ K) grad N.
        written += last[:, None] * dot(keys, low)
        _store(grad_writes, written, start, depth, length, depth - first, C, BLOCK)
        entry = tl.load(entries + chunk * C + tl.arange(0, C))
        # grad N ← g_C grad N + Qᵀ (g ∘ grad R) − (T β g K)ᵀ grad U.
        read = narrow(entry[:, None] * _load(grad, start, depth, length, depth - first, C, BLOCK), keys.dtype)
        queries = _load(q, start, q_step, length, width, C, WIDTH)
        held = held * tl.load(entries + chunk * C + C - 1) + dot(tl.trans(queries), read)
        taken = _load(removed, start, width, length, width, C, WIDTH)
        held -= dot(tl.trans(taken), narrow(written, keys.dtype))
    _store(grad_memory + head * depth * width, tl.trans(held), first, width, depth, width, BLOCK, WIDTH)


@triton.jit
def _rate_gradient(within, since, to_last, across, C: tl.constexpr):
    """Gradient of each log decay: the sum over every product of decays with it. Sums stay inside a document."""
    p = tl.arange(0, C)
    # `last` is D's last row, and the memory's own decay g's last entry.
    within += tl.where((p == C - 1)[:, None], to_last[None, :], 0.0)
    since += tl.where(p == C - 1, across, 0.0)
    # log γ_i is in D[p, s] for s < i ≤ p, and in g_p for p ≥ i: sums from the end.
    spanning = tl.where(p[:, None] > p[None, :], tl.cumsum(within, 0, reverse=True), 0.0)
    return tl.sum(spanning, 1) + tl.cumsum(since, 0, reverse=True)


@triton.jit
def _grad_chunk_kernel(
    call, grad, held, results, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """Every gradient of one chunk but the memory's, per query head; what sums over value columns, BLOCK at a time."""
    inputs, strides, sizes = call
    before, after, inverse, grad_writes, entries, lasts = held
    q, k, v, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, group, length, width, depth = sizes
    grad_q, grad_k, grad_v, grad_decay, grad_beta = results
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, key_head, start = head // heads, head % heads // group, n * C
    chunk = head * tl.num_programs(0) + n
    keys = _load(k + row * k_row + key_head * k_head, start, k_step, length, width, C, WIDTH)
    rates = _load_row(beta + head * length, start, length, C)
    entry = tl.load(entries + chunk * C + p)
    solution = _load(inverse + chunk * C * C, 0, C, C, C, C, C)
    corrected, scored = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C, C), dtype=tl.float32)
    read, through = tl.zeros((C, WIDTH), dtype=tl.float32), tl.zeros((C, WIDTH), dtype=tl.float32)
    learned, kept = tl.zeros((C,), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    carried, last = tl.zeros((C,), dtype=tl.float32), tl.load(lasts + chunk * C + p)
    across = tl.zeros((WIDTH,), dtype=tl.float32)
    for first in range(0, depth, BLOCK):
        rest, at = depth - first, head * length * depth + first
        old = _load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        new = _load(after + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        upper = _load(grad + at, start, depth, length, rest, C, BLOCK)
        # U and the errors again: β (V − g ∘ K N) through T.
        expected = dot(keys, old)
        values = _load(v + row * v_row + key_head * v_head + first, start, v_step, length, rest, C, BLOCK)
        errors = values - entry[:, None] * expected
        written = narrow(dot(solution, narrow(rates[:, None] * errors, keys.dtype)), keys.dtype)
        # U = T (β ∘ errors): Tᵀ grad U is the gradient of β ∘ errors, and −Tᵀ grad U Uᵀ that of A.
        solved = dot(tl.trans(solution), _load(grad_writes + at, start, depth, length, rest, C, BLOCK))
        grad_error = rates[:, None] * solved
        _store(grad_v + at, grad_error, start, depth, length, rest, C, BLOCK)
        # Tables (C, C) and rows (C, K) that sum over value columns.
        corrected += dot(solved, tl.trans(written))
        scored += dot(upper, tl.trans(written))
        read += dot(upper, tl.trans(old))
        scaled = last[:, None] * written
        # grad K: through N after the chunk, less through the errors' K N before it.
        through += dot(scaled, tl.trans(new)) - dot(entry[:, None] * grad_error, tl.trans(old))
        carried += tl.sum(scaled * dot(keys, new), 1)
        learned += tl.sum(solved * errors, 1)
        kept += tl.sum(grad_error * expected, 1)
        across += tl.sum(new.to(tl.float32) * old.to(tl.float32), 1)
    queries = _load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    # Gradients of log g: by what is read of N, less by what the errors take of it; and by N's own decay.
    since = entry * (tl.sum(read * queries, 1) - kept)
    through_end = tl.sum(across, 0) * tl.sum(tl.where(p == C - 1, entry, 0.0), 0)
    decay, _ = _decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    # Of D ∘ Q Kᵀ: with D it is the gradient of Q Kᵀ, and with Q Kᵀ that of log D.
    scored *= decay
    read = entry[:, None] * read + dot(scored, keys)
    _store(grad_q + head * length * width, read, start, width, length, width, C, WIDTH)
    through += dot(tl.trans(scored), queries)
    within = scored * dot(queries, tl.trans(keys))
    # Of A = β ∘ D ∘ K Kᵀ in the same way; K enters K Kᵀ from both sides.
    grad_A = tl.where(p[:, None] > p[None, :], -corrected * decay, 0.0)
    products = dot(keys, tl.trans(keys))
    learned += tl.sum(grad_A * products, 1)
    mixed = rates[:, None] * grad_A
    within += mixed * products
    through += dot(mixed + tl.trans(mixed), keys)
    _store(grad_k + head * length * width, through, start, width, length, width, C, WIDTH)
    inside, at = start + p < length, head * length + start + p
    tl.store(grad_beta + at, learned, mask=inside)
    tl.store(grad_decay + at, _rate_gradient(within, since, carried, through_end, C), mask=inside)


@triton.jit
def _step_kernel(inputs, sizes, memory, out, after, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """One token: BLOCK value rows of one memory are read once and written once; q, k, v contiguous."""
    q, k, v, log_decay, beta = inputs
    heads, group, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    key_head = head // heads * (heads // group) + head % heads // group
    column, place = tl.arange(0, WIDTH), first + tl.arange(0, BLOCK)
    held = _load(memory + head * depth * width, first, width, depth, width, BLOCK, WIDTH)
    # M ← γ M; M ← M + β (v − M k) kᵀ; out = M q.
    held *= tl.exp(tl.load(log_decay + head))
    key = tl.load(k + key_head * width + column, mask=column < width, other=0.0).to(tl.float32)
    value = tl.load(v + key_head * depth + place, mask=place < depth, other=0.0).to(tl.float32)
    error = tl.load(beta + head) * (value - tl.sum(held * key[None, :], 1))
    held += error[:, None] * key[None, :]
    _store(after + head * depth * width, held, first, width, depth, width, BLOCK, WIDTH)
    query = tl.load(q + head * width + column, mask=column < width, other=0.0).to(tl.float32)
    read = tl.sum(held * query[None, :], 1)
    tl.store(out + head * depth + place, narrow(read, out.dtype.element_ty), mask=place < depth)


class _Call(NamedTuple):
    """What every kernel of one call takes. Rows are addressed by stride; only rows with gaps are copied."""

    inputs: tuple[Tensor, ...]  # q, k, v, log_decay, beta, segment_ids; the last unread where PACKED is false
    strides: tuple[int, ...]  # over batch, head and token of q, k and v
    sizes: tuple[int, ...]  # H, H / G, T, K, V
    packed: bool

    @property
    def chunk(self) -> int:
        return CHUNK[self.inputs[0].dtype]

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.sizes[2], self.chunk)

    @property
    def heads(self) -> int:
        """B · H: the second axis of every grid."""
        return self.inputs[0].shape[0] * self.sizes[0]

    @property
    def parallel(self) -> dict[str, int | bool]:
        """How a kernel runs that has each chunk to itself."""
        stages = 1 if self.inputs[0].dtype == torch.float32 else 2
        width = _padded(self.sizes[3])
        return {"C": self.chunk, "WIDTH": width, "PACKED": self.packed, "num_warps": 8, "num_stages": stages}

    def columns(self, tiles: int) -> int:
        """Value columns that a parallel kernel with room for `tiles` tiles takes at a time."""
        return min(_padded(self.sizes[4]), tiles * self.chunk // 2)

    @property
    def sequential(self) -> dict[str, int]:
        """How a pass over the chunks runs. Few value rows a program: it is the number of programs that fills a GPU."""
        exact = self.inputs[0].dtype == torch.float32
        block, warps, stages = (16, 8, 1) if exact else (min(_padded(self.sizes[4]), 32), 4, 2)
        width = _padded(self.sizes[3])
        return {"C": self.chunk, "WIDTH": width, "BLOCK": block, "num_warps": warps, "num_stages": stages}

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised (B, H, …) in q's dtype, or another."""
        return self.inputs[0].new_empty(*self.inputs[0].shape[:2], *shape, dtype=dtype)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _call(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segment_ids: Tensor | None) -> _Call:
    q, k, v = (unit_stride(x) for x in (q, k, v))
    log_decay, beta = log_decay.contiguous(), beta.contiguous()
    ids = log_decay if segment_ids is None else segment_ids.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    sizes = q.shape[1], q.shape[1] // k.shape[1], q.shape[2], q.shape[3], v.shape[3]
    return _Call((q, k, v, log_decay, beta, ids), strides, sizes, segment_ids is not None)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, memory after, memory before each chunk (B, H, N, K, V) and T (B, H, N, C, C), the last two in q's dtype."""
    call, memory = _call(q, k, v, log_decay, beta, segment_ids), memory.contiguous()
    (_, _, length, width, depth), chunks, full = call.sizes, call.chunks, _padded(v.shape[3])
    inverse, before = call.buffer(chunks, call.chunk, call.chunk), call.buffer(chunks, width, depth)
    writes, removed, out = call.buffer(length, depth), call.buffer(length, width), call.buffer(length, depth)
    entries, lasts = (call.buffer(chunks, call.chunk, dtype=torch.float32) for _ in range(2))
    after, common, solved = memory.new_empty(memory.shape), call[:3], (writes, removed, entries, lasts)
    with torch.cuda.device_of(q):
        _solve_kernel[chunks, call.heads](common, inverse, solved, DEPTH=full, **call.parallel)
        grid = triton.cdiv(depth, call.sequential["BLOCK"]), call.heads
        _pass_kernel[grid](common, solved, memory, before, after, **call.sequential)
        _read_kernel[chunks, call.heads](common, writes, before, out, BLOCK=call.columns(2), **call.parallel)
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    call, grad_after = _call(q, k, v, log_decay, beta, segment_ids), grad_after.contiguous()
    (_, _, length, width, depth), chunks, full = call.sizes, call.chunks, _padded(v.shape[3])
    grad_writes, removed, grad_v = call.buffer(length, depth), call.buffer(length, width), call.buffer(length, depth)
    entries, lasts = (call.buffer(chunks, call.chunk, dtype=torch.float32) for _ in range(2))
    after, grad_memory = torch.empty_like(before), torch.empty_like(grad_after)
    grad_q, grad_k = call.buffer(length, width), call.buffer(length, width)
    grad_decay, grad_beta = (call.buffer(length, dtype=torch.float32) for _ in range(2))
    common, grad, solved = call[:3], grad_out.contiguous(), (grad_writes, removed, entries, lasts)
    held, results = (
        (before, after, inverse, grad_writes, entries, lasts),
        (grad_q, grad_k, grad_v, grad_decay, grad_beta),
    )
    with torch.cuda.device_of(q):
        _grad_local_kernel[chunks, call.heads](common, grad, inverse, solved, DEPTH=full, **call.parallel)
        grid = triton.cdiv(depth, call.sequential["BLOCK"]), call.heads
        _grad_pass_kernel[grid](common, grad, solved, grad_after, after, grad_memory, **call.sequential)
        _grad_chunk_kernel[chunks, call.heads](common, grad, held, results, BLOCK=call.columns(1), **call.parallel)
    return grad_q, _shared(grad_k, k), _shared(grad_v, v), grad_decay, grad_beta, grad_memory


def _shared(grad: Tensor, like: Tensor) -> Tensor:
    """(B, G, T, ·): the sum over the query heads of each key/value head."""
    return grad if grad.shape == like.shape else grad.unflatten(1, (like.shape[1], -1)).sum(2)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    inputs = tuple(x.contiguous() for x in (q, k, v, log_decay, beta))
    (batch, heads, _, width), depth = q.shape, v.shape[3]
    memory, out, after = memory.contiguous(), q.new_empty(batch, heads, 1, depth), memory.new_empty(memory.shape)
    block, sizes = min(_padded(depth), 32), (heads, heads // k.shape[1], width, depth)
    grid = triton.cdiv(depth, block), batch * heads
    with torch.cuda.device_of(q):
        _step_kernel[grid](inputs, sizes, memory, out, after, WIDTH=_padded(width), BLOCK=block, num_warps=4)
    return out, after


def _shapes(q, k, v, log_decay, beta, memory, segment_ids):
    chunk = CHUNK[q.dtype]
    shape = (*q.shape[:2], -(-q.shape[2] // chunk))
    out, inverse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*shape, chunk, chunk)
    return out, memory.new_empty(memory.shape), q.new_empty(*shape, q.shape[3], v.shape[3]), inverse


def _step_shapes(q, k, v, log_decay, beta, memory):
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape)


_chunked = operator(
    "atma::recurrence_gpu",
    _forward,
    _backward,
    _shapes,
    ("out", "after", "before", "inverse"),
    {"memory": "grad_after"},
)
_one_token = operator("atma::recurrence_step_gpu", _step, None, _step_shapes)
