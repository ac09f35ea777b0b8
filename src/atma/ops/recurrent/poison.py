"""Tokens that are not finite, kept from those before them and from other documents.

A chunk is a product of tables in which what must not count is 0; but 0 · NaN is NaN. From such a token on, its memory
and what is read from it are NaN until a document begins: that is written down, and the rest is computed without it.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from atma.ops.segments import document_start

Run = Callable[..., Sequence[Tensor]]


def kept_apart(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, ...]:
    """What `run` of these arguments gives, the outputs and the memory after them first, spoilt only where it is so."""
    inputs = (q, k, v, log_decay, beta, memory)
    if all(bool(torch.isfinite(x.sum())) for x in inputs if x is not None):
        return tuple(run(*inputs, segment_ids))
    q, k, v = (x.repeat_interleave(memory.shape[1] // x.shape[1], 1) for x in (q, k, v))
    bad = _broken(k) | _broken(v)
    if log_decay is not None:
        endless = ~(log_decay < torch.inf)
        bad |= endless.any(-1) if log_decay.ndim == 4 else endless
    if beta is not None:
        bad |= ~torch.isfinite(beta)
    lost = ~torch.isfinite(memory).all(-1).all(-1)
    bad[..., 0] |= lost
    spoilt = _from_then_on(bad, segment_ids)
    k, v, q_clean = (x.masked_fill(y.unsqueeze(-1), 0) for x, y in ((k, spoilt), (v, spoilt), (q, _broken(q))))
    if log_decay is not None:
        log_decay = log_decay.masked_fill(spoilt.unsqueeze(-1) if log_decay.ndim == 4 else spoilt, 0)
    beta = None if beta is None else beta.masked_fill(spoilt, 0)
    memory = memory.masked_fill(lost[..., None, None], 0)
    out, after, *rest = run(q_clean, k, v, log_decay, beta, memory, segment_ids)
    out = out.masked_fill((spoilt | _broken(q)).unsqueeze(-1), torch.nan)
    return out, after.masked_fill(spoilt[..., -1, None, None], torch.nan), *rest


def _broken(x: Tensor) -> Tensor:
    return ~torch.isfinite(x).all(-1)


def _from_then_on(bad: Tensor, segment_ids: Tensor | None) -> Tensor:
    """(B, H, T): whether one of the tokens of the document up to this one is bad."""
    count = bad.int().cumsum(-1)
    if segment_ids is None:
        return count > 0
    start = document_start(segment_ids).long().unsqueeze(1).expand_as(count)
    before = (count - bad.int()).gather(2, start)
    return count > before
