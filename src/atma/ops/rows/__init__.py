"""Operations on the rows of tokens whose result for a token is the same bits whatever else is in the call.

They are compiled passes where these are there and no gradient is recorded (ops/native/serve.cpp); otherwise `product`
and `row_of` are not to be had, and the others are plain PyTorch, equal up to rounding. Serving stands on
them: what a text reads must not depend on what is served beside it, or on how its tokens were cut into calls. Those
that take `steady` are PyTorch's own to the bit without it, as a model that is not served computes them.

Compiled and without gradients, `causal_conv`, `gated_conv`, `rms_norm`, `gated`, attention over pages and
`gated_delta(steady=True)` are of this kind too. Attention over contiguous keys, a linear layer's own product and the
delta rule in chunks are not: they go by the number of tokens. Nor are PyTorch's exponentials, by a number's place.
"""

import array
import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from atma.ops import native
from atma.ops.backend import backend_for, recording

_ROTATE = "batch heads tokens width pairs x_batch x_head x_token position_batch x position frequency y"


class Packed(NamedTuple):
    """A weight (outputs, inputs) laid out for `product`: panels of neighbouring outputs, the last filled with zeros."""

    panels: Tensor  # (panels, inputs, panel)
    outputs: int


def pack(weight: Tensor) -> Packed:
    """A copy of a weight (outputs, inputs) for `product`. ValueError where the compiled kernels do not take it."""
    if backend_for("auto", weight, "dense") != "native":
        raise ValueError(f"no compiled kernels for {weight.dtype} on {weight.device}")
    library = native.status().library
    assert library is not None
    library.panel_bytes.restype = ctypes.c_int64
    panel = library.panel_bytes() // (8 if weight.dtype == torch.float64 else 4)
    padded = F.pad(weight.detach(), (0, 0, 0, -weight.shape[0] % panel))
    return Packed(padded.unflatten(0, (-1, panel)).transpose(1, 2).contiguous(), weight.shape[0])


def product(x: Tensor, weight: Packed, bias: Tensor | None) -> Tensor:
    """x (…, inputs) · weightᵀ + bias, each output one sum over the inputs in their order. Inference only."""
    x, bias = x.contiguous(), None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((*x.shape[:-1], weight.outputs), dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weight.outputs)
    values = (*sizes, *native.addresses(x, weight.panels, bias, y), torch.get_num_threads())
    native.call("product_rows", x.dtype, "rows inputs outputs x packed bias y threads", values)
    return y


def row_of(index: Tensor, weight: Packed) -> Tensor:
    """Rows (…, inputs) of a packed weight, by index (…) int64 from 0 to its outputs - 1, which is not checked."""
    index = index.contiguous()
    y = torch.empty((*index.shape, weight.panels.shape[1]), dtype=weight.panels.dtype)
    values = (index.numel(), y.shape[-1], *native.addresses(index, weight.panels, y))
    native.call("packed_rows", y.dtype, "n inputs index packed y", values)
    return y


def gate(x: Tensor, opening: Tensor) -> Tensor:
    """x ⊙ σ(opening), both (B, H, T, K), with the heads of a token side by side: (B, T, H·K)."""
    if not _compiled(x) or opening.dtype != x.dtype:
        return (x * torch.sigmoid(opening)).transpose(1, 2).flatten(2)
    return _gate("gate_rows", x, opening)


def gate_heads(x: Tensor, opening: Tensor, steady: bool) -> Tensor:
    """x (B, H, T, K) with the heads of a token side by side, ⊙ σ(opening (B, T, H·K)).

    steady: by the pass of `gate` where it is there, and then in opening's dtype, of x in that or float32.
    """
    if not steady or not _compiled(opening):
        return x.transpose(1, 2).flatten(2) * torch.sigmoid(opening)
    name = "gate_rows" if x.dtype == opening.dtype else "gate_wide_rows"
    x = x if x.dtype == opening.dtype else x.to(_work(opening))
    return _gate(name, x, opening.unflatten(2, (x.shape[1], x.shape[3])).transpose(1, 2))


def unit(x: Tensor, steady: bool) -> Tensor:
    """x (B, H, T, K) / max(‖x‖, 1e-12) over the last axis; steady: compiled where that is there, float32 or wider."""
    if not steady or not _compiled(x):
        return F.normalize(x, dim=-1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape, dtype=_work(x))
    values = (*x.shape, *x.stride()[:3], *native.addresses(x, y), torch.get_num_threads())
    native.call("unit_rows", x.dtype, "batch heads tokens width x_batch x_head x_token x y threads", values)
    return y


