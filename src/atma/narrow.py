"""A model whose large weights are read in 8 or 4 bits: a step of few rows waits for their bytes alone.

Narrow are the embedding, the head and every linear layer with as many outputs as LEAST. Norms, biases, decays, taps and
the projections of a few gates stay as they are, which are few bytes. A model in int4 has its embedding and its head in
int8: in 4 bits these alone cost more than all else together (docs/narrow.md). The layers are `layers.Linear` in another
form, so the model's code is the same; a row's result depends on no other row, nor on the threads (atma.ops.narrow).
They are read on the CPU, and not trained.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from atma.device import device_of
from atma.layers import Linear
from atma.ops import narrow as ops
from atma.ops.narrow import DTYPES, WIDTHS, Codes, Packed, Width

ENDS = frozenset({"embed", "head"})
"""The layers that are in int8 whatever the width."""
LEAST = 32
"""Outputs of the smallest layer that is narrowed."""
CODES, SCALE = "_codes", "_scale"
"""What a weight's name ends in where it is saved narrow: not its own, which whoever reads floats would take."""
_TENSORS = ("codes", "panels", "scale", "sums")


class Narrow(nn.Module):
    """A weight in 8 or 4 bits. `like`: its dtype is that of the rows it multiplies."""

    def __init__(self, held: Codes | Packed, like: Tensor) -> None:
        super().__init__()
        self.kind, self.inputs, self.outputs = type(held), held.inputs, held.outputs
        self.width: Width = held.width
        for name in _TENSORS:
            if hasattr(held, name):
                self.register_buffer(name, getattr(held, name), persistent=False)
        self.register_buffer("like", torch.full((1, 1), torch.nan, dtype=like.dtype), persistent=False)

    @property
    def weight(self) -> Tensor:
        """Shape, dtype and device of the weight that it stands for, and NaN for its numbers."""
        return cast(Tensor, self.like).expand(self.outputs, self.inputs)

    @property
    def held(self) -> Codes | Packed:
        """What is multiplied."""
        found = self._buffers
        if self.kind is Codes:
            return Codes(self.width, self.inputs, cast(Tensor, found["codes"]), cast(Tensor, found["scale"]))
        tensors = (cast(Tensor, found[name]) for name in ("panels", "scale", "sums"))
        return Packed(self.width, self.inputs, self.outputs, *tensors)

    @property
    def codes_held(self) -> Codes:
        """As it is saved."""
        held = self.held
        return held if isinstance(held, Codes) else ops.unpack(held)

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, {self.width}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        codes = self.codes_held
        destination |= {f"{prefix}weight{CODES}": codes.codes, f"{prefix}weight{SCALE}": codes.scale}

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        """What `to` does: rows of another dtype, not another weight. ValueError: a dtype or device it has not."""
        like = fn(self.like)
        if like.device.type != "cpu" or like.dtype not in DTYPES:
            told = f"{str(like.dtype).removeprefix('torch.')} on {like.device}"
            raise ValueError(f"weights in {self.width} are read in float32 or bfloat16 on the CPU, not in {told}")
        self.like = like
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = nn.Parameter(fn(parameter.data), parameter.requires_grad)
        return self


class NarrowLinear(Narrow):
    """x · weightᵀ + bias."""

    def __init__(self, held: Codes | Packed, bias: nn.Parameter | None, like: Tensor) -> None:
        super().__init__(held, like)
        self.bias = bias
        self.in_features, self.out_features = held.inputs, held.outputs

    def forward(self, x: Tensor) -> Tensor:
        return ops.product(x, self.held, self.bias)

    def unbiased(self, x: Tensor) -> Tensor:
        """x · weightᵀ."""
        return ops.product(x, self.held, None)


class NarrowEmbedding(Narrow):
    """Rows of the weight by index."""

    def forward(self, tokens: Tensor) -> Tensor:
        return ops.row_of(tokens, self.held, cast(Tensor, self.like).dtype)


def width_of(weights: str | None) -> Width | None:
    """A width by its name; None: weights stay as they are. ValueError: there is none of that name."""
    if weights is not None and weights not in WIDTHS:
        raise ValueError(f"'weights' must be one of {', '.join(WIDTHS)}, not {weights!r}; leave it out for floats")
    return cast(Width | None, weights)


