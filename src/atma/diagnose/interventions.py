"""Changes to a model for the time of a measurement, without changing a weight: masks, and caps on half-lives.

Both are context managers and leave the model exactly as it was, whatever happens inside.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from atma.diagnose.parts import Head, Part, check_heads, global_mixers, memories, projections
from atma.mixers import DeltaMemory
from atma.model import Model


@contextmanager
def masked(model: Model, part: Part) -> Iterator[None]:
    """Inside, the part's projections read zeros in place of it, as if these columns of their weights were zero.

    A projection's bias stays: it tells nothing of the text. ValueError where a layer has not such a channel.
    """
    mixers = global_mixers(model)
    with ExitStack() as stack:
        for layer in part.layers:
            had = projections(mixers[layer]) if layer in mixers else {}
            for channel in part.channels:
                if channel not in had:
                    raise ValueError(f"layer {layer} has no channel '{channel}'; it has {', '.join(had) or 'none'}")
                columns = _columns(had[channel], part.head, mixers[layer].heads)
                handle = had[channel].register_forward_pre_hook(_zero(columns))
                stack.callback(handle.remove)
        yield


@contextmanager
def capped(model: Model, heads: Sequence[Head], half_life: float) -> Iterator[None]:
    """Inside, these memory heads have γ ≤ 2^(−1 / half_life): what they hold halves within so many tokens.

    Source: maths.md, section 5. ValueError for a head that is not there, a half-life that is not positive, and a model
    whose memory takes its tokens one by one (atma.serve has then compiled its gates).
    """
    if not 0 < half_life < math.inf:
        raise ValueError(f"a cap must be a positive, finite number of tokens, not {half_life}")
    check_heads(heads, model)
    with ExitStack() as stack:
        for layer, memory in memories(model).items():
            mine = [head.head for head in heads if head.layer == layer]
            if mine:
                stack.enter_context(_capped_gates(memory, mine, -math.log(2) / half_life))
        yield


@contextmanager
def noted_decays(model: Model, notes: dict[int, list[Tensor]]) -> Iterator[None]:
    """Inside, each memory adds the log γ (B, H, T) that it uses to the notes of its layer, as float32 on the CPU."""
    with ExitStack() as stack:
        for layer, memory in memories(model).items():
            stack.enter_context(_noted_gates(memory, notes.setdefault(layer, [])))
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
def _capped_gates(memory: DeltaMemory, heads: list[int], most: float) -> Iterator[None]:
    gates = _own_gates(memory)

    def bounded(x: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, beta = gates(x)
        bounds = torch.zeros(log_decay.shape[1], 1, dtype=log_decay.dtype, device=log_decay.device)
        bounds[heads] = most
        return torch.minimum(log_decay, bounds), beta

    with _replaced(memory, bounded):
        yield


@contextmanager
def _noted_gates(memory: DeltaMemory, notes: list[Tensor]) -> Iterator[None]:
    gates = _own_gates(memory)

    def noting(x: Tensor) -> tuple[Tensor, Tensor]:
        log_decay, beta = gates(x)
        notes.append(log_decay.float().cpu())
        return log_decay, beta

    with _replaced(memory, noting):
        yield


def _own_gates(memory: DeltaMemory):
    if memory.stepwise:
        raise ValueError("this model's memory takes tokens one by one; load the model again to diagnose it")
    return memory.gates


@contextmanager
def _replaced(memory: DeltaMemory, gates) -> Iterator[None]:
    """`memory.gates` is another function inside; what was there before is there again after."""
    before = vars(memory).get("gates")
    vars(memory)["gates"] = gates
    try:
        yield
    finally:
        if before is None:
            del vars(memory)["gates"]
        else:
            vars(memory)["gates"] = before
