"""What a neural memory takes in on one reading, nothing learned before: pairs it finds again, and functions it follows.

    python benchmarks/memory_capacity.py pairs        # pairs found against pairs told, each memory at its best step
    python benchmarks/memory_capacity.py functions    # ATLAS's learnability study (protocols.md): error on five targets

Pairs: unit keys and values drawn at random, told once each; then a pair is found where what the memory has for its key
lies nearest its own value, of all that were told. Each head has slow weights of its own, drawn as a mixer's are. Every
memory is told at several steps θ, and the best is shown with its θ; γ is 1, so that nothing is forgotten.

Functions: inputs and outputs of one target after another token; shown is ‖M(i) − o‖²/‖o‖² of each token before it is
written, over the last eighth of a text. Memories have as wide a hidden layer as they are told.
"""

import argparse
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.mixers.features import FEATURES
from atma.ops import fast_weights
from atma.ops.fast_weights import Gates, Memory, Rule, empty
from atma.ops.fast_weights.network import network

STEPS = (1.0, 0.5, 0.25, 0.125, 0.06)
MUON_STEPS = (0.25, 0.125, 0.06, 0.03, 0.015)


class Kind(NamedTuple):
    """A memory: the options of its rule, the width of its hidden layer in values, and what is done with keys."""

    options: dict[str, Any]
    hidden: float = 4
    poly: bool = False
    """Their coordinates are multiplied out; such keys are narrow."""
    narrow: bool = False
    """They are half as wide as values."""


_MLP = {"network": "mlp", "decay_to": "initial", "radius": 4.0}
_MUON = {"network": "mlp", "decay_to": "initial", "optimiser": "muon"}
KINDS = {
    "matrix": Kind({"anchor": "hidden"}),
    "matrix, keys of half the width": Kind({"anchor": "hidden"}, narrow=True),
    "… and poly(2)": Kind({"anchor": "hidden"}, poly=True, narrow=True),
    "mlp, 1×": Kind(_MLP | {"anchor": "hidden"}, 1),
    "mlp, 4×": Kind(_MLP | {"anchor": "hidden"}),
    "mlp, 4×, anchored": Kind(_MLP),
    "mlp, 4×, anchored, momentum": Kind(_MLP | {"optimiser": "momentum"}),
    "mlp, 4×, anchored, window 16": Kind(_MLP | {"window": 16}),
    "mlp, 4×, keys of half the width": Kind(_MLP | {"anchor": "hidden"}, narrow=True),
    "… and poly(2), mlp": Kind(_MLP | {"anchor": "hidden"}, poly=True, narrow=True),
    "gated, 4×": Kind(_MLP | {"network": "gated", "activation": "silu", "anchor": "hidden"}),
    "gated, 4×, Muon": Kind(_MUON | {"network": "gated", "activation": "silu"}),
    "mlp, 4×, Muon": Kind(_MUON),
    "mlp, 4×, Muon, window 16": Kind(_MUON | {"window": 16}),
}


def memory_of(kind: Kind, heads: int, keys: int, values: int, draw: torch.Generator) -> Memory:
    """Slow weights as mixers.md, section 4.9 has them; J only where keys are as wide as values."""
    rule = Rule(**({"chunk": 16, "residual": "identity" if keys == values else "none"} | kind.options))
    if rule.network == "matrix":
        return Memory(rule, (torch.zeros(heads, values, keys),))
    hidden = round(kind.hidden * values)
    first = torch.randn(heads, values, hidden, generator=draw) / math.sqrt(hidden)
    rest = [torch.randn(heads, hidden, keys, generator=draw) / math.sqrt(keys) for _ in range(rule.matrices - 1)]
    return Memory(rule, (first, *rest))


def feature(k: Tensor, poly: bool) -> Tensor:
    """φ: k itself, or its products of coordinates as `atma.mixers.features` begins with them."""
    if not poly:
        return k
    lift = FEATURES["poly"](1, k.shape[-1], 2)
    lift.init_weights()
    return lift(k)


def gates_of(rule: Rule, theta: float, shape: torch.Size) -> Gates:
    """θ at every token; η is ½ and shares θ with it, and a window's tokens share it too."""
    momentum = None if rule.optimiser == "gd" else torch.full(shape, 0.5)
    step = theta * (0.5 if rule.optimiser == "momentum" else 1)
    omega = torch.full((*shape, rule.window), 1 / rule.window) if rule.window > 1 else None
    return Gates(torch.full(shape, step), None, momentum, None, omega)


