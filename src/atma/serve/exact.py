"""The model as it is served: the same modules and parameters, with products whose sums run in one order.

What a token reads then does not depend, to the last bit, on the number of rows in the call, on how its text was cut
into calls, or on the number of threads. That holds on the CPU with the compiled kernels; elsewhere the model is served
as it is, equal up to rounding, and so is a model with a mixer that has no such form (`Mixer.steady`). Narrow weights
are multiplied as they are: their sums are of integers, or in one order too (atma.ops.narrow). Adapters add to what
layers compute (`atma.serve.adapters`).
"""

import copy
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from atma.large_pages import in_large_pages
from atma.layers import Linear
from atma.mixers import Mixer
from atma.model import Model
from atma.narrow import NarrowLinear, narrow_bytes
from atma.ops.backend import backend_for
from atma.ops.loss import softcap
from atma.ops.rows import Packed, pack, product, row_of
from atma.serve.adapters import HEAD, Adapter, Adapters


class PackedLinear(nn.Module):
    """A linear layer by `product`: it holds its own copy of the weight, laid out for that."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.packed = pack(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.packed, self.bias)


class PackedEmbedding(nn.Module):
    """The embedding of a model whose head is the same weight: rows of what is packed for that."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.packed = packed

    def forward(self, tokens: Tensor) -> Tensor:
        return row_of(tokens, self.packed)


class Served(nn.Module):
    """A model's hidden states and logits for the engine. `exact`: by the kernels whose sums run in one order.

    Packed weights are copies. `keep` False takes the model over: it computes nothing itself any more, and each weight
    is held once. With `adapters`, calls say whose rows they compute (`Adapters.rows`).
    """

    def __init__(self, model: Model, keep: bool = True, adapters: Sequence[Adapter] = ()) -> None:
        super().__init__()
        self.cap = model.config.logit_cap
        self.config, self.dtype, self.device = model.config, model.embed.weight.dtype, model.embed.weight.device
        if keep:
            shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
            model = copy.deepcopy(model, shared)
        self.model: Model = model.eval()
        self.head = None
        self.exact = _steady(self.model)
        if self.exact:
            head = cast(nn.Module, self.model.head)
            self.head = head if isinstance(head, NarrowLinear) else PackedLinear(self.model.head)
            _pack(self.model)
            if self.config.tied_head and not keep and isinstance(self.head, PackedLinear):
                cast(nn.Module, self.model).embed = PackedEmbedding(self.head.packed)
            in_large_pages(one.packed.panels for one in self.modules() if isinstance(one, PackedLinear))
        self.adapters = Adapters(adapters, self.dtype, self.device)
        if self.adapters.on_head and self.head is None:
            self.head = cast(nn.Module, self.model.head)
        own = {} if self.head is None else {HEAD: self.head}
        self.adapters.put_on(dict(self.model.named_modules()) | own)

    def forward(self, tokens: Tensor, state: object, which: Sequence[int] | None = None) -> tuple[Tensor, object]:
        """`Model.forward`; `which` adapter each text has, where there are any, by its place, −1 for none."""
        with self.adapters.rows(which):
            return self.model(tokens, state)

    @property
    def packed_bytes(self) -> int:
        """Of the weights that products read."""
        floats = sum(one.packed.panels.nbytes for one in self.modules() if isinstance(one, PackedLinear))
        return floats + narrow_bytes(self)

    def logits(self, hidden: Tensor, which: Sequence[int] | None = None) -> Tensor:
        """`Model.logits` of hidden (N, D), one of each text in `which`, or all of one."""
        with self.adapters.rows(which):
            return self.scores(hidden)

    def scores(self, hidden: Tensor) -> Tensor:
        """`logits` where it has been said whose rows they are."""
        if self.head is None:
            return self.model.logits(hidden)
        work = torch.promote_types(hidden.dtype, torch.float32)
        return softcap(self.head(hidden).to(work), self.cap)


def _steady(model: Model) -> bool:
    """Whether every mixer has a form whose bits depend neither on cuts nor on rows; it has taken it then."""
    compiled = backend_for("auto", model.embed.weight, "dense") == "native"
    mixers = [module for module in model.modules() if isinstance(module, Mixer)]
    if compiled and all(mixer.steady() for mixer in mixers):
        return True
    for mixer in mixers:
        mixer.steady(False)
    return False


def _pack(model: Model) -> None:
    cast(nn.Module, model).head = nn.Identity()
    for module in [module for module in model.modules() if not isinstance(module, Linear)]:
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):  # after which nothing here holds it
                setattr(module, name, PackedLinear(child))
