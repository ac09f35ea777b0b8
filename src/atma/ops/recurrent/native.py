"""Linear recurrences by the compiled kernels (ops/native/recurrence_*.cpp): float32 and float64, on the CPU."""

import functools
import math

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.operator import operator
from atma.ops.recurrent.decays import shared
from atma.ops.recurrent.poison import kept_apart
from atma.ops.segments import begins

CHUNK = 64
_FIELDS = (
    "batch heads length width q_groups k_groups v_groups value_width delta channels threads together "
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
    out = _empty_out(inputs[0], memory)
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
    out, after = _empty_out(q, memory), torch.empty_like(memory, memory_format=torch.contiguous_format)
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
    before = _empty_before(q, memory)
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
    # Those of q and k come summed over the heads that a thread takes together.
    parts = grad_out.shape[1] // _together(name, inputs)
    grad_q, grad_k = (q.new_empty(q.shape[0], parts, *q.shape[2:]) for _ in range(2))
    grad_v = q.new_empty(grad_out.shape)
    grad_decay, grad_beta = (None if x is None else q.new_empty(x.shape) for x in (log_decay, beta))
    grads = (grad_q, grad_k, grad_v, grad_decay, grad_beta, q.new_empty(grad_after.shape))
    _call(name, rule, inputs, segment_ids, (None, None, None, before), (grad_out, grad_after, *grads))
    grad_q, grad_k, grad_v = (shared(grad, x) for x, grad in ((q, grad_q), (k, grad_k), (v, grad_v)))
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
    groups, threads = [x.shape[1] for x in (q, k, v)], torch.get_num_threads()
    sizes = (*groups, v.shape[3], rule == "delta", channels, threads, _together(name, inputs))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    values = (q.shape[0], max(groups), *q.shape[2:], *sizes, *strides)
    values = (*values, *native.addresses(q, k, v, log_decay, beta, born, *states))
    if gradients is None:
        native.call(name, q.dtype, _FIELDS, values)
    else:
        native.call(name, q.dtype, _BACKWARD, (*values, *native.addresses(*gradients)))


def _together(name: str, inputs: _Inputs) -> int:
    """How many heads that share q and k, and so their products, one thread takes side by side, none left without work.
    Where channels decay the products have decays in them, and each head has its own."""
    q, k, v, log_decay, _ = inputs
    heads = max(x.shape[1] for x in (q, k, v))
    sharing = heads // math.lcm(q.shape[1], k.shape[1])
    if sharing == 1 or "by_value" in name or (log_decay is not None and log_decay.ndim == 4):
        return 1
    most = max(1, q.shape[0] * heads // torch.get_num_threads())
    return next(count for count in range(min(sharing, most), 0, -1) if sharing % count == 0)


def _empty_out(q: Tensor, memory: Tensor) -> Tensor:
    return q.new_empty(*memory.shape[:2], q.shape[2], memory.shape[2])


def _empty_before(q: Tensor, memory: Tensor) -> Tensor:
    return q.new_empty(*memory.shape[:2], -(-q.shape[2] // CHUNK), q.shape[3], memory.shape[2])


def _shapes(q, k, v, log_decay, beta, memory, segment_ids, rule="delta") -> tuple[Tensor, Tensor, Tensor]:
    return _empty_out(q, memory), memory.new_empty(memory.shape), _empty_before(q, memory)


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
