"""The gated delta rule by the compiled kernel (ops/native/recurrence.cpp): float32 and float64, on the CPU."""

import functools

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.operator import operator
from atma.ops.recurrent.poison import kept_apart
from atma.ops.segments import begins

CHUNK = 64
_FIELDS = (
    "batch heads length width groups value_width threads q_batch q_head q_token k_batch k_head k_token v_batch v_head "
    "v_token q k v log_decay beta born memory out after before "
    "grad_out grad_after grad_q grad_k grad_v grad_decay grad_beta grad_memory"
)
_IN_TURN = (
    "batch heads groups tokens width value_width q_batch q_head q_token k_batch k_head k_token v_batch v_head v_token "
    "q k v log_decay beta memory out threads"
)


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
    """The reference's arguments and results. Without gradients a few tokens are taken one after the other."""
    if recording():
        return _operation(q, k, v, log_decay, beta, memory, segment_ids)[:2]
    if q.shape[2] == 1:
        return _run(q, k, v, log_decay, beta, memory, segment_ids)
    out, after = kept_apart(_run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


def in_turn(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """The reference's arguments and results, each token by itself (ops/native/serve.cpp): what one gives depends on
    nothing else in the call. A contiguous memory is overwritten. Inference only."""
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v)]
    log_decay, beta, memory = log_decay.contiguous(), beta.contiguous(), memory.contiguous()
    out = torch.empty((*q.shape[:3], v.shape[3]), dtype=q.dtype)
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], v.shape[3])
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    places = native.addresses(q, k, v, log_decay, beta, memory, out)
    native.call("recurrence_in_turn", q.dtype, _IN_TURN, (*sizes, *strides, *places, torch.get_num_threads()))
    return out, memory


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    segment_ids: Tensor | None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, after = q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(memory, memory_format=torch.contiguous_format)
    _call("recurrence_forward", (q, k, v, log_decay, beta), segment_ids, memory, (out, after, before), (None,) * 8)
    return out, after


def _forward(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, memory: Tensor, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """out, memory after, and memory before each chunk (B, H, N, K, V)."""
    before = q.new_empty(*q.shape[:2], -(-q.shape[2] // CHUNK), q.shape[3], v.shape[3])
    run = functools.partial(_run, before=before)
    out, after = kept_apart(run, q, k, v, log_decay, beta, memory, segment_ids)
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
    group = q.shape[1] // k.shape[1]
    shapes = (q.shape, q.shape, (*q.shape[:3], v.shape[3]), beta.shape, beta.shape, grad_after.shape)
    grads = [q.new_empty(shape) for shape in shapes]
    given = (grad_out.contiguous(), grad_after.contiguous())
    _call(
        "recurrence_backward", (q, k, v, log_decay, beta), segment_ids, grads[5], (None, None, before), (*given, *grads)
    )
    grad_q, grad_k, grad_v, grad_decay, grad_beta, grad_memory = grads
    if group > 1:
        grad_k, grad_v = (x.unflatten(1, (-1, group)).sum(2) for x in (grad_k, grad_v))
    return grad_q, grad_k, grad_v, grad_decay, grad_beta, grad_memory


def _call(
    name: str,
    inputs: tuple[Tensor, ...],
    segment_ids: Tensor | None,
    memory: Tensor,
    results: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...],
) -> None:
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3]]
    log_decay, beta, memory = inputs[3].contiguous(), inputs[4].contiguous(), memory.contiguous()
    born = None if segment_ids is None else begins(segment_ids)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    places = native.addresses(q, k, v, log_decay, beta, born, memory, *results, *gradients)
    values = (*q.shape, v.shape[1], v.shape[3], torch.get_num_threads(), *strides, *places)
    native.call(name, q.dtype, _FIELDS, values)


def _shapes(q, k, v, log_decay, beta, memory, segment_ids) -> tuple[Tensor, Tensor, Tensor]:
    before = q.new_empty(*q.shape[:2], -(-q.shape[2] // CHUNK), q.shape[3], v.shape[3])
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape), before


_operation = operator(
    "atma::recurrence_native", _forward, _backward, _shapes, ("out", "after", "before"), {"memory": "grad_after"}
)
