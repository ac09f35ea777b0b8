"""Optional term of the loss: random keys should take nothing from what a global layer reads (maths.md, section 6).

White noise goes through the layer's own projections to keys and values, without gradient. For polar layers the term is
the softmax mass these keys take from the null sink alone; for softmax cores it is the mean squared change of the output
when they are put before the real keys. The model knows nothing of this: `core_calls` listens at the attention cores.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from atma.mixers.heads import Attending
from atma.model import Model
from atma.ops.polar import statistics_of, visible_range

_QUERIES = 128


class CoreCall(NamedTuple):
    """What one attention core was given: q (B, H, T, K), k and v (B, G, T, K), segment_ids (B, T) or None."""

    mixer: Attending
    q: Tensor
    k: Tensor
    v: Tensor
    segment_ids: Tensor | None


@contextlib.contextmanager
def core_calls(model: Model) -> Iterator[list[CoreCall]]:
    """Collect the calls of every attention core, in order, of the forward passes run inside."""
    seen: list[CoreCall] = []

    def listen(mixer: Attending) -> torch.utils.hooks.RemovableHandle:
        def note(_core: object, given: tuple) -> None:
            q, k, v, _, segment_ids = given
            seen.append(CoreCall(mixer, q, k, v, segment_ids))

        return mixer.core.register_forward_pre_hook(note)

    hooks = [listen(module) for module in model.modules() if isinstance(module, Attending)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def alignment(calls: list[CoreCall], count: int, generator: torch.Generator) -> Tensor:
    """The distractor term with `count` random keys a layer, averaged over layers, in float32. ValueError: no layer."""
    if not calls:
        raise ValueError("'distractor_weight' needs a layer that attends, and the model has none; leave it out")
    with torch.autocast(calls[0].q.device.type, enabled=False):
        return torch.stack([_one(call, count, generator) for call in calls]).mean()


def _one(call: CoreCall, count: int, generator: torch.Generator) -> Tensor:
    keys, values = noise(call.mixer, count, generator)
    first, last = visible_range(call.q, None, call.segment_ids, call.mixer.core.window)
    q = call.q.float()
    scale, null = call.mixer.core.scale_and_null(q, (last - first).to(q))
    if null is None:
        return output_change(call, scale, keys, values)
    return null_mass(q, scale, null, keys)


@torch.no_grad()
def noise(mixer: Attending, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, count, K) that the layer makes of white noise, at the positions −count … −1."""
    weight = next(mixer.parameters())
    white = torch.randn((1, count, mixer.width), generator=generator).to(weight)
    projected = mixer.project(white)
    keys = mixer.core.turned(projected.k, torch.arange(-count, 0, device=weight.device)[None])
    share = mixer.heads // mixer.groups
    return keys.float().repeat_interleave(share, 1), projected.v.float().repeat_interleave(share, 1)


def null_mass(q: Tensor, scale: Tensor, null: Tensor, keys: Tensor) -> Tensor:
    """Mean over queries of Σ e^{t s_j} / (Σ e^{t s_j} + e^{t ν}), s over the noise keys alone, t and ν by position."""
    total, _ = _read(q * scale.unsqueeze(-1), keys, None)
    return torch.sigmoid(total - null).mean()


def output_change(call: CoreCall, scale: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Mean squared change of the softmax read when noise keys and values stand before the real ones."""
    seen = visible_range(call.q, None, call.segment_ids, call.mixer.core.window)
    q, k, v = call.q.float(), call.k.float(), call.v.float()
    S, L, _, M = statistics_of("auto", q)(q, k, v, scale, *seen)
    total, read = _read(q * scale.unsqueeze(-1), keys, values)
    assert read is not None
    share = torch.sigmoid(total - (L.log() + M)).unsqueeze(-1)
    return (share * (read - S / L.unsqueeze(-1))).square().mean()


def _read(scaled: Tensor, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Log-sum-exp (B, H, T) of the scores on shared keys (1, H, N, K), and the softmax read of `values` if given.

    Blocks of queries are recomputed in the backward pass, so no (T, N) matrix is kept.
    """
    parts = [checkpoint(_block, part, keys, values, use_reentrant=False) for part in scaled.split(_QUERIES, 2)]
    totals, reads = zip(*parts, strict=True)
    return torch.cat(totals, 2), None if values is None else torch.cat(reads, 2)


def _block(part: Tensor, keys: Tensor, values: Tensor | None) -> tuple[Tensor, Tensor | None]:
    scores = part @ keys.mT
    return scores.logsumexp(-1), None if values is None else scores.softmax(-1) @ values
