"""Products of weights in 8 and 4 bits: a quarter and an eighth of the bytes that a step of few rows waits for.

"int8" is a scale an output and whole numbers from −127 to 127; "int4" a scale for each 32 inputs of an output and whole
numbers from −8 to 7, two a byte. A row that is multiplied is rounded to 8 bits too: by one scale, or one for each 32
inputs. Products are summed as integers, and 4 bits' groups in their order, so a row's result is the same bits whatever
else is in the call and however many threads there are. For reading alone: there are no gradients.
"""

import ctypes
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops import native
from atma.ops.backend import backend_for, recording
from atma.ops.narrow import reference

Width = Literal["int8", "int4"]
"""What a number of a weight is stored as."""
WIDTHS: tuple[str, ...] = get_args(Width)
GROUP = reference.GROUP
DTYPES = (torch.float32, torch.bfloat16)
"""What the rows that are multiplied may be."""
MOST_INPUTS = 1 << 17
"""Whose products of 8 bits an integer of 32 bits can always sum."""
_NOTHING = 0x88
"""Two numbers of 4 bits that are 0."""
_FIELDS_8 = "rows inputs outputs x packed scale sums bias y threads"
_FIELDS_4 = "rows inputs outputs x packed scale bias y threads"


class Codes(NamedTuple):
    """A weight (outputs, inputs) as it is saved."""

    width: Width
    inputs: int
    codes: Tensor
    """int8 (O, I); for int4 uint8 (O, 16 ⌈I / 32⌉), of a byte the lower half first, beyond the inputs 8, which is 0."""
    scale: Tensor
    """float32 (O,); for int4 bfloat16 (O, ⌈I / 32⌉)."""

    @property
    def outputs(self) -> int:
        """Rows of the weight."""
        return self.codes.shape[0]


class Packed(NamedTuple):
    """The same laid out for `product` on this processor."""

    width: Width
    inputs: int
    outputs: int
    panels: Tensor
    scale: Tensor
    sums: Tensor
    """Of int8 for each output Σ of its numbers, int32; of int4 empty."""


def quantised(weight: Tensor, width: Width) -> Codes:
    """A weight (outputs, inputs) to the nearest in 8 or 4 bits. ValueError: it is too wide, or not finite."""
    if weight.shape[1] > MOST_INPUTS:
        raise ValueError(f"a weight of {weight.shape[1]:,} inputs is too wide for {width}; {MOST_INPUTS:,} at most")
    if not bool(weight.isfinite().all()):
        raise ValueError(f"weights that are not finite cannot be written in {width}; check the model")
    made = reference.in_8_bits(weight.float()) if width == "int8" else reference.in_4_bits(weight.float())
    return Codes(width, weight.shape[1], *made)


def widened(weight: Codes) -> Tensor:
    """The numbers that codes stand for, float32 (O, I)."""
    made = reference.from_8_bits if weight.width == "int8" else reference.from_4_bits
    return made(weight.codes, weight.scale, weight.inputs)


def pack(weight: Codes) -> Packed | None:
    """A copy for the compiled kernels; None where there are none, and `reference` multiplies codes as they are."""
    if backend_for("auto", weight.codes.new_empty(0, dtype=torch.float32), "dense") != "native":
        return None
    return _pack_8(weight) if weight.width == "int8" else _pack_4(weight)


def unpack(weight: Packed) -> Codes:
    """What `pack` was given."""
    if weight.width == "int8":
        codes = weight.panels.transpose(1, 2).flatten(2).flatten(0, 1)[: weight.outputs, : weight.inputs]
        return Codes("int8", weight.inputs, codes.contiguous(), weight.scale[: weight.outputs].clone())
    halves = torch.stack([weight.panels & 15, weight.panels >> 4], 4)  # (panels, groups, 4, lanes, 2, 4)
    numbers = halves.permute(0, 3, 1, 2, 4, 5).flatten(2).flatten(0, 1)[: weight.outputs]
    scale = weight.scale.transpose(1, 2).flatten(0, 1)[: weight.outputs].contiguous()
    return Codes("int4", weight.inputs, numbers[:, ::2] | numbers[:, 1::2] << 4, scale)


