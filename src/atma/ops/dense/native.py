"""The compiled kernels of ops/native/dense.cpp and rounds.cpp: float32, float64 and bfloat16, on the CPU."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.operator import operator

_NORM = "rows width x weight y epsilon threads"
_NORM_BACKWARD = "rows width x weight grad grad_x grad_weight epsilon threads"


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Inference only. Every weight is read once, whatever the number of rows."""
    x, weight = x.contiguous(), weight.contiguous()  # held by name: the kernel gets addresses alone
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weight.shape[0])
    values = (*sizes, *native.addresses(x, weight, bias, y), torch.get_num_threads())
    native.call("linear", x.dtype, "rows inputs outputs x weight bias y threads", values)
    return y


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float, low: torch.dtype) -> Tensor:
    """low: x's dtype, or bfloat16; without gradients any. With them x and the weight are kept."""
    if recording():
        wide = None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float32))
        return _norm(x, wide, epsilon, low != x.dtype)
    x, weight = x.contiguous(), None if weight is None else weight.to(x.dtype).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    _call_norm("rms_norm", _NORM, (x, weight, y), epsilon)
    return y.to(low)


def _norm_forward(x: Tensor, weight: Tensor | None, epsilon: float, lowered: bool) -> Tensor:
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16 if lowered else x.dtype)
    name = "norm_forward_lowered" if lowered else "norm_forward"
    _call_norm(name, _NORM, (x, weight, y), epsilon)
    return y


def _norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, epsilon: float, lowered: bool
) -> tuple[Tensor, Tensor]:
    x, grad, weight = x.contiguous(), grad.contiguous(), None if weight is None else weight.contiguous()
    grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype), _like_weight(x, weight)
    name, written = "norm_backward_lowered" if lowered else "norm_backward", None if weight is None else grad_weight
    _call_norm(name, _NORM_BACKWARD, (x, weight, grad, grad_x, written), epsilon)
    return grad_x, grad_weight


def _call_norm(name: str, fields: str, tensors: tuple[Tensor | None, ...], epsilon: float) -> None:
    x = tensors[0]
    assert x is not None
    sizes = (x.numel() // x.shape[-1], x.shape[-1])
    native.call(name, x.dtype, fields, (*sizes, *native.addresses(*tensors), epsilon, torch.get_num_threads()))


def _like_weight(x: Tensor, weight: Tensor | None) -> Tensor:
    return x.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)


def gated(h: Tensor, kind: str) -> Tensor:
    """Of h (…, 2F); keeps only h for its gradient."""
    return _gate(h, kind)


def _gate_forward(h: Tensor, kind: str) -> Tensor:
    y = torch.empty((*h.shape[:-1], h.shape[-1] // 2), dtype=h.dtype)
    _call_gate(f"gate_{kind}_forward", h, None, y)
    return y


def _gate_backward(grad: Tensor, h: Tensor, kind: str) -> Tensor:
    grad_h = torch.empty(h.shape, dtype=h.dtype)
    _call_gate(f"gate_{kind}_backward", h, grad.contiguous(), grad_h)
    return grad_h


def _call_gate(name: str, h: Tensor, grad: Tensor | None, y: Tensor) -> None:
    h, width = h.contiguous(), h.shape[-1] // 2
    values = (h.numel() // (2 * width), width, *native.addresses(h, grad, y), torch.get_num_threads())
    native.call(name, h.dtype, "rows width h grad y threads", values)


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    """For float32 and float64; without gradients."""
    gram, factor = gram.contiguous(), torch.empty(gram.shape, dtype=gram.dtype)
    sizes = (gram.numel() // max(1, gram.shape[-1] ** 2), gram.shape[-1], turns)
    values = (*sizes, *native.addresses(gram, factor), *coefficients, torch.get_num_threads())
    native.call("newton_schulz", gram.dtype, "count size turns gram factor a b c threads", values)
    return factor


_gate = operator(
    "atma::gated_native",
    _gate_forward,
    _gate_backward,
    lambda h, _kind: h.new_empty((*h.shape[:-1], h.shape[-1] // 2)),
)
_norm = operator(
    "atma::rms_norm_native",
    _norm_forward,
    _norm_backward,
    lambda x, _weight, _epsilon, lowered: x.new_empty(x.shape, dtype=torch.bfloat16 if lowered else x.dtype),
)
