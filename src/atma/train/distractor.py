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

from atma.mixers.attention import Attention, PolarCore, SoftmaxCore
from atma.model import Model
from atma.ops.polar import statistics_of, temperature_and_floor, visible_range

_QUERIES = 128


class CoreCall(NamedTuple):
    """What one attention core was given: q (B, H, T, K), k and v (B, G, T, K), segment_ids (B, T) or None."""

    mixer: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    segment_ids: Tensor | None


@contextlib.contextmanager
def core_calls(model: Model) -> Iterator[list[CoreCall]]:
    """Collect the calls of every attention core, in order, of the forward passes run inside."""
    seen: list[CoreCall] = []

    def listen(mixer: Attention) -> torch.utils.hooks.RemovableHandle:
        def note(_core: object, given: tuple) -> None:
            q, k, v, _, segment_ids = given
            seen.append(CoreCall(mixer, q, k, v, segment_ids))

        return mixer.core.register_forward_pre_hook(note)

    hooks = [listen(module) for module in model.modules() if isinstance(module, Attention)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def alignment(calls: list[CoreCall], count: int, generator: torch.Generator) -> Tensor:
    """The distractor term with `count` random keys a layer, averaged over layers, in float32. At least one call."""
    with torch.autocast(calls[0].q.device.type, enabled=False):
        return torch.stack([_one(call, count, generator) for call in calls]).mean()


def _one(call: CoreCall, count: int, generator: torch.Generator) -> Tensor:
    keys, values = noise(call.mixer, count, generator)
    core, q = call.mixer.core, call.q.float()
    if isinstance(core, PolarCore):
        return null_mass(core, q, keys, call.segment_ids)
    return output_change(core, call, keys, values)


@torch.no_grad()
def noise(mixer: Attention, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values (1, H, count, K) that the layer makes of white noise; a rope layer turns them to −count … −1."""
    weight = mixer.k_proj.weight
    white = torch.randn((1, count, weight.shape[1]), generator=generator).to(weight)
    projected = mixer.project(white)
    keys = projected.k
    if mixer.rotary is not None:
        keys = mixer.rotary(keys, torch.arange(-count, 0, device=weight.device)[None])
    share = mixer.heads // mixer.groups
    return keys.float().repeat_interleave(share, 1), projected.v.float().repeat_interleave(share, 1)


def null_mass(core: PolarCore, q: Tensor, keys: Tensor, segment_ids: Tensor | None) -> Tensor:
    """Mean over queries of Σ e^{t s_j} / (Σ e^{t s_j} + e^{t ν}), s over the noise keys alone, t and ν by position."""
    first, last = visible_range(q, None, segment_ids, core.window)
    scalars = core.length_gain, core.null_base, core.null_slope
    temperature, floor = temperature_and_floor((last - first).to(q), *scalars, core.count_limit, core.sharpening)
    scaled = q * (temperature * q.shape[-1] ** -0.5).unsqueeze(-1)
    total, _ = _read(scaled, keys, None)
    return torch.sigmoid(total - temperature * floor).mean()


def output_change(core: SoftmaxCore, call: CoreCall, keys: Tensor, values: Tensor) -> Tensor:
    """Mean squared change of the softmax read when noise keys and values stand before the real ones."""
    scaled = call.q.float() * core.scale
    seen = visible_range(call.q, None, call.segment_ids, core.window)
    q, k, v = call.q.float(), call.k.float(), call.v.float()
    S, L, _, M = statistics_of("auto", q)(q, k, v, torch.full_like(q[..., 0], core.scale), *seen)
    total, read = _read(scaled, keys, values)
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
