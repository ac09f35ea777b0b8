"""The convolution by the compiled kernel (ops/native/conv.cpp), on the CPU: one pass over its inputs."""

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording
from atma.ops.segments import tokens_before

LANES = 16
"""Channels come in multiples of this for the gated convolution: a vector of the widest machine."""


def gated_conv(h: Tensor, weight: Tensor, segment_ids: Tensor | None) -> Tensor:
    return (_gated if recording() else _gated_forward)(h, weight, segment_ids)


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    return (_operation if recording() else _forward)(x, weight, tail, segment_ids)


def _forward(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype)
    _call("conv_forward", (x, weight, tail, segment_ids), (None, y, None, None, None))
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x, grad_weight = (torch.empty(z.shape, dtype=x.dtype) for z in (x, weight))
    grad_tail = x.new_empty(0) if tail is None else torch.empty(tail.shape, dtype=x.dtype)
    written = (grad_x, None, grad_weight, None if tail is None else grad_tail)
    _call("conv_backward", (x, weight, tail, segment_ids), (grad.contiguous(), *written))
    return grad_x, grad_weight, grad_tail


def _call(name: str, inputs: tuple[Tensor | None, ...], outputs: tuple[Tensor | None, ...]) -> None:
    """Hand over a Convolution of conv.cpp."""
    x, weight, tail, segment_ids = inputs
    assert x is not None and weight is not None
    x = x if x.stride(-1) == 1 else x.contiguous()
    tail = None if tail is None else tail.to(x.dtype).contiguous()
    since = None if segment_ids is None else tokens_before(segment_ids)
    tensors = (x, weight.contiguous(), tail, since, *outputs)
    places = [0 if z is None else z.data_ptr() for z in tensors]
    native.call(name, x.dtype, (*x.shape, weight.shape[1], *x.stride()[:2], *places, torch.get_num_threads()))


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
    """Hand over a Gated of conv.cpp."""
    h, weight = h.contiguous(), weight.contiguous()
    since = None if segment_ids is None else tokens_before(segment_ids)
    places = [0 if x is None else x.data_ptr() for x in (h, weight, since, *rest)]
    native.call(name, h.dtype, (*h.shape[:2], *weight.shape, *places, torch.get_num_threads()))


_operation = torch.library.custom_op("atma::causal_conv_native", _forward, mutates_args=())
_gradient_operation = torch.library.custom_op("atma::causal_conv_native_backward", _backward, mutates_args=())


@_operation.register_fake
def _(x, weight, tail, segment_ids):
    return x.new_empty(x.shape)


@_gradient_operation.register_fake
def _(grad, x, weight, tail, segment_ids):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), x.new_empty(0 if tail is None else tail.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor):
    inputs = ctx.saved_tensors  # read once: under activation checkpointing they are computed again for it
    grad_x, grad_weight, grad_tail = _gradient_operation(grad, *inputs)
    return grad_x, grad_weight, None if inputs[2] is None else grad_tail, None


_operation.register_autograd(_gradient, setup_context=_save)

_gated = torch.library.custom_op("atma::gated_conv_native", _gated_forward, mutates_args=())
_gated_gradient_operation = torch.library.custom_op(
    "atma::gated_conv_native_backward", _gated_backward, mutates_args=()
)


@_gated.register_fake
def _(h, weight, segment_ids):
    return h.new_empty((*h.shape[:2], h.shape[2] // 3))


@_gated_gradient_operation.register_fake
def _(grad, h, weight, segment_ids):
    return h.new_empty(h.shape), weight.new_empty(weight.shape)


def _gated_gradient(ctx, grad: Tensor):
    return *_gated_gradient_operation(grad, *ctx.saved_tensors), None


_gated.register_autograd(_gated_gradient, setup_context=_save)