def product(x: Tensor, weight: Codes | Packed, bias: Tensor | None) -> Tensor:
    """x (…, I) float32 or bfloat16, each row rounded to 8 bits, · weightᵀ + bias (O,); in x's dtype (…, O).

    A row that is not finite gives NaN, and other rows nothing of it. ValueError: a gradient is recorded, or x is of
    another dtype or on another device than the CPU.
    """
    _check(x, weight.width)
    if isinstance(weight, Codes):
        return reference.product(x, weight.codes, weight.scale, bias)
    x, bias = x.contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((*x.shape[:-1], weight.outputs), dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], weight.inputs, weight.outputs)
    if weight.width == "int8":
        places = native.addresses(x, weight.panels, weight.scale, weight.sums, bias, y)
        native.call("narrow8", x.dtype, _FIELDS_8, (*sizes, *places, torch.get_num_threads()))
    else:
        places = native.addresses(x, weight.panels, weight.scale, bias, y)
        native.call("narrow4", x.dtype, _FIELDS_4, (*sizes, *places, torch.get_num_threads()))
    return y


def row_of(index: Tensor, weight: Codes | Packed, dtype: torch.dtype) -> Tensor:
    """Rows (…, I) of the weight by index (…) int64, from 0 to its outputs − 1, which is not checked."""
    if isinstance(weight, Codes):
        rows = weight._replace(codes=weight.codes[index.flatten()], scale=weight.scale[index.flatten()])
        return widened(rows).to(dtype).unflatten(0, index.shape)
    index = index.contiguous()
    y = torch.empty((*index.shape, weight.inputs), dtype=dtype)
    places = native.addresses(index, weight.panels, weight.scale, y)
    native.call(
        "chosen8" if weight.width == "int8" else "chosen4",
        dtype,
        "n inputs index packed scale y",
        (index.numel(), weight.inputs, *places),
    )
    return y


def _pack_8(weight: Codes) -> Packed:
    panel, depth = _size("narrow8_panel"), _size("narrow8_depth")
    codes = F.pad(weight.codes, (0, -weight.inputs % 4, 0, -weight.outputs % panel))
    panels = codes.unflatten(0, (-1, panel)).unflatten(2, (-1, depth)).transpose(1, 2).contiguous()
    scale = F.pad(weight.scale, (0, len(codes) - weight.outputs))
    return Packed("int8", weight.inputs, weight.outputs, panels, scale, codes.sum(1, dtype=torch.int32))


def _pack_4(weight: Codes) -> Packed:
    """Panels (panels, groups, 4, lanes, 4): of 8 inputs the first four in the lower halves of bytes."""
    lanes = _size("narrow4_panel")
    codes = F.pad(weight.codes, (0, 0, 0, -weight.outputs % lanes), value=_NOTHING)
    numbers = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    eights = numbers.view(-1, lanes, numbers.shape[1] // GROUP, 4, 2, 4).permute(0, 2, 3, 1, 5, 4)
    scale = F.pad(weight.scale, (0, 0, 0, -weight.outputs % lanes)).unflatten(0, (-1, lanes)).transpose(1, 2)
    panels = (eights[..., 0] | eights[..., 1] << 4).contiguous()
    return Packed("int4", weight.inputs, weight.outputs, panels, scale.contiguous(), panels.new_empty(0))


def _size(name: str) -> int:
    library = native.status().library
    assert library is not None
    function = getattr(library, name)
    function.restype = ctypes.c_int64
    return function()


def _check(x: Tensor, width: str) -> None:
    if x.device.type != "cpu" or x.dtype not in DTYPES:
        told = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"weights in {width} multiply float32 and bfloat16 on the CPU, not {told} on {x.device}")
    if recording() and x.requires_grad:
        raise ValueError(f"weights in {width} have no gradients; load the model without them to train it")


__all__ = [
    "DTYPES",
    "GROUP",
    "WIDTHS",
    "Codes",
    "Packed",
    "Width",
    "pack",
    "product",
    "quantised",
    "row_of",
    "unpack",
    "widened",
]
