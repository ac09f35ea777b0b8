"""The operation of a linear recurrence, as its mixers and memories call it.

With a normaliser where there is one, and in two parts where what is before is known later
(atma.mixers.stretches_prefix).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.mixers.recurrent_systems import RecurrenceConfig
from atma.ops import recurrence
from atma.ops.backend import own_precision
from atma.ops.native import logging

EPSILON = 1e-12
"""Added to a normaliser."""


class Inputs(NamedTuple):
    """What the operation takes of a call: q, k (B, H, T, K′) and v (B, H, T, V), log a and β."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None


def recur(
    given: Inputs, memory: Tensor | None, segment_ids: Tensor | None, config: RecurrenceConfig, steady: bool
) -> tuple[Tensor, Tensor]:
    """The recurrence with a normaliser where there is one: what is read (B, H, T, V), and the memory after."""
    assert config.rule is not None
    given = _counted(given, config)
    out, memory = recurrence(*given, memory, segment_ids, config.rule, steady=steady)
    return _normalised(out, config), memory


def _counted(given: Inputs, config: RecurrenceConfig) -> Inputs:
    """With a value of one behind the others, whose sum normalises them."""
    if not config.normaliser:
        return given
    return given._replace(v=torch.cat([given.v, torch.ones_like(given.v[..., :1])], -1))


def _normalised(out: Tensor, config: RecurrenceConfig) -> Tensor:
    if not config.normaliser:
        return out
    total = out[..., -1:]
    _check_total(total)
    return out[..., :-1] / (total + EPSILON)


def _check_total(total: Tensor) -> None:
    """On the CPU, where looking costs little, and not in a step that is recorded."""
    if total.device.type != "cpu" or torch.compiler.is_compiling() or logging():
        return
    if bool((total == 0).any()):
        raise ValueError(
            "a query has no weight on any key: its features are all zero, so what it reads cannot be normalised; "
            "queries or keys are too large (a norm before the mixer, or a lower learning rate)"
        )


class FromNothing(NamedTuple):
    """T tokens of a recurrence whose memory before them is known later."""

    read: Tensor
    """(B, H, T, V), normaliser included; by the rule "delta", K′ more behind them: what reads the memory before."""
    memory: Tensor
    """After them, of an empty one: B (B, H, V, K′)."""
    factor: Tensor | None
    """M ← M A + B: A (B, H, K′, K′) by the rule "delta", else its diagonal (B, H or 1, 1, K′ or 1)."""


def from_nothing(given: Inputs, config: RecurrenceConfig, begun: bool) -> FromNothing:
    """The recurrence from an empty memory; begun: with the factors of what is before, and what reads it.

    By the rule "delta" A is the product of diag(a) (I − β k kᵀ) over the tokens. As rows of M are moved each by itself,
    it is what the same recurrence makes of rows of I that nothing is written to, and its reads are A q of each token.
    """
    assert config.rule is not None
    given = _counted(given, config)
    q, v, width = given.q, given.v, given.q.shape[-1]
    if config.rule == "add" or not begun:
        read, memory = recurrence(*given, rule=config.rule)
        return FromNothing(read, memory, _diagonal(given.log_decay, memory) if begun else None)
    work = torch.promote_types(q.dtype, torch.float32)
    rows = torch.eye(width, dtype=work, device=q.device).expand(*v.shape[:2], width, width)
    start = torch.cat([rows.new_zeros(*v.shape[:2], v.shape[-1], width), rows], 2)
    none = v.new_zeros(()).expand(*v.shape[:3], width)
    read, memory = recurrence(*given._replace(v=torch.cat([v, none], -1)), start, rule=config.rule)
    memory, factor = memory.split([v.shape[-1], width], 2)
    return FromNothing(read, memory, factor)


def _diagonal(log_decay: Tensor | None, memory: Tensor) -> Tensor:
    if log_decay is None:
        return memory.new_ones(memory.shape[0], 1, 1, 1)
    if log_decay.ndim == 4:
        return log_decay.sum(2, keepdim=True).exp()
    return log_decay.sum(-1).exp()[..., None, None]


@own_precision
def behind(read: Tensor, before: Tensor | None, given: Inputs, config: RecurrenceConfig) -> Tensor:
    """What is read (B, H, T, V) with the memory before the tokens; None: it was empty."""
    width = given.v.shape[-1] + bool(config.normaliser)
    out = read[..., :width]
    if before is not None:
        out = (out + _reader(read[..., width:], given, config).to(before.dtype) @ before.mT).to(read.dtype)
    return _normalised(out, config)


def _reader(removed: Tensor, given: Inputs, config: RecurrenceConfig) -> Tensor:
    """What reads the memory before the tokens at each of them: q and all that is done to that memory till then."""
    if config.rule == "delta":
        return removed.to(torch.promote_types(removed.dtype, torch.float32))
    if given.log_decay is None:
        return given.q
    reach = given.log_decay.cumsum(2).exp()
    return given.q * (reach if reach.ndim == 4 else reach[..., None])


__all__ = ["FromNothing", "Inputs", "behind", "from_nothing", "recur"]
