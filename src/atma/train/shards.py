"""Weights in parts: so many neighbouring processes keep a part of each, and have all of a block while it computes.

That is `torch.distributed.fsdp.fully_shard`, a block at a time, put around the model from outside: a process gathers a
block's weights before its forward and its backward pass, and of its gradients keeps the sum of a part. Weights travel
in their own type, so that a step is what it is without parts, up to the order in which gradients are added.

Moving them is as ever (atma.train.owners): every parameter has one process that moves the whole of it and has all of
its optimiser's state. Parts of its gradient go there, and parts of what it becomes go back to all. A process hence
holds a part of every weight and the whole of some.
"""

import datetime
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from atma.lora import as_plain
from atma.model import Model
from atma.train.optim import Optimisers
from atma.train.owners import Owners
from atma.train.parallel import Ranks
from atma.train.travel import LOW, low_names, round_before_gathering


class OwnersOfParts(Owners):
    """Who moves which parameters of a sharded `model`, where it was `owners` before it was sharded."""

    def __init__(self, owners: Owners, model: Model, group: Any) -> None:
        self.ranks, self.owner, self.own, self.moved, self.group = owners.ranks, owners.owner, owners.own, [], group
        self._whole = {i: p for i, p in enumerate(owners.parameters) if self.owner[i] == self.ranks.rank}
        self.names, now = owners.names, dict(model.named_parameters())
        self.parameters = [now[name] for name in self.names]
        self.named = {self.names[i]: p for i, p in self._whole.items()}
        if self.ranks.shard == 1:  # its parts are whole: it moves those
            for i, whole in self._whole.items():
                whole.data = _part(self.parameters[i].detach()).as_subclass(Tensor)
        self._rows, self.device = [p.shape[0] for p in self.parameters], _part(self.parameters[0]).device

    def mine(self, i: int) -> nn.Parameter:
        return self._whole[i]

    @torch.no_grad()
    def reduce(self) -> list[nn.Parameter]:
        """Bring the parts of each gradient, whose sums FSDP has made, to its owner; this process's own parameters."""
        self.mark()
        for whole in self._whole.values():
            whole.grad = None  # of a step that moved nothing
        for lot in self._even_lots(self.moved):
            self._gather(lot)
        return list(self._whole.values())

    def _gather(self, moved: list[int]) -> None:
        ranks, dtype = self.ranks, self.parameters[moved[0]].dtype
        first = ranks.rank - ranks.rank % ranks.shard
        wanted = [[i for i in moved if self.owner[i] == first + place] for place in range(ranks.shard)]
        parts = [_flat(map(self._gradient, some), self.device, dtype) for some in wanted]
        for i in moved:
            self.parameters[i].grad = None
        mine = wanted[ranks.rank - first]
        sizes = [sum(self._numbers(i, place) for i in mine) for place in range(ranks.shard)]
        found = _exchanged(parts, sizes, self.group)
        split = [one.split([self._numbers(i, place) for i in mine]) for place, one in enumerate(found)]
        for turn, i in enumerate(mine):
            whole = self._whole[i]
            whole.grad = torch.cat([one[turn] for one in split]).view_as(whole).to(dtype)

    def _gradient(self, i: int) -> Tensor:
        return _part(cast(Tensor, self.parameters[i].grad))

    @torch.no_grad()
    def spread(self) -> None:
        """Give every process its part of what the owners have made of their parameters."""
        for lot in self._even_lots(range(len(self.parameters))):
            self._spread_parts(lot)

    def _spread_parts(self, lot: list[int]) -> None:
        ranks, dtype = self.ranks, self.parameters[lot[0]].dtype
        owned = [[i for i in lot if self.owner[i] == rank] for rank in range(ranks.world)]
        mine = [self._whole[i] for i in owned[ranks.rank]]
        each = [_flat([self._rows_of(p, to) for p in mine], self.device, dtype) for to in range(ranks.shard)]
        sent = [each[to % ranks.shard] for to in range(ranks.world)]
        place = ranks.rank % ranks.shard
        sizes = [sum(self._numbers(i, place) for i in some) for some in owned]
        for some, found in zip(owned, _exchanged(sent, sizes, None), strict=True):
            for i, values in zip(some, found.split([self._numbers(i, place) for i in some]), strict=True):
                part = _part(self.parameters[i])
                part.copy_(values.view_as(part))

    def _rows_of(self, whole: Tensor, place: int) -> Tensor:
        each = -(-whole.shape[0] // self.ranks.shard)
        return whole[each * place : each * (place + 1)]

    def _numbers(self, i: int, place: int) -> int:
        """Of the part of a parameter that the process at a place among its neighbours keeps."""
        whole, rows = self.parameters[i], self._rows[i]
        each = -(-rows // self.ranks.shard)
        return max(0, min(rows - each * place, each)) * (whole.numel() // rows)


def shard(
    model: Model, optimisers: Optimisers, ranks: Ranks, device: torch.device, seconds: float, compute: torch.dtype
) -> None:
    """Leave in this process, on its device, a part of every weight, and of what is trained the whole of what it moves.

    seconds: how long one waits for another. compute: what steps compute in (`atma.train.travel`).
    """
    owners = optimisers.owners
    assert owners is not None
    mesh = mesh_of(ranks, device, seconds)
    divide(model, ranks, mesh, compute)
    optimisers.keep_own(OwnersOfParts(owners, model, mesh.get_group(-1)), device)


def mesh_of(ranks: Ranks, device: torch.device, seconds: float) -> Any:
    """The `DeviceMesh` of copies of the weights and, last, of those that share one. seconds: as for `shard`."""
    from torch.distributed.device_mesh import DeviceMesh  # a second of imports that few runs need

    rows, patience = torch.arange(ranks.world).view(-1, ranks.shard), datetime.timedelta(seconds=seconds)
    group: Any = dist.new_subgroups_by_enumeration(rows.tolist(), timeout=patience)[0]
    if ranks.world == ranks.shard:
        return DeviceMesh.from_group(group, device.type, rows[0])
    copies: Any = dist.new_subgroups_by_enumeration(rows.T.tolist(), timeout=patience)[0]
    return DeviceMesh.from_group([copies, group], device.type, rows, mesh_dim_names=("data", "shard"))


def divide(model: Model, ranks: Ranks, mesh: Any, compute: torch.dtype = torch.float32) -> None:
    """Leave in this process its part of every weight, and let blocks gather theirs while they compute."""
    low = low_names(model, ranks.context > 1) if compute == LOW else set()
    for blocks in [*_together(model.blocks), [model]]:
        _divide(blocks, mesh, ranks.offload)
    round_before_gathering(model, low)
    with as_plain(model):  # FSDP looks at weights by their names once more, by default before the first forward pass
        cast(Any, model)._get_fsdp_state()._lazy_init()
    for part in _parts(model):
        part.set_gradient_divide_factor(1.0)  # a sum: the loss is a share of the batch's already
        part.set_force_sum_reduction_for_comms(True)
    if ranks.context > 1:
        for block in model.blocks:
            block.register_forward_pre_hook(_asked, prepend=True)  # before FSDP looks
            block.register_forward_pre_hook(_touch)


def _divide(modules: list[nn.Module], mesh: Any, offload: bool) -> None:
    """Together; with offload what they were made of stays where it is: FSDP brings it to the GPU for a moment."""
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
    from torch.distributed.tensor import DTensor

    before = [(p, p.data) for module in modules for p in module.parameters() if not isinstance(p, DTensor)]
    policy = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, offload_policy=policy)
    if offload:
        for parameter, data in before:
            parameter.data = data


def before_backward(model: Model, last: bool) -> None:
    """Sum gradients over copies of the weights in the last micro-batch alone; parts are summed in each."""
    for part in _parts(model):
        part.set_requires_all_reduce(last)


def release(model: Model) -> None:
    """Let go of weights that are still whole after a forward pass."""
    for part in _parts(model):
        part.reshard()


def _parts(model: Model) -> Iterator[Any]:
    from torch.distributed.fsdp import FSDPModule

    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _together(blocks: Iterable[nn.Module]) -> list[list[nn.Module]]:
    """Blocks, those that share weights together."""
    found: list[tuple[set[int], list[nn.Module]]] = []
    for block in blocks:
        own, same = {id(p) for p in block.parameters()}, [block]
        for other in [one for one in found if one[0] & own]:
            found.remove(other)
            own, same = own | other[0], other[1] + same
        found.append((own, same))
    return [same for _, same in found]


class _Touch(torch.autograd.Function):
    """x, as if all weights had made it, with gradients of zero: the first process of a context alone reads what a row
    begins with, and sums of parts need every process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(w.shape, w.dtype, w.device) for w in weights]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = [torch.zeros((), dtype=dtype, device=device).expand(shape) for shape, dtype, device in ctx.like]
        return grads[0], *zeros


def _asked(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """x as what a gradient is asked of, in every process or none: FSDP sums a block's gradients when that of x is
    there, else at the end, and where blocks before are frozen x may be of what was received, or not."""
    x, trained = inputs[0], any(p.requires_grad for p in block.parameters())
    if not trained or x.requires_grad or not torch.is_grad_enabled():
        return inputs
    return x.detach().requires_grad_(), *inputs[1:]


def _touch(block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    if not torch.is_grad_enabled():
        return inputs
    weights = [p for p in block.parameters() if p.requires_grad]
    return _Touch.apply(inputs[0], *weights), *inputs[1:]


def _part(x: Tensor) -> Tensor:
    """This process's part of a sharded tensor, itself and no copy."""
    return cast(Any, x).to_local()


def _flat(tensors: Iterable[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.cat([torch.empty(0, device=device, dtype=dtype), *(x.flatten() for x in tensors)])


def _exchanged(sent: list[Tensor], sizes: list[int], group: Any) -> list[Tensor]:
    """Send each process of a group its tensor; what each sends here, of so many numbers."""
    found = sent[0].new_empty(sum(sizes))
    dist.all_to_all_single(found, torch.cat(sent), sizes, [x.numel() for x in sent], group=group)
    return list(found.split(sizes))
