"""Linear recurrences in Triton with one decay a head and token: in chunks, gradient by hand (maths.md, section 5).

The letters are those of `cpu.py`. Forward: every chunk on its own solves T = (I + A)⁻¹ and its share of the writes; one
pass over the chunks, with the memory's value rows split over programs, carries the memory and finishes the writes;
every chunk on its own reads. Backward: the same three steps for the gradients. The rule `add` has no A: U = β V.
The two passes are also those of decays for each key or value channel.

The delta rule up to widths of 128 has passed its tests on an H100; the rule `add`, other head counts for v than for k,
and wider heads are not yet run on hardware.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import dot, narrow
from atma.ops.operator import operator
from atma.ops.recurrent.gpu_tiles import (
    KEY,
    TOKEN,
    call_of,
    decays,
    invert,
    last_row,
    load,
    load_row,
    shapes,
    shared,
    store,
)


@triton.jit
def _solve_kernel(
    call,
    inverse,
    solved,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Of one chunk: T; its products with β v and β g k; g and the decays to the chunk's end."""
    inputs, strides, sizes = call
    fresh, removed, entries, lasts = solved
    _, k, v, log_decay, beta, segment_ids = inputs
    _, _, _, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, k_group, v_group, length, width, depth = sizes
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start = head // heads, n * C
    chunk = head * tl.num_programs(0) + n
    if DELTA:
        keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    rates = load_row(beta + head * length, start, length, C)
    decay, entry = decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    if DELTA:
        # A = β ∘ strictly-lower(D ∘ K Kᵀ), T = (I + A)⁻¹.
        A = tl.where(p[:, None] > p[None, :], dot(keys, tl.trans(keys)) * decay * rates[:, None], 0.0)
        low = narrow(invert(A, C), keys.dtype)
        store(inverse + chunk * C * C, low, 0, C, C, C, C, C)
    tl.store(entries + chunk * C + p, entry)
    # g, and D's last row: what each write is still worth at the chunk's end.
    tl.store(lasts + chunk * C + p, last_row(decay, C))
    if DELTA:
        # U = T β V − (T β g K) N: neither factor knows the memory N, so all chunks make theirs at once.
        taken = dot(low, narrow((rates * entry)[:, None] * keys, keys.dtype))
        store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    v += row * v_row + head % heads // v_group * v_head
    fresh += head * length * depth
    for first in tl.static_range(0, DEPTH, BLOCK):
        written = rates[:, None] * load(v + first, start, v_step, length, depth - first, C, BLOCK)
        if DELTA:
            written = dot(low, narrow(written, low.dtype))
        store(fresh + first, written, start, depth, length, depth - first, C, BLOCK)


