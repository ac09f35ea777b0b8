"""Linear recurrences: a matrix memory that decays, takes a write at the current key, and is read by the query."""

from typing import Literal

import torch
from torch import Tensor

from atma.ops.backend import (
    backend_for,
    check_indices,
    check_tensors,
    implementation,
    own_precision,
    require_steady,
)
from atma.ops.native import logging

Rule = Literal["add", "delta"]
Axis = Literal["key", "value"]


@own_precision
def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    memory: Tensor | None = None,
    segment_ids: Tensor | None = None,
    rule: Rule = "add",
    decay_axis: Axis = "key",
    backend: str = "auto",
    steady: bool = False,
) -> tuple[Tensor, Tensor]:
    """M ← M diag(a); M ← M + β w kᵀ; out = M q, for each token in turn (mixers.md, section 3.1).

    w is v (rule "add") or v − M k, of the decayed M ("delta"). q and k (B, G, T, K) and v (B, G, T, V), each with its
    own G: H is the largest and a multiple of the others, and head h reads ⌊h·G/H⌋ of each. beta (B, H, T), None for 1;
    memory (B, H, V, K) before the first token, None for zero.
    log_decay = log a ≤ 0: None, one for each head (H,), and token (B, H, T), and key channel (B, H, T, K); with
    decay_axis "value", of rule "add" alone, each value channel (B, H, T, V), and then M ← diag(a) M. Keys are taken as
    given: the delta rule is stable for β ‖k‖² ≤ 2.
    segment_ids (B, T), only without a memory: the memory is empty at each document's first token.
    steady: each token by itself, in turn: the same bits however the text is cut into calls and whatever rows are beside
    it, by the native backend alone, and without gradients; a contiguous memory, float32 or wider, is then overwritten.
    Returns out (B, H, T, V) in q's dtype and the memory after the last token, float32 or wider. ValueError: shapes that
    do not fit, and on the CPU, unless steady, a decay above zero, or β outside [0, 2] for the delta rule.
    """
    check_tensors("q k v log_decay beta memory", q, k, v, log_decay, beta, memory)
    heads = _check_shapes(q, k, v, beta, memory)
    log_decay = _whole_decay(log_decay, (q.shape[0], heads, *v.shape[2:]), q.shape[3], rule, decay_axis)
    if memory is not None and segment_ids is not None:
        raise ValueError("segment_ids marks packed documents in training; a call with a memory continues one document")
    check_indices("segment_ids", segment_ids, (q.shape[0], q.shape[2]), q.device)
    if not steady:
        _check_values(log_decay, beta, rule)
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    shape = (q.shape[0], heads, v.shape[3], q.shape[3])
    held = q.new_zeros(shape, dtype=work) if memory is None else memory.to(work)
    chosen = backend_for(backend, q, "recurrent")
    if steady:
        require_steady(chosen, segment_ids)
    low = v.dtype if chosen in ("gpu", "fla") else work  # v's own: autocast widens q and k where it normalises them
    q, k, v = q.to(low), k.to(low), v.to(low)
    log_decay, beta = (None if x is None else x.to(work) for x in (log_decay, beta))
    if chosen != "native":  # a query for each head, a view where all share one
        q = q.unsqueeze(2).expand(-1, -1, heads // q.shape[1], -1, -1).flatten(1, 2)
    backend_module = implementation("recurrent", chosen)
    if decay_axis == "value":
        named = backend_module.by_value_in_turn if steady else backend_module.by_value
        out, after = named(q, k, v, log_decay, beta, held, *(() if steady else (segment_ids,)))
    elif steady:
        out, after = backend_module.in_turn(q, k, v, log_decay, beta, held, rule)
    else:
        out, after = backend_module.recurrence(q, k, v, log_decay, beta, held, segment_ids, rule)
    return out.to(dtype), after


def gated_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor | None = None,
    segment_ids: Tensor | None = None,
    backend: str = "auto",
    steady: bool = False,
) -> tuple[Tensor, Tensor]:
    """M ← γ M; M ← M + β (v − M k) kᵀ; out = M q, for each token in turn (maths.md, section 5; 2412.06464).

    `recurrence` by the delta rule with one decay γ for each head and token: log_decay = log γ and beta (B, H, T).
    """
    return recurrence(q, k, v, log_decay, beta, memory, segment_ids, "delta", "key", backend, steady)


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, memory: Tensor | None) -> int:
    """H, the heads of what is read."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        raise ValueError(f"{shapes} must be (B, G, T, K), (B, G, T, K) and (B, G, T, V), none of them 0")
    batch, _, length, width = q.shape
    if not (k.shape[0] == v.shape[0] == batch and k.shape[2] == v.shape[2] == length and k.shape[3] == width):
        raise ValueError(f"{shapes} do not fit together")
    groups = [x.shape[1] for x in (q, k, v)]
    heads = max(groups)
    if any(heads % count for count in groups):
        found = "{}, {} and {}".format(*groups)
        raise ValueError(f"q, k and v have {found} heads: give each a number that divides the largest, {heads}")
    if beta is not None and beta.shape != (batch, heads, length):
        raise ValueError(f"beta must be {(batch, heads, length)}, not {tuple(beta.shape)}")
    if memory is not None and memory.shape != (batch, heads, v.shape[3], width):
        raise ValueError(f"memory must be {(batch, heads, v.shape[3], width)}, not {tuple(memory.shape)}")
    return heads


def _whole_decay(log_decay: Tensor | None, out: tuple[int, ...], width: int, rule: str, axis: str) -> Tensor | None:
    """As (B, H, T), (B, H, T, K) or, on the value axis, (B, H, T, V); `out` is the shape of what is read."""
    if rule not in ("add", "delta"):
        raise ValueError(f"rule must be 'add' or 'delta', not {rule!r}")
    if axis not in ("key", "value"):
        raise ValueError(f"decay_axis must be 'key' or 'value', not {axis!r}")
    if axis == "value":
        if rule != "add":
            raise ValueError("decay_axis 'value' is for rule 'add': the delta rule decays key channels")
        if log_decay is None or log_decay.shape != out:
            found = None if log_decay is None else tuple(log_decay.shape)
            raise ValueError(f"log_decay on the value axis must be {out}, not {found}")
        return log_decay
    if log_decay is None or log_decay.shape in (out[:3], (*out[:3], width)):
        return log_decay
    if log_decay.shape != out[1:2]:
        known = f"{out[1:2]}, {out[:3]} or {(*out[:3], width)}"
        raise ValueError(f"log_decay must be {known}, not {tuple(log_decay.shape)}")
    return log_decay[None, :, None].expand(out[:3])


def _check_values(log_decay: Tensor | None, beta: Tensor | None, rule: str) -> None:
    """On the CPU, where looking costs little, and not in a step that is recorded."""
    looked = next((x for x in (log_decay, beta) if x is not None), None)
    if looked is None or looked.device.type != "cpu" or torch.compiler.is_compiling() or logging():
        return
    if log_decay is not None and bool((most := log_decay.detach().max()) > 0):
        raise ValueError(f"log_decay must not be above 0 (a decay of at most 1), found {float(most):g}")
    if beta is not None and rule == "delta":
        least, most = beta.detach().aminmax()
        if bool(least < 0) or bool(most > 2):
            wrong = float(least) if least < 0 else float(most)
            raise ValueError(f"beta must be from 0 to 2 for the delta rule, which else grows, found {wrong:g}")


__all__ = ["Axis", "Rule", "gated_delta", "recurrence"]