@torch.no_grad()
def found(kind: Kind, pairs: int, width: int, heads: int, theta: float) -> float:
    """The share of pairs that are found after one telling."""
    draw = torch.Generator().manual_seed(pairs)
    narrow = width // 2 if kind.narrow else width
    keys = F.normalize(torch.randn(1, heads, pairs, narrow, generator=draw), dim=-1)
    values = torch.randn(1, heads, pairs, width, generator=draw) / math.sqrt(width)
    k = feature(keys, kind.poly)
    memory = memory_of(kind, heads, k.shape[-1], width, draw)
    _, state = fast_weights(k, k, values, gates_of(memory.rule, theta, k.shape[:3]), memory)
    has = network(state.weights, k, memory)
    nearest = torch.cdist(has, values).nan_to_num(math.inf).argmin(-1)
    return float((nearest == torch.arange(pairs)).double().mean())


def targets(width: int, tokens: int, heads: int, draw: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and outputs (1, heads, tokens, width) of the five targets of ATLAS's study, inputs of unit length."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw) / math.sqrt(shape[-1])

    def mlp(x: Tensor) -> Tensor:
        return F.gelu(x @ first.mT * math.sqrt(width)) @ second.mT

    def attention(x: Tensor, window: int) -> Tensor:
        q, k, v = (x @ normal(heads, width, width).mT * math.sqrt(width) for _ in "qkv")
        place = torch.arange(tokens)
        far = place[:, None] - place
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(far >= 0) & (far < window))

    x = F.normalize(torch.randn(1, heads, tokens, width, generator=draw), dim=-1)
    low = normal(heads, width, width // 8) @ normal(heads, width // 8, width)
    first, second = normal(heads, width, width), normal(heads, width, width)
    whole, near = attention(x, tokens), attention(x, tokens // 2)
    return {
        "low rank": (x, x @ low.mT),
        "MLP": (x, mlp(x)),
        "attention, then MLP": (x, mlp(whole)),
        "MLP of attention's outputs": (F.normalize(whole, dim=-1), mlp(whole)),
        "window, then MLP": (x, mlp(near)),
    }


@torch.no_grad()
def missed(kind: Kind, x: Tensor, y: Tensor, theta: float, draw: torch.Generator) -> float:
    """‖M(i) − o‖²/‖o‖² before each token is written, over the last eighth."""
    heads, tokens, width = x.shape[1:]
    k, y = feature(x, kind.poly), y / y.norm(dim=-1).mean()
    memory = memory_of(kind, heads, k.shape[-1], width, draw)
    before = torch.cat([k[:, :, 1:], k[:, :, :1]], 2)  # what is read behind a token is the next one's
    read, _ = fast_weights(before, k, y, gates_of(memory.rule, theta, k.shape[:3]), memory, empty(memory, 1))
    told, last = read[:, :, :-1] - y[:, :, 1:], slice(-tokens // 8, None)
    ratio = float(told[:, :, last].square().sum() / y[:, :, 1:][:, :, last].square().sum())
    return ratio if math.isfinite(ratio) else math.inf


def steps(kind: Kind) -> tuple[float, ...]:
    return MUON_STEPS if kind.options.get("optimiser") == "muon" else STEPS


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=("pairs", "functions"))
    parser.add_argument("--width", type=int, default=32, help="of keys and values")
    parser.add_argument("--heads", type=int, default=8, help="slow weights drawn, each with a text of its own")
    parser.add_argument("--pairs", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--tokens", type=int, default=2048, help="of a function")
    parser.add_argument("--memories", nargs="+", choices=list(KINDS))
    args = parser.parse_args()
    columns = list(map(str, args.pairs))
    if args.study == "functions":
        made = targets(args.width, args.tokens, args.heads, torch.Generator().manual_seed(0))
        columns = list(made)
    print("| memory | numbers a head | " + " | ".join(columns) + " |")
    print("| --- | ---: |" + " ---: |" * len(columns))
    pairs = args.study == "pairs"
    for name in args.memories or [name for name, kind in KINDS.items() if pairs or not kind.narrow]:
        kind, cells = KINDS[name], []
        wide = feature(torch.zeros(1, args.width // 2 if kind.narrow else args.width), kind.poly)
        memory = memory_of(kind, 1, wide.shape[-1], args.width, torch.Generator().manual_seed(0))
        for column in columns:
            draw = torch.Generator().manual_seed(1)
            if pairs:
                tried = {theta: found(kind, int(column), args.width, args.heads, theta) for theta in steps(kind)}
                theta = max(tried, key=tried.__getitem__)
                cells.append(f"{tried[theta]:.0%} ({theta:g})")
            else:
                tried = {theta: missed(kind, *made[column], theta, draw) for theta in steps(kind)}
                theta = min(tried, key=tried.__getitem__)
                cells.append(f"{tried[theta]:.3f} ({theta:g})")
        numbers = sum(w.numel() for w in memory.initial)
        print(f"| {name} | {numbers:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
