"""Groups of layers that share one attention matrix, by a plan made beforehand (EchoAtt).

EchoAtt (arXiv 2409.14595; mixers.md, section 6.5): the first layer of a group attends with its own queries and keys,
and the others with those of the first, to their own values. They hold no keys. What is shared is who looks at whom: a
polar layer keeps its own temperature and null sink.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, Seat, new_rows
from atma.mixers.policies.plans import Layer, PlannedConfig, leave, left, plan, rounded, sources_of
from atma.mixers.policies.whole import Rows, new_keys, read_all
from atma.ops.chosen import Held, hold_rows
from atma.ops.polar import statistics_of

NAME = "echo"
ALIKE, MOST = 0.9, 4
"""The least cosine of a layer's map with that of the group's first, and the most layers of a group."""


@dataclass(frozen=True)
class EchoConfig(PlannedConfig):
    """The plan."""


class Values(NamedTuple):
    """Of a layer that reads by the keys of another."""

    values: Held  # (B, G, capacity, K)

    grows = {"values": 2}  # noqa: RUF012 (a field otherwise)
    pages = {"values": 2}  # noqa: RUF012


class Echo(Policy):
    """See the module."""

    Config = EchoConfig
    config: EchoConfig
    reads_call = True

    def __init__(self, config: EchoConfig, seat: Seat) -> None:
        super().__init__(config, seat)
        self.source = sources_of(config, NAME, seat)[seat.index]

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Rows | Values:
        """`Policy.init_cache`: followers hold values alone."""
        groups, width = self.seat.heads.groups, self.seat.heads.head_width
        if self.source == self.seat.index:
            return new_keys(groups, width, batch, capacity, like)
        return Values(new_rows(like.new_empty(batch), groups, capacity, width))

    def __call__(self, new: New, cache: Rows | Values, call: Call | None) -> Read:
        """`Policy.__call__`."""
        self.count(new)
        values = hold_rows(cache.values, new.v, new.start)
        if isinstance(cache, Rows):
            keys = hold_rows(cache.keys, new.k, new.start)
            leave(call, NAME, self.seat.index, (new.q, keys))
            return Read(*read_all(self.core, new, keys, values), Rows(keys, values))
        q, keys = left(call, NAME, self.source)
        if q.shape != new.q.shape or new.k.shape[1] != new.v.shape[1]:
            raise ValueError(f"policy '{NAME}': layer {self.source} has other heads than layer {self.seat.index}")
        return Read(*read_all(self.core, new._replace(q=q), keys, values), Values(values))

    @classmethod
    def planned(cls, texts: Sequence[Sequence[Layer]], model: str) -> dict[str, Any]:
        """The plan of a model of this hash, by its attention layers as they read each of some texts whole."""
        alike = torch.stack([cosines([_map(layer) for layer in layers]) for layers in texts]).mean(0)
        return plan(NAME, model, grouped(alike), {"cosines": rounded(alike), "texts": len(texts)})


def grouped(alike: Tensor, enough: float = ALIKE, most: int = MOST) -> list[int]:
    """The leader of each layer by the cosines (L, L) of their maps, in order: each joins the group before it, or leads.

    The first and the last two layers stay alone, of fewer than eight as many as are a quarter.
    """
    count, sources = len(alike), [0]
    alone = min(2, count // 4)
    for layer in range(1, count):
        leader = sources[-1]
        inside = alone <= leader and layer < count - alone
        joins = inside and float(alike[leader, layer]) >= enough and layer - leader < most
        sources.append(leader if joins else layer)
    return sources


def cosines(maps: Sequence[Tensor]) -> Tensor:
    """Of each pair of maps (T, T): (L, L) float64."""
    flat = torch.stack([one.double().flatten() for one in maps])
    flat = flat / torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat @ flat.mT


def _map(layer: Layer) -> Tensor:
    """The weights (T, T) of each query on the keys it sees, mean of the heads; a null sink has its share."""
    new, core = layer.new, layer.mixer.core
    scale, null = core.scored(new.q, new.last)
    _, L, _, M = statistics_of("auto", new.q)(new.q, new.k, new.v, scale, torch.zeros_like(new.last), new.last)
    total = M + L.log() if null is None else torch.logaddexp(M + L.log(), null)
    keys = new.k.repeat_interleave(new.q.shape[1] // new.k.shape[1], 1).to(scale.dtype)
    a = torch.einsum("bhtk,bhsk->bhts", new.q.to(scale.dtype), keys) * scale[..., None] - total[..., None]
    return a[0].exp().mean(0).tril()


SMALL = ({"sources": "0/0"},)
