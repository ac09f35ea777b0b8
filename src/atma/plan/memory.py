"""What one rank of a mesh holds, by part, and the most at one time.

A step holds most either when its forward pass ends, with all that the backward pass needs, or when it updates, with
every gradient and the optimisers' own buffers. Where micro-batches accumulate, gradients settle where activations of
the first had been, and those of the next find no room between them: 80 MiB beside 86 MiB of gradients in a model of
22.6M parameters on a CPU, and none without accumulation (benchmarks/plan.py). They count as gaps.
"""

from typing import NamedTuple

import torch

from atma.plan.costs import Costs
from atma.plan.meshes import Mesh, in_parts
from atma.train.optim import GRAM_NUMBERS
from atma.train.owners import LOT
from atma.train.travel import LOW

FLOAT = 4
"""Bytes of a number of weights, gradients and optimiser states, which are float32."""
LOSS_BLOCKS = 4
"""Blocks of logits of the loss that are there at a time, with their intermediate values."""
BLOCK_LOGITS = 1 << 21
"""Logits of a block."""
_BACK = "backward pass of a layer"
_ENDS = "gradients of embedding and head"
_AWAY = ("weights", "gradients", "optimiser", "message")
"""What lies in the processor's memory with train.offload."""


class Held(NamedTuple):
    """Bytes of one rank."""

    parts: dict[str, float]
    peak: float
    """The most at one time."""
    when: str
    """"forward" or "update": when that is."""
    host: float
    """Of the parts, what lies in the processor's memory, which is another."""


def held(costs: Costs, mesh: Mesh, checkpointing: bool, program: float, apart: bool = False) -> Held:
    """By part and at most.

    checkpointing: blocks of `Costs.again` keep their inputs alone. program: bytes of a process without a model. apart:
    whether the memory is another than the processor's, so that what is offloaded is not in it.
    """
    parts = {"program": program} | _kept(costs, mesh) | _forward(costs, mesh, checkpointing)
    parts |= _update(costs, mesh)
    away = _AWAY if apart and costs.recipe.train.offload else ()
    here = {name: 0.0 if name in away else size for name, size in parts.items()}
    lasting = here["program"] + here["weights"] + here["optimiser"]
    divided, several = in_parts(costs, mesh), costs.recipe.train.accumulation > 1
    parts["gaps"] = here["gaps"] = min(here["gradients"], parts["activations"]) if several else 0.0
    own = ("activations", _BACK, "loss", "gathered weights", "context", "gaps")
    earlier = (here["gradients"] if several else 0.0) + (0.0 if several and not divided else parts["first gradients"])
    forward = lasting + sum(parts[name] for name in own) + earlier
    update = lasting + here["gradients"] + max(here["message"], parts["update"], parts[_ENDS])
    del parts["first gradients"]
    host = sum(parts[name] for name in away)
    return Held(parts, max(forward, update), "forward" if forward >= update else "update", host)


def _kept(costs: Costs, mesh: Mesh) -> dict[str, float]:
    size = costs.size
    own = FLOAT * size.trained / mesh.ranks if in_parts(costs, mesh) else 0.0  # the whole of what the rank moves
    return {
        "weights": FLOAT * size.total / mesh.shard + (own if mesh.shard > 1 else 0.0),
        "gradients": FLOAT * size.trained / mesh.shard + own,
        "optimiser": (FLOAT * size.moments + FLOAT * size.scalars) / mesh.ranks,
    }


def _forward(costs: Costs, mesh: Mesh, checkpointing: bool) -> dict[str, float]:
    """What there is when the forward pass ends, besides what always is."""
    rows, length, width = mesh.rows(costs.recipe.train), costs.recipe.train.length, costs.recipe.model.width
    tokens = rows * length / mesh.context
    layers = {name: _layer(costs, name, tokens, length, mesh) for name in costs.layers}
    activations = sum(costs.layers[name].count * each for name, each in layers.items())
    largest = max(layers.values())
    if checkpointing:
        again = costs.again
        activations += sum(n * (FLOAT * width * tokens - layers[name]) for name, n in again.items())
        activations += max(layers[name] for name in again)
    context = 0.0
    if mesh.context > 1:
        gathered = max(one.gathered for one in costs.layers.values()) * rows * length * costs.compute.itemsize
        context = 2 * gathered + FLOAT * rows * max(one.carried for one in costs.layers.values())
    size, divided = costs.size, in_parts(costs, mesh)
    whole = 2 * size.largest.bytes(costs.compute) + size.ends.bytes(costs.compute) if divided else 0.0
    ends = costs.ends.at(tokens, length) - (costs.ends.fixed if divided and size.ends.low else 0.0)
    logits = LOSS_BLOCKS * FLOAT * min(BLOCK_LOGITS, tokens * costs.recipe.model.vocab_size)
    return {
        "activations": activations,
        _BACK: largest,
        "loss": ends + logits,
        "gathered weights": whole,
        "context": context,
        "first gradients": FLOAT * min(costs.head, size.trained),
        _ENDS: 2 * FLOAT * min(size.ends.numbers, size.trained) + size.ends.bytes(costs.compute) if divided else 0.0,
    }


def _layer(costs: Costs, name: str, tokens: float, length: int, mesh: Mesh) -> float:
    """Bytes that a layer keeps: weights in parts are gathered anew, their rounded copies too."""
    saved = costs.saved[name]
    copies = saved.fixed if costs.compute == torch.float32 else min(saved.fixed, LOW.itemsize * costs.layers[name].low)
    return saved.at(tokens, length) - (copies if in_parts(costs, mesh) else 0)


def _update(costs: Costs, mesh: Mesh) -> dict[str, float]:
    """The flat gradients that go to their owners and come from all ranks, and what Muon works on at a time."""
    lot = min(costs.size.trained, max(LOT, costs.size.largest.numbers))
    message = 2 * FLOAT * lot / mesh.shard if mesh.ranks > 1 else 0.0
    sides: dict[int, list[int]] = {}
    for rows, columns in costs.size.matrices:
        sides.setdefault(min(rows, columns), []).append(rows * columns)
    together = 0.0
    for side, numbers in sides.items():
        most = max(1, GRAM_NUMBERS // max(1, side * side))
        some = min(sum(numbers), most * max(numbers))
        together = max(together, FLOAT * (2 * some + 3 * min(len(numbers), most) * side * side))
    return {"message": message, "update": together / mesh.ranks}
