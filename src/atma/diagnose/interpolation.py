"""Heads whose map of weights is moved to the identity, (1 − s) w + s I, so that tokens read ever more of themselves.

In a diffusion model such heads make the weak model that guidance leads away from (SoftPAG, arXiv 2506.10978); in a
language model the loss tells what a head's looking elsewhere is worth, at any strength s from 0 to 1. It is defined
where queries weigh keys and the core says what it makes of moved weights (`Core.toward_own`); a recurrence, whose
coefficients are no weights that sum to one, and a convolution have no such map.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from atma.diagnose.interventions import replaced
from atma.diagnose.parts import Head, attending
from atma.mixers.heads import Attended, Attending, Core
from atma.model import Model


def movable(model: Model) -> dict[int, Attending]:
    """The mixers whose maps can be moved, by layer."""
    return {i: mixer for i, mixer in attending(model).items() if type(mixer.core).toward_own is not Core.toward_own}


def movable_heads(model: Model) -> list[Head]:
    """All heads whose maps can be moved."""
    return [Head(layer, head) for layer, mixer in movable(model).items() for head in range(mixer.heads)]


def check_movable(heads: Sequence[Head], model: Model) -> None:
    """ValueError unless each is a head with a map that can be moved."""
    known = movable_heads(model)
    for head in heads:
        if head not in known:
            names = ", ".join(map(str, known)) or "none"
            raise ValueError(f"head {head} has no map of weights to move to the identity; heads that have: {names}")


@contextmanager
def interpolated(model: Model, heads: Sequence[Head], strength: float) -> Iterator[None]:
    """Inside, the maps of these heads are (1 − strength) w + strength I. ValueError: no such head, or not in [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(f"a strength must be from 0 to 1, not {strength}")
    check_movable(heads, model)
    with ExitStack() as stack:
        for layer, mixer in movable(model).items():
            moved = torch.zeros(mixer.heads, dtype=torch.float64)
            moved[[head.head for head in heads if head.layer == layer]] = strength
            if moved.any():
                stack.enter_context(_moved(mixer, moved))
        yield


@contextmanager
def _moved(mixer: Attending, strength: Tensor) -> Iterator[None]:
    own: list[tuple[Tensor, Tensor]] = []
    attended, core = mixer.attended, cast(nn.Module, mixer.core)

    def noting(state: Any, k: Tensor, v: Tensor, in_order: bool = False) -> Attended:
        own[:] = [(k, v)]
        return attended(state, k, v, in_order)

    def forward(q: Tensor, k: Any, v: Any, start: Tensor | None, segment_ids: Tensor | None) -> tuple[Any, Any]:
        if segment_ids is not None:
            raise ValueError("segment_ids marks packed documents in training; heads are moved in one document a row")
        moving = vars(core).pop("forward")
        try:
            return mixer.core.toward_own(q, k, v, start, own.pop(), strength.to(q.device))
        finally:
            vars(core)["forward"] = moving

    with replaced(mixer, "attended", noting), replaced(core, "forward", forward):
        yield


__all__ = ["check_movable", "interpolated", "movable", "movable_heads"]