@torch.no_grad()
def narrow(model: nn.Module, width: Width) -> None:
    """Replace a model's large weights, in place; those that several layers share stay shared.

    ValueError: it is not on the CPU, or is narrow already, or a weight is not finite.
    """
    if narrow_layers(model):
        raise ValueError(f"the weights are in {width_in(model)} already; load them without weights={width!r}")
    held: dict[int, Codes | Packed] = {}
    for name, layer in _chosen(model):
        if layer.weight.device.type != "cpu":
            raise ValueError(f"weights in {width} are read on the CPU, not on {layer.weight.device}")
        key = id(layer.weight)
        if key not in held:
            held[key] = packed(ops.quantised(layer.weight, "int8" if name in ENDS else width))
        replace(model, name, held[key])


def replace(model: nn.Module, name: str, held: Codes | Packed) -> None:
    """Put a narrow weight in the place of the layer of that name, whose bias stays."""
    layer, (parent, _, own) = model.get_submodule(name), name.rpartition(".")
    like = cast(Tensor, layer.weight)
    made = (
        NarrowEmbedding(held, like)
        if isinstance(layer, nn.Embedding)
        else NarrowLinear(held, cast(nn.Parameter | None, layer.bias), like)
    )
    setattr(model.get_submodule(parent), own, made.train(layer.training))


def narrow_layers(model: nn.Module) -> dict[str, Narrow]:
    """The layers whose weights are narrow, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Narrow)}


def width_in(model: nn.Module) -> Width | None:
    """The width of a model's narrow weights but for its ends; None: it has none."""
    widths: set[Width] = {layer.width for layer in narrow_layers(model).values()}
    return "int4" if "int4" in widths else "int8" if widths else None


def numbers_in(model: nn.Module) -> int:
    """A model's parameters, narrow weights among them, what is shared once."""
    shared = {cast(Tensor, layer.scale).data_ptr(): layer for layer in narrow_layers(model).values()}
    narrow = sum(layer.inputs * layer.outputs for layer in shared.values())
    return narrow + sum(parameter.numel() for parameter in model.parameters())


def require_floats(model: nn.Module, what: str) -> None:
    """ValueError, behind `what` needs them, where a model's weights are narrow."""
    width = width_in(model)
    if width is not None:
        raise ValueError(f"{what} needs weights in floats, not in {width}: load them with atma.loading.load_floats")


def home(model: nn.Module, device: str | None) -> torch.device:
    """`home_of` the width that a model has."""
    return home_of(width_in(model), device)


def home_of(width: Width | None, device: str | None) -> torch.device:
    """The device of that name, for weights of that width; None: a GPU if there is one, but the CPU for narrow weights.

    ValueError: this machine lacks it, or the weights are narrow and it is no CPU.
    """
    where = device_of("cpu" if device is None and width else device)
    if width and where.type != "cpu":
        raise ValueError(f"--device {device}: weights in {width} are read on the CPU; leave --device out")
    return where


def narrow_bytes(model: nn.Module) -> int:
    """Of a model's narrow weights, with their scales; what is shared once."""
    held = [getattr(one, name) for one in narrow_layers(model).values() for name in _TENSORS if hasattr(one, name)]
    return sum({x.data_ptr(): x.nbytes for x in held}.values())


def packed(codes: Codes) -> Codes | Packed:
    """As it is multiplied here: laid out for the compiled kernels, where there are any."""
    return ops.pack(codes) or codes


def _chosen(model: nn.Module) -> list[tuple[str, nn.Linear | nn.Embedding]]:
    return [
        (name, module)
        for name, module in model.named_modules()
        if (name in ENDS and isinstance(module, nn.Linear | nn.Embedding))
        or (type(module) is Linear and module.out_features >= LEAST)
    ]


__all__ = [
    "Narrow",
    "NarrowEmbedding",
    "NarrowLinear",
    "home",
    "home_of",
    "narrow",
    "narrow_bytes",
    "narrow_layers",
    "numbers_in",
    "packed",
    "replace",
    "require_floats",
    "width_in",
    "width_of",
]
