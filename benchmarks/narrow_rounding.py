"""Other ways to round weights to 4 bits than the library's, for `narrow.py quality` to tell what they cost.

Their numbers are multiplied as floats, so a loss is that of the rounding of weights alone: `int4-weights` is the
library's int4 without the rounding of rows. All have the embedding and the head in 8 bits, as int4 has them.

`Q4_0` and `Q4_1` are llama.cpp's types: a scale of 16 bits for each 32 inputs, from the largest number, or that and a
least number. `int4-of-16` is int4 with a scale for each 16 inputs. `int4-gptq` is int4's format, in which what a number
is off is taken up by those after it, as far as the layer's inputs go together in some texts: Frantar et al. 2022,
arXiv 2210.17323.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from atma.model import Model
from atma.narrow import ENDS, LEAST
from atma.ops.narrow import quantised, reference, widened

DAMPING = 0.01
"""Of the mean square of a layer's inputs, added to each."""
PIECE = 1024
"""Tokens of a text that inputs are taken from, and that are read at once."""


class Way(NamedTuple):
    """Bits a weight, scales counted, and what a weight (O, I) becomes whose inputs have a matrix of products (I, I)."""

    bits: float
    round: Callable[[Tensor, Tensor], Tensor]


def int4(weight: Tensor, _products: Tensor) -> Tensor:
    """As the library has it."""
    return widened(quantised(weight, "int4"))


def int4_of_16(weight: Tensor, _products: Tensor) -> Tensor:
    """With a scale for each 16 inputs: groups of 32 whose other half is 0."""
    rows = weight.reshape(-1, 16)
    return reference.from_4_bits(*reference.in_4_bits(rows), 16).reshape(weight.shape)


def q4_0(weight: Tensor, _products: Tensor) -> Tensor:
    """The largest of a group becomes −8; ties go up."""
    groups = weight.reshape(-1, reference.GROUP)
    scale = groups.gather(1, groups.abs().argmax(1, keepdim=True)) / -8
    codes = (groups / torch.where(scale == 0, 1, scale) + 8.5).floor().clamp(0, 15) - 8
    return (codes * scale.half().float()).view_as(weight)


def q4_1(weight: Tensor, _products: Tensor) -> Tensor:
    """The least of a group becomes 0, the largest 15."""
    groups = weight.reshape(-1, reference.GROUP)
    least = groups.amin(1, keepdim=True)
    scale = (groups.amax(1, keepdim=True) - least) / 15
    codes = ((groups - least) / torch.where(scale == 0, 1, scale) + 0.5).floor().clamp(0, 15)
    return (codes * scale.half().float() + least.half().float()).view_as(weight)


def int4_gptq(weight: Tensor, products: Tensor) -> Tensor:
    """One input after the other, its scale being the library's for what the numbers of its group have become."""
    left, made = weight.double(), torch.empty_like(weight)
    damped = products + DAMPING * products.diagonal().mean() * torch.eye(len(products), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    scale = left[:, 0]
    for i in range(weight.shape[1]):
        if i % reference.GROUP == 0:
            scale = reference.in_4_bits(left[:, i : i + reference.GROUP].float())[1][:, 0].double()
        codes = (left[:, i] / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)
        made[:, i] = codes * scale
        left[:, i:] -= ((left[:, i] - codes * scale) / upper[i, i])[:, None] * upper[i, i:]
    return made


WAYS: dict[str, Way] = {
    "int4-weights": Way(4.5, int4),
    "Q4_0": Way(4.5, q4_0),
    "Q4_1": Way(5, q4_1),
    "int4-of-16": Way(5, int4_of_16),
    "int4-gptq": Way(4.5, int4_gptq),
}


def large(model: Model) -> dict[str, nn.Linear]:
    """The layers that int4 has in 4 bits, by name."""
    layers = ((name, one) for name, one in model.named_modules() if isinstance(one, nn.Linear) and name not in ENDS)
    return {name: one for name, one in layers if one.out_features >= LEAST}


@torch.inference_mode()
def round_weights(model: Model, way: Way, texts: Iterable[np.ndarray]) -> int:
    """In place; texts: those that inputs are taken from. The bytes that it would hold."""
    layers, saved = large(model), 0.0
    products = _products(model, layers, texts) if way is WAYS["int4-gptq"] else {}
    for name, layer in layers.items():
        layer.weight.copy_(way.round(layer.weight.float(), products.get(name, layer.weight)))
        saved += layer.weight.numel() * (4 - way.bits / 8)
    for weight in {id(one): one for one in (model.embed.weight, model.head.weight)}.values():
        codes = quantised(weight, "int8")
        weight.copy_(widened(codes))
        saved += weight.nbytes - codes.codes.nbytes - codes.scale.nbytes
    return sum(one.nbytes for one in model.parameters()) - round(saved)


def _products(model: Model, layers: dict[str, nn.Linear], texts: Iterable[np.ndarray]) -> dict[str, Tensor]:
    """Of each layer Σ x xᵀ over its inputs x, float64."""
    found = {name: torch.zeros(one.in_features, one.in_features, dtype=torch.float64) for name, one in layers.items()}

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def hook(_layer: nn.Module, inputs: tuple[Tensor]) -> None:
            rows = inputs[0].flatten(0, -2)
            found[name] += rows.T @ rows

        return hook

    hooks = [one.register_forward_pre_hook(add(name)) for name, one in layers.items()]
    for tokens in texts:
        model(torch.from_numpy(tokens[:PIECE].astype(np.int64))[None], model.init_state(1, PIECE))
    for one in hooks:
        one.remove()
    missing = [name for name, one in found.items() if not one.any()]
    if missing:
        raise ValueError(f"no inputs of {', '.join(missing)} were seen; give more texts")
    return found
