"""The gated delta rule: a matrix memory that decays, corrects itself at the current key, and is read by the query."""

from collections.abc import Callable

import torch
from torch import Tensor

from atma.ops.backend import backend_for, check_indices, check_tensors, implementation, own_precision, recording


@own_precision
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

    q (B, H, T, K); k (B, G, T, K), v (B, G, T, V) with H a multiple of G; log_decay = log γ ≤ 0 and beta (B, H, T);
    memory (B, H, V, K) before the first token (None: zero). Keys are taken as given: the rule is stable for ‖k‖ ≤ 1.
    segment_ids (B, T), only without a memory: the memory is empty at each document's first token.
    steady: each token by itself, in turn: the same bits however the text is cut into calls and whatever rows are beside
    it, by the native backend alone, and without gradients; a contiguous memory, float32 or wider, is then overwritten.
    Returns out (B, H, T, V) in q's dtype and the memory after the last token, float32 or wider.
    """
    check_tensors("q k v log_decay beta memory", q, k, v, log_decay, beta, memory)
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in q.shape or 0 in k.shape or 0 in v.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
        raise ValueError(f"{shapes} must be (B, H, T, K), (B, G, T, K) and (B, G, T, V), none of them 0")
    batch, heads, length, width = q.shape
    if k.shape[:1] + k.shape[2:] != (batch, length, width) or v.shape[:3] != k.shape[:3] or heads % k.shape[1] != 0:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if log_decay.shape != (batch, heads, length) or beta.shape != log_decay.shape:
        found = f"{tuple(log_decay.shape)} and {tuple(beta.shape)}"
        raise ValueError(f"log_decay and beta must be {(batch, heads, length)}, not {found}")
    if memory is not None and memory.shape != (batch, heads, v.shape[3], width):
        raise ValueError(f"memory must be {(batch, heads, v.shape[3], width)}, not {tuple(memory.shape)}")
    if memory is not None and segment_ids is not None:
        raise ValueError("segment_ids marks packed documents in training; a call with a memory continues one document")
    check_indices("segment_ids", segment_ids, (batch, length), q.device)
    dtype, work = q.dtype, torch.promote_types(q.dtype, torch.float32)
    held = q.new_zeros(batch, heads, v.shape[3], width, dtype=work) if memory is None else memory.to(work)
    chosen = backend_for(backend, q, "delta")
    if steady:
        _require_steady(chosen, segment_ids)
    low = v.dtype if chosen in ("gpu", "fla") else work  # v's own: autocast widens q and k where it normalises them
    q, k, v = q.to(low), k.to(low), v.to(low)
    log_decay, beta = log_decay.to(work), beta.to(work)
    if steady:
        out, after = implementation("delta", chosen).in_turn(q, k, v, log_decay, beta, held)
    else:
        out, after = recurrence_of(chosen)(q, k, v, log_decay, beta, held, segment_ids)
    return out.to(dtype), after


def _require_steady(chosen: str, segment_ids: Tensor | None) -> None:
    if chosen != "native":
        raise ValueError(f"steady is for the native backend, the compiled kernels on the CPU, not for '{chosen}'")
    if recording():
        raise ValueError("steady has no gradient: call it under torch.no_grad() or torch.inference_mode()")
    if segment_ids is not None:
        raise ValueError("steady takes no packed documents: leave segment_ids out")


def recurrence_of(chosen: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The `recurrence(q, k, v, log_decay, beta, memory, segment_ids)` of a backend: out and the memory after."""
    return implementation("delta", chosen).recurrence


__all__ = ["gated_delta"]
