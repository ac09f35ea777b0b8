"""Every parameter has one process that moves it: gradients are summed there, and what it becomes goes to all.

Each process so makes a share of the update and holds a share of the optimiser's state. A sum is added in the order of
the processes. With one micro-batch each, N processes hence move the weights to the same bits as one process with N
micro-batches.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atma.train.parallel import Ranks, where

LOT = 1 << 23
"""Numbers that go from process to process at a time: 32 MiB, so that a message of them finds room in little memory."""


class Owners:
    """Who moves which of the trained parameters, given by name with what it costs to move each."""

    def __init__(self, ranks: Ranks, parameters: Mapping[str, nn.Parameter], costs: Mapping[str, float]) -> None:
        self.ranks, self.parameters, self.named = ranks, list(parameters.values()), dict(parameters)
        self.names = list(parameters)
        self.owner = shared_out([costs[name] for name in parameters], ranks.world)
        self.own = {name for name, owner in zip(parameters, self.owner, strict=True) if owner == ranks.rank}
        """Names of this process's."""
        self.moved: list[int] = []
        """Which had a gradient in the last step."""

    def reduce(self) -> list[nn.Parameter]:
        """Sum the gradients of each parameter at its owner, and drop them elsewhere; this process's own parameters.

        What has a gradient in some processes only counts as zero in the others.
        """
        self.mark()
        for lot in self._even_lots(self.moved):
            self._reduce(lot)
        return [p for p, owner in zip(self.parameters, self.owner, strict=True) if owner == self.ranks.rank]

    def mark(self) -> None:
        """Find out which parameters have a gradient in any process."""
        marks = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.int32, device=where())
        dist.all_reduce(marks, dist.ReduceOp.MAX)
        self.moved = [i for i, mark in enumerate(marks.tolist()) if mark]

    def mine(self, i: int) -> nn.Parameter:
        """The whole of a parameter that this process moves, with its gradient after `reduce`."""
        return self.parameters[i]

    def _even_lots(self, some: Iterable[int]) -> Iterator[list[int]]:
        """`_lots` that have parameters of all owners alike."""
        before, turns = [0] * self.ranks.world, dict[int, int]()
        for i in some:
            turns[i] = before[self.owner[i]]
            before[self.owner[i]] += self.parameters[i].numel()
        return self._lots(sorted(turns, key=turns.__getitem__))

    def _lots(self, some: Sequence[int]) -> Iterator[list[int]]:
        """Parameters of one type together, up to `LOT` numbers or one of more."""
        for dtype in dict.fromkeys(self.parameters[i].dtype for i in some):
            lot, numbers = [], 0
            for i in some:
                if self.parameters[i].dtype != dtype:
                    continue
                if lot and numbers + self.parameters[i].numel() > LOT:
                    yield lot
                    lot, numbers = [], 0
                lot.append(i)
                numbers += self.parameters[i].numel()
            yield lot

    def _reduce(self, moved: Sequence[int]) -> None:
        dtype = torch.promote_types(self.parameters[moved[0]].dtype, torch.float32)
        by_owner = [[i for i in moved if self.owner[i] == rank] for rank in range(self.ranks.world)]
        sent = torch.cat([self._gradient(i).to(dtype) for some in by_owner for i in some])
        sizes = [sum(self.parameters[i].numel() for i in some) for some in by_owner]
        for i in moved:
            self.parameters[i].grad = None
        mine, own = by_owner[self.ranks.rank], sizes[self.ranks.rank]
        found = sent.new_empty(self.ranks.world * own)
        dist.all_to_all_single(found, sent, [own] * self.ranks.world, sizes)
        first, *others = found.split(own) if own else [found]
        for other in others:
            first += other
        for i, part in zip(mine, first.split([self.parameters[i].numel() for i in mine]), strict=True):
            self.parameters[i].grad = part.view_as(self.parameters[i]).to(self.parameters[i].dtype)

    def _gradient(self, i: int) -> Tensor:
        parameter = self.parameters[i]
        return (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()

    def norm(self) -> Tensor:
        """The norm of all gradients together, after `reduce`: to the bit what `get_total_norm` makes of them."""
        mine = [place for place, i in enumerate(self.moved) if self.owner[i] == self.ranks.rank]
        grads = [self.mine(self.moved[place]).grad for place in mine]
        norms = torch.zeros(len(self.moved), dtype=self.parameters[0].dtype, device=self.parameters[0].device)
        for place, grad in zip(mine, grads, strict=True):
            assert grad is not None
            norms[place] = torch.linalg.vector_norm(grad)
        dist.all_reduce(norms)  # to each only one process adds anything
        return torch.linalg.vector_norm(norms)

    @torch.no_grad()
    def spread(self) -> None:
        """Give every process what the owners have made of their parameters."""
        for rank in range(self.ranks.world):
            for lot in self._lots([i for i, owner in enumerate(self.owner) if owner == rank]):
                self._spread([self.parameters[i] for i in lot], rank)

    def _spread(self, owned: Sequence[nn.Parameter], rank: int) -> None:
        if rank == self.ranks.rank:
            dist.broadcast(torch.cat([p.flatten() for p in owned]), rank)
            return
        sizes = [p.numel() for p in owned]
        found = owned[0].new_empty(sum(sizes))
        dist.broadcast(found, rank)
        for parameter, values in zip(owned, found.split(sizes), strict=True):
            parameter.copy_(values.view_as(parameter))


def shared_out(costs: Sequence[float], count: int) -> list[int]:
    """Who of `count` takes each of these: the dearest first, each to whom has least so far; of equal ones the first."""
    loads, owner = [0.0] * count, [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner[i] = loads.index(min(loads))
        loads[owner[i]] += costs[i]
    return owner


def collected(ranks: Ranks, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All processes' tensors by name, on the first; its own on every other."""
    found = dict(tensors)
    for rank in range(1, ranks.world):
        if ranks.rank == rank:
            _send(tensors)
        elif ranks.rank == 0:
            found |= _receive(rank)
    return found


def _send(tensors: Mapping[str, Tensor]) -> None:
    about = [[name, list(x.shape), str(x.dtype).removeprefix("torch.")] for name, x in tensors.items()]
    text = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8, device=where())
    dist.send(torch.tensor([len(text)], device=where()), 0)
    dist.send(text, 0)
    for x in tensors.values():
        dist.send(x.to(where()).contiguous(), 0)


def _receive(rank: int) -> dict[str, Tensor]:
    size = torch.zeros(1, dtype=torch.int64, device=where())
    dist.recv(size, rank)
    text = torch.empty(int(size), dtype=torch.uint8, device=where())
    dist.recv(text, rank)
    found = {}
    for name, shape, dtype in json.loads(bytes(text.tolist())):
        x = torch.empty(shape, dtype=getattr(torch, dtype), device=where())
        dist.recv(x, rank)
        found[name] = x.cpu()
    return found