@triton.jit
def pass_kernel(
    call,
    solved,
    memory,
    before,
    after,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Carry BLOCK value rows of one memory over all chunks; `writes` holds the fresh part and is finished in place.

    The memory is held as (K, BLOCK), the larger width first, as tensor cores like it; `before` is (B, H, N, K, V).
    AXIS KEY or VALUE: `entries` is the decay over each chunk, a row for it, and `lasts` is in k, or in the writes.
    """
    inputs, strides, sizes = call
    writes, removed, entries, lasts = solved
    _, _, _, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    k = inputs[1] + head // heads * k_row + head % heads // k_group * k_head
    removed += head * length * width
    writes += head * length * depth + first
    # N = Mᵀ, of which these value rows depend on no others.
    held = tl.trans(load(memory + head * depth * width, first, width, depth, width, BLOCK, WIDTH))
    chunks = tl.cdiv(length, C)
    for n in range(chunks):
        start, chunk = n * C, head * chunks + n
        # The memory before this chunk is kept, for the reads and for the gradient.
        low = narrow(held, k.dtype.element_ty)
        store(before + chunk * depth * width + first, low, 0, depth, width, depth - first, WIDTH, BLOCK)
        if DELTA:
            taken = load(removed, start, width, length, width, C, WIDTH)
        written = load(writes, start, depth, length, depth - first, C, BLOCK).to(tl.float32)
        if DELTA:
            # U = fresh − removed N.
            written -= dot(taken, low)
            store(writes, written, start, depth, length, depth - first, C, BLOCK)
        # N ← g_C N + Kᵀ (last ∘ U).
        if AXIS == TOKEN:
            written = tl.load(lasts + chunk * C + tl.arange(0, C))[:, None] * written
        keys = load(k, start, k_step, length, width, C, WIDTH)
        if AXIS == TOKEN:
            rest = tl.load(entries + chunk * C + C - 1)
        elif AXIS == KEY:
            rest = load_row(entries + chunk * width, 0, width, WIDTH)[:, None]
        else:
            rest = load_row(entries + chunk * depth, first, depth, BLOCK)[None, :]
        held = held * rest + dot(tl.trans(keys), narrow(written, keys.dtype))
    store(after + head * depth * width, tl.trans(held), first, width, depth, width, BLOCK, WIDTH)


@triton.jit
def _read_kernel(
    call, writes, before, out, C: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr
):
    """What one chunk's queries read, BLOCK value columns at a time."""
    inputs, strides, sizes = call
    q, k, _, log_decay, _, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start = head // heads, n * C
    queries = load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    decay, entry = decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    # R = g ∘ Q N + (D ∘ Q Kᵀ) U; D is 0 above the diagonal.
    scores = narrow(dot(queries, tl.trans(keys)) * decay, keys.dtype)
    before += (head * tl.num_programs(0) + n) * depth * width
    for first in range(0, depth, BLOCK):
        held = load(before + first, 0, depth, width, depth - first, WIDTH, BLOCK)
        written = load(writes + head * length * depth + first, start, depth, length, depth - first, C, BLOCK)
        read = entry[:, None] * dot(queries, held) + dot(scores, written)
        store(out + head * length * depth + first, read, start, depth, length, depth - first, C, BLOCK)


@triton.jit
def _grad_local_kernel(
    call,
    grad,
    inverse,
    solved,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    DELTA: tl.constexpr,
):
    """Of one chunk: the gradient of its writes through its own reads; again T β g k, g and the decays to its end."""
    inputs, strides, sizes = call
    grad_writes, removed, entries, lasts = solved
    q, k, _, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, depth = sizes
    n, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start = head // heads, n * C
    chunk = head * tl.num_programs(0) + n
    queries = load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    decay, entry = decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    tl.store(entries + chunk * C + tl.arange(0, C), entry)
    tl.store(lasts + chunk * C + tl.arange(0, C), last_row(decay, C))
    if DELTA:
        # T β g K again; T itself was kept, as solving for it is the longest step.
        scaled = (load_row(beta + head * length, start, length, C) * entry)[:, None] * keys
        taken = dot(load(inverse + chunk * C * C, 0, C, C, C, C, C), narrow(scaled, keys.dtype))
        store(removed + head * length * width, taken, start, width, length, width, C, WIDTH)
    # grad U from the chunk's own reads: (D ∘ Q Kᵀ)ᵀ grad R.
    scores = dot(queries, tl.trans(keys)) * decay
    grad += head * length * depth
    grad_writes += head * length * depth
    for first in tl.static_range(0, DEPTH, BLOCK):
        upper = load(grad + first, start, depth, length, depth - first, C, BLOCK)
        read = dot(tl.trans(scores), upper)
        store(grad_writes + first, read, start, depth, length, depth - first, C, BLOCK)


@triton.jit
def grad_pass_kernel(
    call,
    grad,
    solved,
    grad_after,
    after,
    grad_memory,
    C: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Carry the gradient of BLOCK value rows of the memory back over all chunks, finishing `grad_writes` in place.

    `after` (B, H, N, K, V) becomes the gradient of the memory after each chunk. AXIS KEY or VALUE: as in the pass, and
    g is in q, or in `grad`.
    """
    inputs, strides, sizes = call
    grad_writes, removed, entries, lasts = solved
    q_row, q_head, q_step, k_row, k_head, k_step, _, _, _ = strides
    heads, k_group, _, length, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    q = inputs[0] + head // heads * q_row + head % heads * q_head
    k = inputs[1] + head // heads * k_row + head % heads // k_group * k_head
    removed += head * length * width
    grad += head * length * depth + first
    grad_writes += head * length * depth + first
    held = tl.trans(load(grad_after + head * depth * width, first, width, depth, width, BLOCK, WIDTH))
    chunks = tl.cdiv(length, C)
    for back in range(chunks):
        n = chunks - 1 - back
        start, chunk = n * C, head * chunks + n
        low = narrow(held, k.dtype.element_ty)
        store(after + chunk * depth * width + first, low, 0, depth, width, depth - first, WIDTH, BLOCK)
        if DELTA:
            if AXIS == TOKEN:
                last = tl.load(lasts + chunk * C + tl.arange(0, C))
            keys = load(k, start, k_step, length, width, C, WIDTH)
            written = load(grad_writes, start, depth, length, depth - first, C, BLOCK).to(tl.float32)
            # … and from the memory after the chunk, which U lives on in: (last ∘ K) grad N.
            written += last[:, None] * dot(keys, low) if AXIS == TOKEN else dot(keys, low)
            store(grad_writes, written, start, depth, length, depth - first, C, BLOCK)
        # grad N ← g_C grad N + Qᵀ (g ∘ grad R) − (T β g K)ᵀ grad U.
        if AXIS == TOKEN:
            entry = tl.load(entries + chunk * C + tl.arange(0, C))
            read = narrow(entry[:, None] * load(grad, start, depth, length, depth - first, C, BLOCK), low.dtype)
            rest = tl.load(entries + chunk * C + C - 1)
        elif AXIS == KEY:
            rest = load_row(entries + chunk * width, 0, width, WIDTH)[:, None]
        else:
            rest = load_row(entries + chunk * depth, first, depth, BLOCK)[None, :]
        if AXIS != TOKEN:
            read = load(grad, start, depth, length, depth - first, C, BLOCK)
        queries = load(q, start, q_step, length, width, C, WIDTH)
        held = held * rest + dot(tl.trans(queries), read)
        if DELTA:
            taken = load(removed, start, width, length, width, C, WIDTH)
            held -= dot(tl.trans(taken), narrow(written, low.dtype))
    store(grad_memory + head * depth * width, tl.trans(held), first, width, depth, width, BLOCK, WIDTH)


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
    """Every gradient of one chunk but the memory's, per query head; what sums over value columns, BLOCK at a time."""
    inputs, strides, sizes = call
    before, after, inverse, grad_writes, entries, lasts = held
    q, k, v, log_decay, beta, segment_ids = inputs
    q_row, q_head, q_step, k_row, k_head, k_step, v_row, v_head, v_step = strides
    heads, k_group, v_group, length, width, depth = sizes
    grad_q, grad_k, grad_v, grad_decay, grad_beta = results
    n, head, p = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.arange(0, C)
    row, start = head // heads, n * C
    chunk = head * tl.num_programs(0) + n
    keys = load(k + row * k_row + head % heads // k_group * k_head, start, k_step, length, width, C, WIDTH)
    rates = load_row(beta + head * length, start, length, C)
    entry = tl.load(entries + chunk * C + p)
    if DELTA:
        solution = load(inverse + chunk * C * C, 0, C, C, C, C, C)
        corrected, kept = tl.zeros((C, C), dtype=tl.float32), tl.zeros((C,), dtype=tl.float32)
    scored = tl.zeros((C, C), dtype=tl.float32)
    read, through = tl.zeros((C, WIDTH), dtype=tl.float32), tl.zeros((C, WIDTH), dtype=tl.float32)
    learned = tl.zeros((C,), dtype=tl.float32)
    carried, last = tl.zeros((C,), dtype=tl.float32), tl.load(lasts + chunk * C + p)
    across = tl.zeros((WIDTH,), dtype=tl.float32)
    v += row * v_row + head % heads // v_group * v_head
    for first in range(0, depth, BLOCK):
        rest, at = depth - first, head * length * depth + first
        old = load(before + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        new = load(after + chunk * depth * width + first, 0, depth, width, rest, WIDTH, BLOCK)
        upper = load(grad + at, start, depth, length, rest, C, BLOCK)
        errors = load(v + first, start, v_step, length, rest, C, BLOCK).to(tl.float32)
        if DELTA:
            # U and the errors again: β (V − g ∘ K N) through T.
            expected = dot(keys, old)
            errors -= entry[:, None] * expected
            written = narrow(dot(solution, narrow(rates[:, None] * errors, keys.dtype)), keys.dtype)
            # U = T (β ∘ errors): Tᵀ grad U is the gradient of β ∘ errors, and −Tᵀ grad U Uᵀ that of A.
            solved = dot(tl.trans(solution), load(grad_writes + at, start, depth, length, rest, C, BLOCK))
        else:
            written = narrow(rates[:, None] * errors, keys.dtype)
            # U lives on in the memory after the chunk: (last ∘ K) grad N.
            solved = load(grad_writes + at, start, depth, length, rest, C, BLOCK).to(tl.float32)
            solved += last[:, None] * dot(keys, new)
        grad_error = rates[:, None] * solved
        store(grad_v + at, grad_error, start, depth, length, rest, C, BLOCK)
        # Tables (C, C) and rows (C, K) that sum over value columns.
        if DELTA:
            corrected += dot(solved, tl.trans(written))
        scored += dot(upper, tl.trans(written))
        read += dot(upper, tl.trans(old))
        scaled = last[:, None] * written
        # grad K: through N after the chunk, less through the errors' K N before it.
        if DELTA:
            through += dot(scaled, tl.trans(new)) - dot(entry[:, None] * grad_error, tl.trans(old))
            kept += tl.sum(grad_error * expected, 1)
        else:
            through += dot(scaled, tl.trans(new))
        carried += tl.sum(scaled * dot(keys, new), 1)
        learned += tl.sum(solved * errors, 1)
        across += tl.sum(new.to(tl.float32) * old.to(tl.float32), 1)
    queries = load(q + row * q_row + head % heads * q_head, start, q_step, length, width, C, WIDTH)
    # Gradients of log g: by what is read of N, less by what the errors take of it; and by N's own decay.
    since = tl.sum(read * queries, 1)
    since = entry * (since - kept if DELTA else since)
    through_end = tl.sum(across, 0) * tl.sum(tl.where(p == C - 1, entry, 0.0), 0)
    decay, _ = decays(log_decay + head * length, segment_ids + row * length, start, length, C, PACKED)
    # Of D ∘ Q Kᵀ: with D it is the gradient of Q Kᵀ, and with Q Kᵀ that of log D.
    scored *= decay
    read = entry[:, None] * read + dot(scored, keys)
    store(grad_q + head * length * width, read, start, width, length, width, C, WIDTH)
    through += dot(tl.trans(scored), queries)
    within = scored * dot(queries, tl.trans(keys))
    if DELTA:
        # Of A = β ∘ D ∘ K Kᵀ in the same way; K enters K Kᵀ from both sides.
        grad_A = tl.where(p[:, None] > p[None, :], -corrected * decay, 0.0)
        products = dot(keys, tl.trans(keys))
        learned += tl.sum(grad_A * products, 1)
        mixed = rates[:, None] * grad_A
        within += mixed * products
        through += dot(mixed + tl.trans(mixed), keys)
    store(grad_k + head * length * width, through, start, width, length, width, C, WIDTH)
    inside, at = start + p < length, head * length + start + p
    tl.store(grad_beta + at, learned, mask=inside)
    tl.store(grad_decay + at, _rate_gradient(within, since, carried, through_end, C), mask=inside)


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
    writes, removed, out = call.buffer(length, depth), call.buffer(length, width), call.buffer(length, depth)
    entries, lasts = (call.buffer(chunks, call.chunk, dtype=torch.float32) for _ in range(2))
    after, common, solved = memory.new_empty(memory.shape), call[:3], (writes, removed, entries, lasts)
    with torch.cuda.device_of(q):
        _solve_kernel[grid](common, inverse, solved, DELTA=delta, **call.depth, **call.parallel)
        pass_kernel[call.passes](common, solved, memory, before, after, DELTA=delta, AXIS=TOKEN, **call.sequential)
        _read_kernel[grid](common, writes, before, out, BLOCK=call.columns(2), **call.parallel)
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
    (*_, length, width, depth), chunks, grid = call.sizes, call.chunks, (call.chunks, call.heads)
    grad_writes, removed, grad_v = call.buffer(length, depth), call.buffer(length, width), call.buffer(length, depth)
    entries, lasts = (call.buffer(chunks, call.chunk, dtype=torch.float32) for _ in range(2))
    after, grad_memory = torch.empty_like(before), torch.empty_like(grad_after)
    grad_q, grad_k = call.buffer(length, width), call.buffer(length, width)
    grad_decay, grad_beta = (call.buffer(length, dtype=torch.float32) for _ in range(2))
    common, grad, solved = call[:3], grad_out.contiguous(), (grad_writes, removed, entries, lasts)
    held = before, after, inverse, grad_writes, entries, lasts
    results = grad_q, grad_k, grad_v, grad_decay, grad_beta
    how = {"DELTA": delta, "AXIS": TOKEN, **call.sequential}
    with torch.cuda.device_of(q):
        _grad_local_kernel[grid](common, grad, inverse, solved, DELTA=delta, **call.depth, **call.parallel)
        grad_pass_kernel[call.passes](common, grad, solved, grad_after, after, grad_memory, **how)
        _grad_chunk_kernel[grid](common, grad, held, results, BLOCK=call.columns(1), DELTA=delta, **call.parallel)
    return grad_q, shared(grad_k, k), shared(grad_v, v), grad_decay, grad_beta, grad_memory


by_token = operator(
    "atma::recurrence_gpu",
    _forward,
    _backward,
    shapes,
    ("out", "after", "before", "inverse"),
    {"memory": "grad_after"},
)

__all__ = ["by_token", "grad_pass_kernel", "pass_kernel"]
