"""Layers that read the pages which an earlier layer found by its very scores, by a plan made beforehand (HyLRA).

HyLRA (arXiv 2602.00777; mixers.md, section 6.4): a FULL layer reads everything, and hands on the pages of each query's
largest scores; a REUSE layer reads these pages alone. Which layer is which is measured once: how much a layer suffers
from keeping to its best keys, and how far two layers' best keys are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atma.mixers.base import Call
from atma.mixers.policies.base import New, Policy, Read, Seat, hold, read_pages
from atma.mixers.policies.plans import Layer, PlannedConfig, leave, left, plan, rounded, sources_of
from atma.mixers.policies.whole import Rows, new_keys, read_all
from atma.ops.search import Reach, heaviest_pages
from atma.strict import require

NAME = "hylra"
SENSITIVE, OVERLAP = 0.1, 0.85
"""Above this change of its output a layer is FULL; above this share of common keys it may follow another."""


@dataclass(frozen=True)
class HylraConfig(PlannedConfig):
    """The plan, and what is handed on. Sizes are tokens."""

    page: int = 16
    """Tokens of a page."""
    share: int = 8
    """Of n visible keys the best n / share are handed on, as pages, but at least `least` and at most `most`."""
    least: int = 64
    most: int = 2048
    window: int = 128
    """Last tokens that are always read, to whole pages."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("page", "share", "least", "window"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.most >= self.least, "most", self.most, f"at least least = {self.least}")


class Hylra(Policy):
    """See the module."""

    Config = HylraConfig
    config: HylraConfig
    reads_call = True

    def __init__(self, config: HylraConfig, seat: Seat) -> None:
        super().__init__(config, seat)
        sources = sources_of(config, NAME, seat)
        self.source = sources[seat.index]
        self.followed = any(source == seat.index for source in sources[seat.index + 1 :])
        self.reach = Reach(config.page, 0, 0, config.window, config.share, config.least, config.most)

    def init_cache(self, batch: int, capacity: int, like: Tensor) -> Rows:
        """`Policy.init_cache`."""
        return new_keys(self.seat.heads.groups, self.seat.heads.head_width, batch, capacity, like)

    def __call__(self, new: New, cache: Rows, call: Call | None) -> Read:
        """`Policy.__call__`."""
        keys, values = held = hold(cache.keys, cache.values, new, self.config.page)
        if self.source != self.seat.index:
            pages = left(call, NAME, self.source)
            self.count(new, chosen=(pages, self.config.page))
            return Read(*read_pages(self.core, new, held, (pages, self.config.page)), Rows(keys, values))
        self.count(new)
        if self.followed:
            leave(call, NAME, self.seat.index, heaviest_pages(new.q, keys, new.last, self.reach))
        return Read(*read_all(self.core, new, keys, values), Rows(keys, values))

    @classmethod
    def planned(cls, texts: Sequence[Sequence[Layer]], model: str) -> dict[str, Any]:
        """The plan of a model of this hash, by its attention layers as they read each of some texts whole."""
        figures = [_measured(layers) for layers in texts]
        changes, overlaps = (torch.stack(part) for part in zip(*figures, strict=True))
        change = (changes[:, 0].sum(0) / changes[:, 1].sum(0)).sqrt()
        overlap = overlaps.sum(0) / sum(layers[0].new.q.shape[2] for layers in texts)
        sources = assigned(forced(change > SENSITIVE), overlap)
        measured = {"sensitivity": rounded(change), "overlap": rounded(overlap), "texts": len(texts)}
        return plan(NAME, model, sources, measured)


def forced(sensitive: Tensor) -> list[bool]:
    """Which layers are FULL whatever is common: sensitive ones, the first two and the last; of fewer than five layers
    only as many of the first as are a quarter, and of fewer than four not the last."""
    count = len(sensitive)
    first = min(2, -(-count // 4))
    return [bool(sensitive[i]) or i < first or (count >= 4 and i == count - 1) for i in range(count)]


def assigned(full: Sequence[bool], overlap: Tensor, enough: float = OVERLAP) -> list[int]:
    """The source of each layer: as few FULL ones as can be, then the largest sum of overlaps, then earlier sources.

    overlap (L, L): [i, j] of layers i < j. A layer follows the last FULL one before it, if their overlap is enough.
    """
    best: dict[int, tuple[int, float, tuple[int, ...]]] = {0: (1, 0.0, (0,))}
    for layer in range(1, len(full)):
        count, total, sources = min(best.values())
        after = {layer: (count + 1, total, (*sources, layer))}
        for source, (count, total, sources) in best.items():
            common = float(overlap[source, layer])
            if not full[layer] and common >= enough:
                after[source] = (count, total - common, (*sources, source))
        best = after
    return list(min(best.values())[2])


def _measured(layers: Sequence[Layer]) -> tuple[Tensor, Tensor]:
    """Of one text: the squared changes of each layer's output and its squares (2, L), and the sums over queries of the
    overlaps (L, L)."""
    best = [heaviest_pages(one.new.q, one.new.k, one.new.last, Reach(1, window=0)) for one in layers]
    changes = torch.tensor([_change(one, tokens) for one, tokens in zip(layers, best, strict=True)]).mT
    size = layers[0].new.q.shape[2]
    chosen = [_marked(tokens, size) for tokens in best]
    overlap = torch.zeros(len(layers), len(layers), dtype=torch.float64)
    for i in range(len(layers)):
        for j in range(i + 1, len(layers)):
            common = (chosen[i] & chosen[j]).sum(-1) / chosen[j].sum(-1)
            overlap[i, j] = common.double().amin(1).sum()
    return changes.double(), overlap


def _change(layer: Layer, tokens: Tensor) -> tuple[float, float]:
    """‖y′ − y‖² and ‖y‖² when a layer keeps to the chosen tokens (1, H, T, N)."""
    core, new = layer.mixer.core, layer.new
    whole = layer.written(*read_all(core, new, new.k, new.v))
    some = layer.written(*read_pages(core, new, (new.k, new.v), (tokens, 1)))
    return float((some - whole).square().sum()), float(whole.square().sum())


def _marked(tokens: Tensor, size: int) -> Tensor:
    """Which of `size` keys are chosen: (1, H, T, size) bool."""
    found = torch.zeros(*tokens.shape[:3], size + 1, dtype=torch.bool, device=tokens.device)
    index = torch.where(tokens < 0, size, tokens).long()
    return found.scatter_(-1, index, torch.ones_like(index, dtype=torch.bool))[..., :size]


SMALL = ({"sources": "0/0", "page": 4, "share": 3, "least": 4, "most": 12, "window": 5},)
