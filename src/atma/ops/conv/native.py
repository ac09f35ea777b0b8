"""The convolution by the compiled kernel (ops/native/conv.cpp), on the CPU: one pass over its inputs."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.operator import operator
from atma.ops.segments import tokens_before

_CONVOLUTION = "batch length channels taps x_batch x_token x weight tail since grad y grad_weight grad_tail threads"
_GATED = "batch length channels taps h weight since grad y grad_h grad_weight threads"


def gated_conv(h: Tensor, weight: Tensor, segment_ids: Tensor | None) -> Tensor:
    return _gated(h, weight, segment_ids)


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    return _operation(x, weight, tail, segment_ids)


def _forward(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    _call("conv_forward", (x, weight, tail, segment_ids), (None, y, None, None))
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = (torch.empty(z.shape, dtype=x.dtype) for z in (x, weight))
    grad_tail = x.new_empty(0) if tail is None else torch.empty(tail.shape, dtype=x.dtype)
    written = (grad_x, grad_weight, None if tail is None else grad_tail)
    _call("conv_backward", (x, weight, tail, segment_ids), (grad.contiguous(), *written))
    return grad_x, grad_weight, grad_tail


def _call(name: str, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    x, weight, tail, segment_ids = inputs
    assert x is not None and weight is not None
    x = x if x.stride(-1) == 1 else x.contiguous()
    tail = None if tail is None else tail.to(x.dtype).contiguous()
    since = None if segment_ids is None else tokens_before(segment_ids)
    weight = weight.contiguous()
    places = native.addresses(x, weight, tail, since, *outputs)
    values = (*x.shape, weight.shape[1], *x.stride()[:2], *places, torch.get_num_threads())
    native.call(name, x.dtype, _CONVOLUTION, values)


def _gated_forward(h: Tensor, weight: Tensor, segment_ids: Tensor | None) -> Tensor:
    y = torch.empty((*h.shape[:2], h.shape[2] // 3), dtype=h.dtype)
    _call_gated("gated_conv_forward", h, weight, segment_ids, (None, y, None, None))
    return y


def _gated_backward(grad: Tensor, h: Tensor, weight: Tensor, segment_ids: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_h, grad_weight = (torch.empty(x.shape, dtype=h.dtype) for x in (h, weight))
    _call_gated("gated_conv_backward", h, weight, segment_ids, (grad.contiguous(), None, grad_h, grad_weight))
    return grad_h, grad_weight


def _call_gated(
    name: str, h: Tensor, weight: Tensor, segment_ids: Tensor | None, rest: tuple[Tensor | None, ...]
) -> None:
    h, weight = h.contiguous(), weight.contiguous()
    since = None if segment_ids is None else tokens_before(segment_ids)
    places = native.addresses(h, weight, since, *rest)
    native.call(name, h.dtype, _GATED, (*h.shape[:2], *weight.shape, *places, torch.get_num_threads()))


_operation = operator("atma::causal_conv_native", _forward, _backward, lambda x, *_: x.new_empty(x.shape))
_gated = operator(
    "atma::gated_conv_native",
    _gated_forward,
    _gated_backward,
    lambda h, *_: h.new_empty((*h.shape[:2], h.shape[2] // 3)),
)
