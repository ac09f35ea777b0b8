"""Linear recurrences by the compiled kernels (ops/native/recurrence_*.cpp): float32 and float64, on the CPU."""

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
    "batch heads length width k_groups v_groups value_width delta channels threads "
    "q_batch q_head q_token k_batch k_head k_token v_batch v_head v_token "
    "q k v log_decay beta born memory out after before"
)
_BACKWARD = "given grad_out grad_after grad_q grad_k grad_v grad_decay grad_beta grad_memory"
# q, k, v, log_decay and beta.
_Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


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
    """The reference's arguments and results. Without gradients a few tokens are taken one after the other."""
    if recording():
        return _operation(q, k, v, log_decay, beta, memory, segment_ids, rule)[:2]
    run = functools.partial(_run, "recurrence", rule)
    if q.shape[2] == 1:
        return run(q, k, v, log_decay, beta, memory, segment_ids)
    out, after = kept_apart(run, q, k, v, log_decay, beta, memory, segment_ids)
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
    """As `recurrence`, by the rule `add` with decays on the value axis."""
    if recording():
        return _by_value(q, k, v, log_decay, beta, memory, segment_ids)[:2]
    run = functools.partial(_run, "recurrence_by_value", "add")
    if q.shape[2] == 1:
        return run(q, k, v, log_decay, beta, memory, segment_ids)
    out, after = kept_apart(run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after


def in_turn(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, memory: Tensor, rule: str
) -> tuple[Tensor, Tensor]:
    """The reference's arguments and results, each token by itself: what one gives depends on nothing else in the call.
    A contiguous memory is overwritten. Inference only."""
    return _in_turn("recurrence_in_turn", (q, k, v, log_decay, beta), memory, rule)


def by_value_in_turn(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor | None, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """As `in_turn`, with decays on the value axis."""
    return _in_turn("recurrence_by_value_in_turn", (q, k, v, log_decay, beta), memory, "add")


def _in_turn(name: str, inputs: _Inputs, memory: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    memory = memory.contiguous()
    out = inputs[0].new_empty((*inputs[0].shape[:3], inputs[2].shape[3]))
    _call(name, rule, inputs, None, (memory, out, memory, None))
    return out, memory


def _run(
    name: str,
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, after = q.new_empty(*q.shape[:3], v.shape[3]), torch.empty_like(memory, memory_format=torch.contiguous_format)
    states = (memory.contiguous(), out, after, before)
    _call(f"{name}_forward", rule, (q, k, v, log_decay, beta), segment_ids, states)
    return out, after


def _kept(
    name: str,
    rule: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, memory after, and memory before each chunk (B, H, N, K, V)."""
    before = q.new_empty(*q.shape[:2], -(-q.shape[2] // CHUNK), q.shape[3], v.shape[3])
    run = functools.partial(_run, name, rule, before=before)
    out, after = kept_apart(run, q, k, v, log_decay, beta, memory, segment_ids)
    return out, after, before


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
    rule: str = "delta",
) -> tuple[Tensor, Tensor, Tensor]:
    return _kept("recurrence", rule, q, k, v, log_decay, beta, memory, segment_ids)


def _forward_by_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return _kept("recurrence_by_value", "add", q, k, v, log_decay, beta, memory, segment_ids)


def _backward(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    segment_ids: Tensor | None,
    before: Tensor,
    rule: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (grad_out, grad_after, before)
    return _gradients("recurrence_backward", rule, given, (q, k, v, log_decay, beta), segment_ids)


def _backward_by_value(
    grad_out: Tensor,
    grad_after: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    segment_ids: Tensor | None,
    before: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = (grad_out, grad_after, before)
    return _gradients("recurrence_by_value_backward", "add", given, (q, k, v, log_decay, beta), segment_ids)


def _gradients(
    name: str, rule: str, given: tuple[Tensor, Tensor, Tensor], inputs: _Inputs, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, k, v, log_decay, beta = inputs
    (grad_out, grad_after), before = (x.contiguous() for x in given[:2]), given[2]
    grad_q, grad_k, grad_v = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(grad_out.shape)
    grad_decay, grad_beta = (None if x is None else q.new_empty(x.shape) for x in (log_decay, beta))
    grads = (grad_q, grad_k, grad_v, grad_decay, grad_beta, q.new_empty(grad_after.shape))
    _call(name, rule, inputs, segment_ids, (None, None, None, before), (grad_out, grad_after, *grads))
    grad_k, grad_v = (
        grad if x.shape[1] == q.shape[1] else grad.unflatten(1, (x.shape[1], -1)).sum(2)
        for x, grad in ((k, grad_k), (v, grad_v))
    )
    grad_decay, grad_beta = (q.new_empty(0) if x is None else x for x in (grad_decay, grad_beta))
    return grad_q, grad_k, grad_v, grad_decay, grad_beta, grads[5]


def _call(
    name: str,
    rule: str,
    inputs: _Inputs,
    segment_ids: Tensor | None,
    states: tuple[Tensor | None, ...],
    gradients: tuple[Tensor | None, ...] | None = None,
) -> None:
    """states: memory, out, after and before, contiguous."""
    q, k, v = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs[:3]]
    log_decay, beta = (None if x is None else x.contiguous() for x in inputs[3:])
    born = None if segment_ids is None else begins(segment_ids)
    channels = 0 if log_decay is None or log_decay.ndim == 3 else log_decay.shape[3]
    sizes = (k.shape[1], v.shape[1], v.shape[3], rule == "delta", channels, torch.get_num_threads())
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    values = (*q.shape, *sizes, *strides, *native.addresses(q, k, v, log_decay, beta, born, *states))
    if gradients is None:
        native.call(name, q.dtype, _FIELDS, values)
    else:
        native.call(name, q.dtype, _BACKWARD, (*values, *native.addresses(*gradients)))


def _shapes(q, k, v, log_decay, beta, memory, segment_ids, rule="delta") -> tuple[Tensor, Tensor, Tensor]:
    before = q.new_empty(*q.shape[:2], -(-q.shape[2] // CHUNK), q.shape[3], v.shape[3])
    return q.new_empty(*q.shape[:3], v.shape[3]), memory.new_empty(memory.shape), before


_RESULTS = ("out", "after", "before")
_operation = operator("atma::recurrence_native", _forward, _backward, _shapes, _RESULTS, {"memory": "grad_after"})
_by_value = operator(
    "atma::recurrence_by_value_native",
    _forward_by_value,
    _backward_by_value,
    _shapes,
    _RESULTS,
    {"memory": "grad_after"},
)
