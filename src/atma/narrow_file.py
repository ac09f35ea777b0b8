"""Narrow weights in a model folder: of a layer `NAME.weight_codes` in 8 or 4 bits and
`NAME.weight_scale`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atma.narrow import CODES, SCALE, narrow_layers, packed, replace
from atma.ops.narrow import GROUP, Codes, Width, widened

if TYPE_CHECKING:
    from atma.model import Model

WEIGHT = ".weight"


def codes_in(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], path: Path) -> dict[str, Codes]:
    """The narrow weights among the tensors of a file, by name, for a model of such shapes.

    ValueError: they are not of these shapes, or not of the types that they are saved in.
    """
    names = [name for name in shapes if name + CODES in tensors and name + SCALE in tensors]
    return {name: _codes(name, tensors, shapes[name], path) for name in names}


def without(tensors: Mapping[str, Tensor], codes: Mapping[str, Codes]) -> dict[str, Tensor]:
    """The other tensors of the file."""
    taken = {name + end for name in codes for end in (CODES, SCALE)}
    return {name: value for name, value in tensors.items() if name not in taken}


def as_floats(codes: Mapping[str, Codes]) -> dict[str, Tensor]:
    """The numbers that they stand for, float32."""
    return {name: widened(one) for name, one in codes.items()}


def put_in(model: "Model", codes: Mapping[str, Codes]) -> None:
    """Give a model its narrow weights as they are."""
    for name, one in codes.items():
        held, layer = packed(one), name.removesuffix(WEIGHT)
        replace(model, layer, held)
        if layer == "embed" and model.config.tied_head:
            replace(model, "head", held)


def tensors_of(model: "Model") -> dict[str, Tensor]:
    """A model's narrow weights as they are saved; one that several layers have, as a head may be the embedding, by the
    first."""
    found, known = dict[str, Tensor](), set[int]()
    for name, layer in narrow_layers(model).items():
        held = layer.held
        if held.scale.data_ptr() not in known:
            known.add(held.scale.data_ptr())
            codes = layer.codes_held
            found |= {name + WEIGHT + CODES: codes.codes, name + WEIGHT + SCALE: codes.scale}
    return found


def _codes(name: str, tensors: Mapping[str, Tensor], shape: torch.Size, path: Path) -> Codes:
    codes, scale = tensors[name + CODES], tensors[name + SCALE]
    outputs, inputs = shape
    groups = -(-inputs // GROUP)
    width: Width
    if codes.dtype == torch.int8:
        width, wanted = "int8", [(outputs, inputs), (outputs,), torch.float32]
    elif codes.dtype == torch.uint8:
        width, wanted = "int4", [(outputs, groups * GROUP // 2), (outputs, groups), torch.bfloat16]
    else:
        raise ValueError(f"{path}: tensor '{name}{CODES}' is {codes.dtype}, neither 8 nor 4 bits: save the model again")
    found = [tuple(codes.shape), tuple(scale.shape), scale.dtype]
    if found != wanted:
        raise ValueError(
            f"{path}: tensor '{name}{CODES}' in {width} is {found}, the config says {wanted}: of another config"
        )
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{path}: tensor '{name}{SCALE}' is not finite: damaged weights")
    return Codes(width, inputs, codes, scale)


__all__ = ["as_floats", "codes_in", "put_in", "tensors_of", "without"]
