"""Changes to a model for the time of a measurement, without changing a weight: masks, and caps on half-lives.

Both are context managers and leave the model exactly as it was, whatever happens inside.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from atma.diagnose.parts import Head, Part, check_heads, forgetting, mixers
from atma.model import Model

Decays = Callable[[Tensor], Tensor]
"""`log_decay` of what forgets: x (B, T, D) to log γ (B, H, T)."""


@contextmanager
def masked(model: Model, part: Part) -> Iterator[None]:
    """Inside, the part's projections read zeros in place of it, as if these columns of their weights were zero.

    A projection's bias stays: it tells nothing of the text. ValueError where a layer has not such a channel.
    """
    with ExitStack() as stack:
        for layer in part.layers:
            mixer = mixers(model)[layer]
            had = mixer.channels()
            for channel in part.channels:
                if channel not in had:
                    raise ValueError(f"layer {layer} has no channel '{channel}'; it has {', '.join(had) or 'none'}")
                columns = _columns(had[channel], part.head, mixer.heads)
                handle = had[channel].register_forward_pre_hook(_zero(columns))
                stack.callback(handle.remove)
        yield


@contextmanager
def capped(model: Model, heads: Sequence[Head], half_life: float) -> Iterator[None]:
    """Inside, these memory heads have γ ≤ 2^(−1 / half_life): what they hold halves within so many tokens.

    Source: maths.md, section 5. ValueError for a head that is not there, and for a half-life that is not positive.
    """
    if not 0 < half_life < math.inf:
        raise ValueError(f"a cap must be a positive, finite number of tokens, not {half_life}")
    check_heads(heads, model)
    with ExitStack() as stack:
        for layer, module in forgetting(model).items():
            mine = [head.head for head in heads if head.layer == layer]
            if mine:
                stack.enter_context(_capped(module, mine, -math.log(2) / half_life))
        yield


@contextmanager
def noted_decays(model: Model, notes: dict[int, list[Tensor]]) -> Iterator[None]:
    """Inside, each memory adds the log γ (B, H, T) that it uses to the notes of its layer, as float32 on the CPU."""
    with ExitStack() as stack:
        for layer, module in forgetting(model).items():
            stack.enter_context(_noted(module, notes.setdefault(layer, [])))
        yield


@contextmanager
def unnoted(notes: dict[int, list[Tensor]]) -> Iterator[None]:
    """What is noted inside is dropped."""
    before = {layer: len(noted) for layer, noted in notes.items()}
    yield
    for layer, count in before.items():
        del notes[layer][count:]


def _columns(projection: nn.Linear, head: int | None, heads: int) -> slice:
    if head is None:
        return slice(None)
    width = projection.in_features // heads
    return slice(head * width, (head + 1) * width)


def _zero(columns: slice):
    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0].clone()
        x[..., columns] = 0
        return (x, *given[1:])

    return hook


@contextmanager
def _capped(module: nn.Module, heads: list[int], most: float) -> Iterator[None]:
    log_decay = _decays(module)

    def bounded(x: Tensor) -> Tensor:
        own = log_decay(x)
        bounds = torch.zeros(own.shape[1], 1, dtype=own.dtype, device=own.device)
        bounds[heads] = most
        return torch.minimum(own, bounds)

    with _replaced(module, bounded):
        yield


@contextmanager
def _noted(module: nn.Module, notes: list[Tensor]) -> Iterator[None]:
    log_decay = _decays(module)

    def noting(x: Tensor) -> Tensor:
        own = log_decay(x)
        notes.append(own.float().cpu())
        return own

    with _replaced(module, noting):
        yield


def _decays(module: nn.Module) -> Decays:
    return cast(Decays, module.log_decay)


@contextmanager
def _replaced(module: nn.Module, log_decay: Decays) -> Iterator[None]:
    """`module.log_decay` is another function inside; what was there before is there again after."""
    before = vars(module).get("log_decay")
    vars(module)["log_decay"] = log_decay
    try:
        yield
    finally:
        if before is None:
            del vars(module)["log_decay"]
        else:
            vars(module)["log_decay"] = before
