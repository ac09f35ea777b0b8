"""How large a model is and what a token costs it, found by looking at the model: no kind of layer is known here.

A layer's multiply-adds are counted by `torch.utils.flop_counter` while a layer of each name reads random numbers at a
few lengths. What grows with the length is attention; of the rest, the weights of linear layers are dense products, and
what is left are memories, recurrences and convolutions.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from atma.config import ModelConfig, Recipe
from atma.layers import without_init
from atma.mixers import Call
from atma.model import Block, Model
from atma.ops.backend import use_backend
from atma.state import leaves
from atma.train.optim import parameter_groups
from atma.train.start import adapters
from atma.train.travel import LOW, low_names

LENGTHS = (256, 512, 1024, 2048)
"""Lengths in tokens at which the products of a layer are counted."""
MOST_PRODUCTS = 1e12
"""Multiply-adds of dense products that counting one layer may take; longer lengths are left out of it."""
MOMENTS = {"matrix": 1}
"""Numbers that the optimisers keep for each number of a group: Muon one momentum, AdamW (the others) two means."""


class Curve(NamedTuple):
    """A quantity per token by the length of its row, from values at increasing lengths, each twice the one before."""

    lengths: tuple[int, ...]
    values: tuple[float, ...]

    def at(self, length: float) -> float:
        """Between lengths: linear. Beyond: on a line if it grew faster and faster, else to a bound as that of a window.

        The mean number of keys that a token of a row sees is L / 2 without a window, and w − w² / 2L with one.
        """
        lengths, values = self.lengths, self.values
        if length <= lengths[-1]:
            return _between(lengths, values, length)
        rise = values[-1] - values[-2]
        if self.grows:
            return values[-1] + rise * (length - lengths[-1]) / (lengths[-1] - lengths[-2])
        share = lengths[-2] * (1 - lengths[-1] / length) / (lengths[-1] - lengths[-2])
        return values[-1] + rise * share

    @property
    def grows(self) -> bool:
        """Whether it grows with the length for ever, as far as the last values tell."""
        first, last = self.values[-2] - self.values[-3], self.values[-1] - self.values[-2]
        return last > 1e-6 * abs(self.values[-1]) and last > 1.2 * first


def _between(lengths: Sequence[int], values: Sequence[float], length: float) -> float:
    upper = next(i for i in range(1, len(lengths)) if length <= lengths[i])
    share = (length - lengths[upper - 1]) / (lengths[upper] - lengths[upper - 1])
    return values[upper - 1] + share * (values[upper] - values[upper - 1])


class LayerWork(NamedTuple):
    """Of a layer of one name."""

    count: int
    """Layers of that name."""
    dense: int
    """Multiply-adds of a token in linear layers."""
    mixing: Curve
    """All others of a token, by length."""
    gathered: float
    """Numbers of a token that its state keeps: what ranks of a context gather."""
    carried: float
    """Numbers of a row that its state carries from token to token: what they pass on."""
    width_in: int
    """D."""
    low: int
    """Numbers of its weights that travel in bfloat16 where parts are gathered and steps compute in it."""
    composes: bool
    """Whether no rank of a context need wait there for another."""

    def attention(self, length: float) -> float:
        """Multiply-adds of a token that are there because a row has this length."""
        return max(0.0, self.mixing.at(length) - self.fixed)

    @property
    def fixed(self) -> float:
        """Those of a token whatever the length: memories, recurrences, convolutions."""
        first, second = self.mixing.values[:2]
        slope = (second - first) / (self.mixing.lengths[1] - self.mixing.lengths[0])
        return max(0.0, first - max(0.0, slope) * self.mixing.lengths[0])


class Weights(NamedTuple):
    """Numbers that are gathered together, and those of them that travel in bfloat16 where steps compute in it."""

    numbers: int
    low: int

    def bytes(self, compute: torch.dtype) -> float:
        return 4 * self.numbers - (2 * self.low if compute == LOW else 0)


class Size(NamedTuple):
    """Numbers of a model, by part, and what training keeps of them."""

    parameters: dict[str, int]
    """Of each part; what parts share is counted once."""
    trained: int
    moments: int
    """Numbers of the optimisers' state."""
    scalars: int
    """Tensors that AdamW moves, each with a count of its steps."""
    matrices: tuple[tuple[int, int], ...]
    """Rows and columns of every matrix that Muon moves."""
    largest: "Weights"
    """Of the largest block."""
    ends: "Weights"
    """Of embedding, last norm and head."""
    low: int
    """Of all weights, those that travel in bfloat16 where parts are gathered and steps compute in it."""

    @property
    def total(self) -> int:
        return sum(self.parameters.values())


