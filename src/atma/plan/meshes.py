"""Meshes of ranks, data × context × shard, and what the ranks of one send each other in a step.

Ranks of `data` and of `shard` have rows of their own; those of `shard` keep a part of every weight each, and those of
`context` a stretch of every row. Neighbours are those of a context and of a shard, before those of data.
"""

from collections.abc import Iterator
from typing import NamedTuple

from atma.config import TrainConfig
from atma.plan.costs import Costs
from atma.train.travel import LOW

FLOAT = 4
HOST = 0
"""Span of what goes to the memory of a rank's own processor, and from it."""


class Mesh(NamedTuple):
    """Ranks in each direction."""

    data: int = 1
    context: int = 1
    shard: int = 1

    @property
    def ranks(self) -> int:
        return self.data * self.context * self.shard

    @property
    def replicas(self) -> int:
        """Copies of the weights."""
        return self.data * self.context

    def rows(self, train: TrainConfig) -> int:
        """Rows of a micro-batch on one rank."""
        return train.batch_tokens // (train.length * train.accumulation * self.data * self.shard)

    def __str__(self) -> str:
        return f"{self.data} × {self.context} × {self.shard}"


def meshes(train: TrainConfig, gpus: int) -> list[Mesh]:
    """All meshes over which rows and tokens divide, the plainest first. ValueError: no such number, or none does."""
    if gpus < 1:
        raise ValueError(f"--gpus {gpus}: at least 1")
    rows = train.batch_tokens // (train.length * train.accumulation)
    found = [mesh for mesh in _all(gpus) if rows % (mesh.data * mesh.shard) == 0 and train.length % mesh.context == 0]
    if not found:
        unit = train.length * train.accumulation
        raise ValueError(
            f"--gpus {gpus}: no mesh takes micro-batches of {rows} row{'s' * (rows != 1)} of {train.length} tokens; "
            f"let train.batch_tokens be a multiple of length × accumulation × {gpus} = {unit * gpus}, "
            f"not {train.batch_tokens}"
        )
    return sorted(found, key=lambda mesh: (mesh.context, mesh.shard))


def _all(gpus: int) -> Iterator[Mesh]:
    for context in range(1, gpus + 1):
        if gpus % context == 0:
            left = gpus // context
            yield from (Mesh(left // shard, context, shard) for shard in range(1, left + 1) if left % shard == 0)


class Sent(NamedTuple):
    """Bytes that one rank sends in a step, and over how many neighbouring ranks, which decides what link carries it."""

    what: str
    bytes: float
    span: int


def sent(costs: Costs, mesh: Mesh, checkpointing: bool) -> list[Sent]:
    """What a step sends. A ring passes (n − 1) / n of the whole to gather or to scatter, and twice that to sum."""
    train, size = costs.recipe.train, costs.size
    found = []
    part = FLOAT * size.trained / mesh.shard
    if in_parts(costs, mesh):
        ends = size.ends.bytes(costs.compute)  # which stay whole from the forward pass to the end of the backward pass
        blocks = FLOAT * size.total - 2 * size.low * (costs.compute == LOW) - ends
        weights = train.accumulation * _ring(mesh.shard) * (2 * blocks + ends)
        found.append(Sent("weights of shards, forward and backward", weights, mesh.shard))
        gradients = (train.accumulation + 1 / mesh.ranks) * _ring(mesh.shard) * FLOAT * size.trained
        found.append(Sent("gradients of shards, and to their owners", gradients, mesh.shard))
        if mesh.replicas > 1:
            found.append(Sent("gradients over copies of the weights", 2 * _ring(mesh.replicas) * part, mesh.ranks))
        found.append(Sent("weights back from their owners", _ring(mesh.ranks) * part, mesh.ranks))
        if train.offload:
            found.append(Sent("weights from the processor's memory, and gradients to it", _moved(costs, mesh), HOST))
    elif mesh.ranks > 1:
        found.append(Sent("gradients to their owners, and weights back", 2 * _ring(mesh.ranks) * part, mesh.ranks))
    if mesh.context > 1:
        found += _of_context(costs, mesh, checkpointing)
    return [message for message in found if message.bytes]


def in_parts(costs: Costs, mesh: Mesh) -> bool:
    """Whether a block's weights are gathered while it computes."""
    return mesh.shard > 1 or costs.recipe.train.offload


def _moved(costs: Costs, mesh: Mesh) -> float:
    """Bytes that go between the memories of a rank's processor and its GPU: parts in float32, and matrices of Muon."""
    train, size = costs.recipe.train, costs.size
    blocks = size.total - size.ends.numbers
    passes = train.accumulation * (2 * blocks + size.ends.numbers + size.trained) / mesh.shard
    return FLOAT * (passes + 2 * sum(rows * columns for rows, columns in size.matrices) / mesh.ranks)


def _of_context(costs: Costs, mesh: Mesh, checkpointing: bool) -> list[Sent]:
    """Keys and values gathered forward and their gradients scattered backward; states passed on, forward and backward.

    With checkpointing the forward half of some layers happens twice.
    """
    train = costs.recipe.train
    passes, rows = 2 + (costs.again_share if checkpointing else 0), train.accumulation * mesh.rows(costs.recipe.train)
    layers = costs.layers.values()
    keys = sum(one.count * one.gathered for one in layers) * rows * train.length * costs.compute.itemsize
    states = sum(one.count * one.carried for one in layers) * rows * FLOAT
    found = [Sent("keys and values over the context", passes * _ring(mesh.context) * keys, mesh.context)]
    return [*found, Sent("states over the context", passes * states, mesh.context)]


def _ring(ranks: int) -> float:
    return (ranks - 1) / ranks
