"""Changes to a model for the time of a measurement, without changing a weight: masks, factors, caps on half-lives.

All are context managers and leave the model exactly as it was, whatever happens inside.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from atma.diagnose.parts import Head, Part, check_heads, forgetting, memory_heads, mixers
from atma.model import Model

Decays = Callable[[Tensor], Tensor]
"""`log_decay` of what forgets, x (B, T, D) to log γ (B, H, T), the mean over channels where each has its own."""


@contextmanager
def masked(model: Model, part: Part) -> Iterator[None]:
    """Inside, the part's projections read zeros in place of it, as if these columns of their weights were zero.

    A projection's bias stays: it tells nothing of the text. ValueError where a layer has not such a channel.
    """
    with scaled(model, part, 0.0):
        yield


@contextmanager
def scaled(model: Model, part: Part, factor: float) -> Iterator[None]:
    """Inside, the part's projections read it so many times as large, as if these columns of their weights were.

    A projection's bias stays. ValueError where a layer has not such a channel, or a channel not such heads.
    """
    with ExitStack() as stack:
        for layer in part.layers:
            mixer = mixers(model)[layer]
            had = mixer.channels()
            for channel in part.channels:
                if channel not in had:
                    raise ValueError(f"layer {layer} has no channel '{channel}'; it has {', '.join(had) or 'none'}")
                columns = _columns(had[channel], part.head, mixer.heads)
                stack.callback(had[channel].register_forward_pre_hook(_times(columns, factor)).remove)
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


@torch.inference_mode()
def can_be_capped(model: Model) -> list[Head]:
    """The heads of what forgets that a cap reaches: those whose forward, of one token, takes its decays from there."""
    reached: set[int] = set()

    def noting(layer: int, log_decay: Decays) -> Decays:
        def asked(x: Tensor) -> Tensor:
            reached.add(layer)
            return log_decay(x)

        return asked

    with ExitStack() as stack:
        for layer, module in forgetting(model).items():
            stack.enter_context(replaced(module, "log_decay", noting(layer, cast(Decays, module.log_decay))))
        if forgetting(model):
            model(torch.zeros(1, 1, dtype=torch.long, device=model.embed.weight.device))
    return [head for head in memory_heads(model) if head.layer in reached]


@contextmanager
def noted_decays(model: Model, notes: dict[int, list[Tensor]]) -> Iterator[None]:
    """Inside, each memory adds the log γ (B, H, T) of what it is given to its layer's notes, float32 on the CPU."""
    with ExitStack() as stack:
        for layer, module in forgetting(model).items():
            stack.callback(module.register_forward_pre_hook(_note(notes.setdefault(layer, []))).remove)
        yield


@contextmanager
def unnoted(notes: Mapping[Any, list[Tensor]]) -> Iterator[None]:
    """What is noted inside is dropped."""
    before = {layer: len(noted) for layer, noted in notes.items()}
    yield
    for layer, count in before.items():
        del notes[layer][count:]


def _columns(projection: nn.Linear, head: int | None, heads: int) -> slice:
    if head is None:
        return slice(None)
    if not 0 <= head < heads or projection.in_features % heads:
        raise ValueError(f"{projection.in_features} inputs are not those of head {head} of {heads} side by side")
    width = projection.in_features // heads
    return slice(head * width, (head + 1) * width)


def _times(columns: slice, factor: float):
    def hook(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = given[0].clone()
        x[..., columns] = x[..., columns] * factor if factor else 0
        return (x, *given[1:])

    return hook


@contextmanager
def _capped(module: nn.Module, heads: list[int], most: float) -> Iterator[None]:
    log_decay = cast(Decays, module.log_decay)

    def bounded(x: Tensor) -> Tensor:
        own = log_decay(x)
        bounds = own.new_zeros(own.shape[1], 1)
        bounds[heads] = most
        return torch.minimum(own, bounds)

    with replaced(module, "log_decay", bounded):
        yield


def _note(notes: list[Tensor]) -> Callable[..., None]:
    def before(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        notes.append(cast(Decays, module.log_decay)(given[0]).float().cpu())

    return before


@contextmanager
def replaced(module: nn.Module, name: str, function: Callable[..., object]) -> Iterator[None]:
    """`module.name` is another function inside; what was there before is there again after."""
    before = vars(module).get(name)
    vars(module)[name] = function
    try:
        yield
    finally:
        if before is None:
            del vars(module)[name]
        else:
            vars(module)[name] = before
