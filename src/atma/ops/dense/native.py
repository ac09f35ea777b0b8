"""The compiled kernels of ops/native/dense.cpp and rounds.cpp: float32, float64 and bfloat16, on the CPU."""

import struct

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.operator import operator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Inference only. Every weight is read once, whatever the number of rows."""
    x, weight = x.contiguous(), weight.contiguous()  # held by name: the kernel gets addresses alone
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weight.shape[0], x.shape[-1])
    native.call("linear", x.dtype, (*sizes, *_places(x, weight, bias, y), torch.get_num_threads()))
    return y


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float, low: torch.dtype) -> Tensor:
    """low: x's dtype, or bfloat16; without gradients any. With them x and the weight are kept."""
    if recording():
        wide = None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float32))
        return _norm(x, wide, epsilon, low != x.dtype)
    x, weight = x.contiguous(), None if weight is None else weight.to(x.dtype).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = (x.numel() // width, width)
    native.call("rms_norm", x.dtype, (*sizes, *_places(x, weight, y), _bits(epsilon), torch.get_num_threads()))
    return y.to(low)


def _norm_forward(x: Tensor, weight: Tensor | None, epsilon: float, lowered: bool) -> Tensor:
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16 if lowered else x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1])
    name = "norm_forward_lowered" if lowered else "norm_forward"
    native.call(name, x.dtype, (*sizes, *_places(x, weight, y), _bits(epsilon), torch.get_num_threads()))
    return y


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float, lowered: bool
) -> tuple[Tensor, Tensor]:
    x, grad, weight = x.contiguous(), grad.contiguous(), None if weight is None else weight.contiguous()
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype), _like_weight(x, weight)
    sizes = (x.numel() // x.shape[-1], x.shape[-1])
    places = _places(x, weight, grad, grad_x, None if weight is None else grad_weight)
    name = "norm_backward_lowered" if lowered else "norm_backward"
    native.call(name, x.dtype, (*sizes, *places, _bits(epsilon), torch.get_num_threads()))
    return grad_x, grad_weight


def _like_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)


def gated_square(h: Tensor) -> Tensor:
    """Of h (…, 2F); keeps only h for its gradient."""
    return _gate(h)


def _gate_forward(h: Tensor) -> Tensor:
    y = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype)
    _call_gate("gate_forward", h, None, y)
    return y


def _gate_backward(grad: Tensor, h: Tensor) -> Tensor:
    grad_h = torch.empty(h.shape, dtype=h.dtype)
    _call_gate("gate_backward", h, grad.contiguous(), grad_h)
    return grad_h


def _call_gate(name: str, h: Tensor, grad: Tensor | None, y: Tensor) -> None:
    h, width = h.contiguous(), h.shape[-1] // 2
    native.call(name, h.dtype, (h.numel() // (2 * width), width, *_places(h, grad, y), torch.get_num_threads()))


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    """For float32 and float64; without gradients."""
    gram, factor = gram.contiguous(), torch.empty(gram.shape, dtype=gram.dtype)
    sizes = (gram.numel() // max(1, gram.shape[-1] ** 2), gram.shape[-1], turns)
    numbers = (*(_bits(x) for x in coefficients), torch.get_num_threads())
    native.call("newton_schulz", gram.dtype, (*sizes, *_places(gram, factor), *numbers))
    return factor


def _bits(x: float) -> int:
    """Of a double."""
    return struct.unpack("q", struct.pack("d", x))[0]


def _places(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


_gate = operator(
    "atma::gated_square_native",
    _gate_forward,
    _gate_backward,
    lambda h: h.new_empty((*h.shape[:-1], h.shape[-1] // 2)),
)
_norm = operator(
    "atma::rms_norm_native",
    _norm_forward,
    _norm_backward,
    lambda x, _weight, _epsilon, lowered: x.new_empty(x.shape, dtype=torch.bfloat16 if lowered else x.dtype),
)
