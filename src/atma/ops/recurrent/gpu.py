"""Linear recurrences in Triton: what a call must be, the kernels that it takes, and one token by itself.

`gpu_token` has the kernels of one decay a head and token, `gpu_channel` of one for each key channel, `gpu_value` of one
for each value channel; `gpu_tiles` what they share. No atomics: equal bits every time. What tensor cores multiply is
rounded to q's dtype; decays, the delta rule's solution, the memory and all sums are float32, and products of float32
are IEEE, never tf32. A query head finds its key and value heads by itself; gradients of shared keys and values are
summed afterwards. The memory before each chunk is kept in q's dtype, of which float16 ends at 65,504: a long text of
rule `add` that hardly decays wants bfloat16. What these modules do not say to be proven is not yet run on hardware.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import narrow
from atma.ops.operator import operator
from atma.ops.recurrent.gpu_channel import by_channel
from atma.ops.recurrent.gpu_tiles import CHUNK, KEY, TOKEN, VALUE, load, padded, store
from atma.ops.recurrent.gpu_token import by_token
from atma.ops.recurrent.gpu_value import over_values

WIDEST = 256
"""Key channels that one program holds."""
DEEPEST = 1024
"""Value columns that a program goes through; each is independent, so more could be a call of their own."""


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str,
) -> tuple[Tensor, Tensor]:
    """q (B, H, T, K); k (B, G, T, K), v (B, G', T, V) of q's dtype; the rest float32, as in the reference.

    Returns out (B, H, T, V) in q's dtype and the memory after the last token. A single token without gradient reads
    and writes the memory once.
    """
    _require(q, k, v, log_decay, beta, memory)
    log_decay = q.new_zeros(q.shape[:3], dtype=torch.float32) if log_decay is None else log_decay
    beta = q.new_ones(q.shape[:3], dtype=torch.float32) if beta is None else beta
    delta = rule == "delta"
    if q.shape[2] == 1 and not torch.is_grad_enabled():
        return _one_token(q, k, v, log_decay, beta, memory, delta, False)
    chunked = by_channel if log_decay.ndim == 4 else by_token
    out, after, _, _ = chunked(q, k, v, log_decay, beta, memory, segment_ids, delta)
    return out, after


def by_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule `add` with decays (B, H, T, V) on the value axis; all else as for `recurrence`."""
    _require(q, k, v, log_decay, beta, memory)
    beta = q.new_ones(q.shape[:3], dtype=torch.float32) if beta is None else beta
    if q.shape[2] == 1 and not torch.is_grad_enabled():
        return _one_token(q, k, v, log_decay, beta, memory, False, True)
    out, after, _ = over_values(q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


def _require(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, memory: Tensor) -> None:
    if q.dtype not in CHUNK or k.dtype != q.dtype or v.dtype != q.dtype:
        found = f"{q.dtype}, {k.dtype} and {v.dtype}"
        raise ValueError(f"the Triton recurrence takes q, k, v all float16, bfloat16 or float32, not {found}")
    for what, width, most in (("keys", q.shape[-1], WIDEST), ("values", v.shape[-1], DEEPEST)):
        if width > most:
            mend = f"use more and narrower heads, or backend 'cpu', not {width}"
            raise ValueError(f"the Triton recurrence takes {what} of at most {most} channels: {mend}")
    for tensor in (log_decay, beta, memory):
        if tensor is not None and tensor.dtype != torch.float32:
            found = tensor.dtype
            raise ValueError(f"log_decay, beta and memory must be float32 for the Triton recurrence, not {found}")


@triton.jit
def _step_kernel(
    inputs,
    sizes,
    memory,
    out,
    after,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    DELTA: tl.constexpr,
    AXIS: tl.constexpr,
):
    """One token: BLOCK value rows of one memory are read once and written once; q, k, v contiguous."""
    q, k, v, log_decay, beta = inputs
    heads, k_group, v_group, width, depth = sizes
    first, head = tl.program_id(0) * BLOCK, tl.program_id(1).to(tl.int64)
    key_head = head // heads * (heads // k_group) + head % heads // k_group
    value_head = head // heads * (heads // v_group) + head % heads // v_group
    column, place = tl.arange(0, WIDTH), first + tl.arange(0, BLOCK)
    held = load(memory + head * depth * width, first, width, depth, width, BLOCK, WIDTH)
    # M ← M diag(a), or diag(a) M; M ← M + β (v − M k) kᵀ, or β v kᵀ; out = M q.
    if AXIS == TOKEN:
        held *= tl.exp(tl.load(log_decay + head))
    elif AXIS == KEY:
        held *= tl.exp(tl.load(log_decay + head * width + column, mask=column < width, other=0.0))[None, :]
    else:
        held *= tl.exp(tl.load(log_decay + head * depth + place, mask=place < depth, other=0.0))[:, None]
    key = tl.load(k + key_head * width + column, mask=column < width, other=0.0).to(tl.float32)
    write = tl.load(v + value_head * depth + place, mask=place < depth, other=0.0).to(tl.float32)
    if DELTA:
        write -= tl.sum(held * key[None, :], 1)
    held += (tl.load(beta + head) * write)[:, None] * key[None, :]
    store(after + head * depth * width, held, first, width, depth, width, BLOCK, WIDTH)
    query = tl.load(q + head * width + column, mask=column < width, other=0.0).to(tl.float32)
    read = tl.sum(held * query[None, :], 1)
    tl.store(out + head * depth + place, narrow(read, out.dtype.element_ty), mask=place < depth)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    delta: bool,
    value: bool,
) -> tuple[Tensor, Tensor]:
    inputs = tuple(x.contiguous() for x in (q, k, v, log_decay, beta))
    (batch, heads, _, width), depth = q.shape, v.shape[3]
    memory, out, after = memory.contiguous(), q.new_empty(batch, heads, 1, depth), memory.new_empty(memory.shape)
    block, sizes = min(padded(depth), 32), (heads, heads // k.shape[1], heads // v.shape[1], width, depth)
    grid = triton.cdiv(depth, block), batch * heads
    how = {"WIDTH": padded(width), "BLOCK": block, "DELTA": delta, "num_warps": 4}
    axis = TOKEN if log_decay.ndim == 3 else VALUE if value else KEY
    with torch.cuda.device_of(q):
        _step_kernel[grid](inputs, sizes, memory, out, after, AXIS=axis, **how)
    return out, after


def _step_shapes(q, k, v, log_decay, beta, memory, delta, value):
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape)


_one_token = operator("atma::recurrence_step_gpu", _step, None, _step_shapes)

__all__ = ["by_value", "recurrence"]