def sigmoid(x: Tensor, steady: bool) -> Tensor:
    """1 / (1 + e^−x); steady: compiled where that is there, the same code for every number."""
    return _each("sigmoid_rows", x) if steady and _compiled(x) else torch.sigmoid(x)


def log_sigmoid(x: Tensor, steady: bool) -> Tensor:
    """−log(1 + e^−x); steady: compiled where that is there, the same code for every number."""
    return _each("log_sigmoid_rows", x) if steady and _compiled(x) else F.logsigmoid(x)


def expm1(x: Tensor, steady: bool) -> Tensor:
    """e^x − 1; steady: compiled where that is there, the same code for every number."""
    return _each("expm1_rows", x) if steady and _compiled(x) else torch.expm1(x)


def rotate(x: Tensor, position: Tensor, frequency: Tensor) -> Tensor:
    """x (B, H, T, K) with the first pairs of its halves turned by position (B or 1, T) · frequency (pairs,) float64."""
    if _compiled(x):
        x = x if x.stride(-1) == 1 else x.contiguous()
        y, position = torch.empty(x.shape, dtype=x.dtype), position.to(torch.int32).contiguous()
        by_row = position.shape[1] if position.shape[0] > 1 else 0
        places = native.addresses(x, position, frequency, y)
        native.call("rotate", x.dtype, _ROTATE, (*x.shape, len(frequency), *x.stride()[:3], by_row, *places))
        return y
    angle = position[:, None, :, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    (left, right), pairs = x.chunk(2, -1), len(frequency)
    x1, x2 = left[..., :pairs], right[..., :pairs]
    turned = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    return torch.cat([turned[0], left[..., pairs:], turned[1], right[..., pairs:]], -1)


def largest(x: Tensor) -> Tensor:
    """Where each row of x (N, V), float32 or float64, is largest (N,) int64, the first of equals; −1 where that is not
    finite, or a number of the row is NaN. Inference only."""
    if not _compiled(x):
        top = x.max(-1)
        return torch.where(top.values.isfinite(), top.indices, -1)
    x = x if x.stride(-1) == 1 else x.contiguous()
    y = torch.empty(x.shape[0], dtype=torch.int64)
    native.call("largest", x.dtype, "rows width x_row x y", (*x.shape, x.stride(0), *native.addresses(x, y)))
    return y


def forbid(x: Tensor, held: Sequence[tuple[int, np.ndarray]]) -> None:
    """−inf in place in some rows of x (N, V), float32 or float64, where a bit is 0: `held` are rows and their bits
    (⌈V / 32⌉,) uint32, the first ones lowest."""
    if _compiled(x) and x.stride(-1) == 1:
        flat = array.array("q", [number for row, bits in held for number in (row, bits.ctypes.data)])
        values = (len(held), x.shape[1], x.stride(0), flat.buffer_info()[0], *native.addresses(x))
        native.call("forbid", x.dtype, "count width x_row held x", values)
        return
    for row, bits in held:
        allowed = np.unpackbits(bits.view(np.uint8), count=x.shape[1], bitorder="little")
        x[row].masked_fill_(torch.from_numpy(allowed == 0).to(x.device), -torch.inf)


def _gate(name: str, x: Tensor, opening: Tensor) -> Tensor:
    x, opening = x.contiguous(), opening if opening.stride(-1) == 1 else opening.contiguous()
    y = torch.empty((x.shape[0], x.shape[2], x.shape[1] * x.shape[3]), dtype=opening.dtype)
    fields = "batch heads tokens width gate_batch gate_head gate_token x gate y"
    native.call(name, y.dtype, fields, (*x.shape, *opening.stride()[:3], *native.addresses(x, opening, y)))
    return y


def _each(name: str, x: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    native.call(name, x.dtype, "n x y", (x.numel(), *native.addresses(x, y)))
    return y


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _compiled(x: Tensor) -> bool:
    return not recording() and backend_for("auto", x, "dense") == "native"


__all__ = [
    "Packed",
    "expm1",
    "gate",
    "gate_heads",
    "largest",
    "log_sigmoid",
    "pack",
    "product",
    "rotate",
    "row_of",
    "sigmoid",
    "unit",
]
