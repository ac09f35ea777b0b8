"""The gated delta rule through the kernels of flash-linear-attention, an optional package. Not yet run on hardware.

They are called by keyword only, from versions whose signature is known, and once a device must reproduce our reference
on a small problem before the first use there: another meaning of a gate, a scale or a state is an error, not a result.
Their state is (B, H, K, V), ours (B, H, V, K). They leave no custom operator behind, so torch.compile breaks the graph.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops.recurrent import reference
from atma.ops.segments import begins

VERSIONS = (0, 5), (0, 7)
"""From the first, below the second."""
TOLERANCE = 0.03
"""Largest error in the self-check, of values up to about 1 in bfloat16: 8 of its roundings."""


_ONLY = "backend 'fla' takes rule 'delta' with log_decay and beta (B, H, T)"


class _Kernels(NamedTuple):
    chunk: Callable
    step: Callable


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
    """q (B, H, T, K); k (B, G, T, K), v (B, G', T, V); the rest float32, as in the reference.

    Only rule "delta" with log_decay and beta (B, H, T); segment_ids only for one row. A single token without gradient
    takes the recurrent kernel.
    """
    if rule != "delta" or log_decay is None or log_decay.ndim != 3 or beta is None:
        decay, rates = (None if x is None else tuple(x.shape) for x in (log_decay, beta))
        found = f"rule '{rule}', log_decay {decay} and beta {rates}"
        raise ValueError(f"{_ONLY}, not {found}; use another backend")
    if segment_ids is not None and q.shape[0] != 1:
        raise ValueError(
            f"flash-linear-attention takes packed documents in one row, not {q.shape[0]}; use another backend"
        )
    return _call(_checked(q.device), q, k, v, log_decay, beta, memory, segment_ids)


def by_value(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor | None,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Not in flash-linear-attention: a ValueError."""
    raise ValueError(f"{_ONLY}, not decays on the value axis; use another backend")


def _call(
    kernels: _Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    memory: Tensor,
    segment_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    k, v = (x if x.shape[1] == q.shape[1] else x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    bounds, state = None, memory.mT.contiguous()
    if segment_ids is not None:
        bounds = _bounds(segment_ids[0])
        state = torch.cat([state, state.new_zeros(bounds.shape[0] - 2, *state.shape[1:])])
    kernel = kernels.step if q.shape[2] == 1 and not torch.is_grad_enabled() else kernels.chunk
    out, after = kernel(
        q=q.transpose(1, 2).contiguous(),
        k=k.transpose(1, 2).contiguous(),
        v=v.transpose(1, 2).contiguous(),
        g=log_decay.mT.contiguous(),
        beta=beta.mT.contiguous(),
        scale=1.0,
        initial_state=state,
        output_final_state=True,
        cu_seqlens=bounds,
    )
    return out.transpose(1, 2).to(q.dtype), after[-1:].mT if segment_ids is not None else after.mT


def _bounds(segment_ids: Tensor) -> Tensor:
    """(documents + 1,) where each document of ids (T,) begins, and T."""
    later = begins(segment_ids[None])[0].nonzero().flatten()
    return F.pad(F.pad(later, (1, 0)), (0, 1), value=segment_ids.shape[0])


def _kernels() -> _Kernels:
    try:
        version = importlib.metadata.version("flash-linear-attention")
        module = importlib.import_module("fla.ops.gated_delta_rule")
    except ImportError as error:
        message = f"backend 'fla' needs flash-linear-attention ({error}): pip install atma-lm[fla]"
        raise ValueError(message) from error
    low, high = VERSIONS
    if not low <= tuple(int(part) for part in version.split(".")[:2]) < high:
        wanted = f">={low[0]}.{low[1]},<{high[0]}.{high[1]}"
        raise ValueError(
            f"backend 'fla' knows flash-linear-attention {wanted}, not {version}: pip install atma-lm[fla]"
        )
    return _Kernels(module.chunk_gated_delta_rule, module.fused_recurrent_gated_delta_rule)


@cache
def _checked(device: torch.device) -> _Kernels:
    """The kernels, once they have reproduced the reference on `device`, over two chunks and for one token."""
    kernels = _kernels()
    for length in (70, 1):
        generator = torch.Generator().manual_seed(length)
        q, k, v, memory = (
            torch.randn(1, 2, rows, 32, generator=generator).to(device) for rows in (length, length, length, 32)
        )
        q, k, v = (x.bfloat16() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v))
        gates = torch.randn(2, 1, 2, length, generator=generator).to(device)
        log_decay, beta = F.logsigmoid(gates[0] + 2), gates[1].sigmoid()
        with torch.no_grad():
            found = _call(kernels, q, k, v, log_decay, beta, memory, None)
            exact = reference.recurrence(
                *(x.double() for x in (q, k, v, log_decay, beta, memory)), segment_ids=None, rule="delta"
            )
        worst = max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))
        if not worst <= TOLERANCE:
            raise RuntimeError(f"flash-linear-attention is off by {worst:.2g} on {length} tokens; use another backend")
    return kernels