def outline(recipe: Recipe) -> Model:
    """The recipe's model, with its adapters, without numbers: on the device meta."""
    with torch.device("meta"), without_init():
        model = Model(recipe.model)
        adapters(recipe, model)
    return model


def size_of(recipe: Recipe, model: Model) -> Size:
    """What there is to hold of `model`, which has the recipe's parameters."""
    groups = parameter_groups(model)
    plain = recipe.train.optimiser == "adamw"
    kept = {name: 2 if plain else MOMENTS.get(name, 2) for name in groups}
    numbers = {name: sum(p.numel() for p in group.values()) for name, group in groups.items()}
    muon = () if plain else tuple(_matrices(groups["matrix"].values()))
    by_adam = sum(len(group) for name, group in groups.items() if plain or name not in MOMENTS)
    parts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():  # what is shared comes once
        parts[_part(name, recipe.model)] += parameter.numel()
    moments = sum(kept[name] * numbers[name] for name in groups)
    low, every = low_names(model), dict(model.named_parameters())
    blocks = [
        _weights([(n, p) for n, p in every.items() if n.startswith(f"blocks.{i}.")], low)
        for i in range(len(model.blocks))
    ]
    ends = _weights([(n, p) for n, p in every.items() if not n.startswith("blocks.")], low)
    whole = _weights(every.items(), low)
    return Size(dict(parts), sum(numbers.values()), moments, by_adam, muon, max(blocks), ends, whole.low)


def _weights(parameters: Iterable[tuple[str, nn.Parameter]], low: set[str]) -> Weights:
    found = list(parameters)
    return Weights(sum(p.numel() for _, p in found), sum(p.numel() for name, p in found if name in low))


def _part(name: str, config: ModelConfig) -> str:
    first, *rest = name.split(".")
    if first != "blocks":
        return {"embed": "embedding", "norm": "norms"}.get(first, first)
    layer, part = config.layers[int(rest[0])], rest[1]
    if part == "mixer":
        return f"mixers: {layer}"
    return "MLPs" if part == "mlp" else "norms"


def _matrices(parameters: Sequence[nn.Parameter] | object) -> Iterator[tuple[int, int]]:
    for parameter in parameters:  # pyright: ignore[reportGeneralTypeIssues]
        count = parameter.shape[0] if parameter.ndim == 3 else 1
        yield from [(parameter.shape[-2], parameter.shape[-1])] * count


def layer_of(config: ModelConfig, name: str) -> Block:
    """A layer of this name by itself, with initial weights of no run."""
    alone = config.changed({"pattern": (name,), "depth": 1})
    block = Block(alone, 0)
    block.init_weights(torch.Generator().manual_seed(0))
    return block


def layer_works(config: ModelConfig) -> dict[str, LayerWork]:
    """The work of the layers of each name."""
    counts = Counter(config.layers)
    return {name: _layer_work(config, name, count) for name, count in counts.items()}


def _layer_work(config: ModelConfig, name: str, count: int) -> LayerWork:
    block = layer_of(config, name)
    mixer = block.mixer
    dense = _linear(block)
    inside = _linear(mixer)
    fitting = [length for length in LENGTHS if length * inside <= MOST_PRODUCTS]
    lengths = tuple(fitting) if len(fitting) > 2 else tuple(length // 8 for length in LENGTHS[:3])
    values = tuple(max(0.0, _products(block, config.width, length) - inside) for length in lengths)
    short, long = (_kept(mixer, capacity) for capacity in (256, 512))
    gathered = (long[1] - short[1]) / 256
    return LayerWork(
        count,
        dense,
        Curve(lengths, values),
        gathered,
        short[0],
        config.width,
        _weights(block.named_parameters(), low_names(block)).low,
        block.mixer.composes,
    )


def _linear(module: nn.Module) -> int:
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, nn.Linear))


def _products(block: Block, width: int, length: int) -> float:
    """Multiply-adds of a token of a mixer's forward pass in blocked PyTorch, which skips what no token sees."""
    x = torch.randn(1, length, width, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), use_backend("cpu"), FlopCounterMode(display=False) as counter:
        record = {"call": Call(x)} if block.mixer.reads_call else {}
        block.mixer(x, **record)
    return counter.get_total_flops() / 2 / length


def _kept(mixer: nn.Module, capacity: int) -> tuple[int, int]:
    """Numbers that a state of one row carries, and that grow with its capacity."""
    found = list(leaves(mixer.init_state(1, capacity)))  # pyright: ignore[reportCallIssue]
    carried = sum(leaf.tensor.numel() for leaf in found if leaf.carried)
    return carried, sum(leaf.tensor.numel() for leaf in found if leaf.axis is not None)
