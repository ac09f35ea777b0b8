"""The compiled kernels of ops/native/dense.cpp: float32, float64 and bfloat16, on the CPU."""

import struct

import torch
from torch import Tensor

from atma.ops import native
from atma.ops.backend import recording


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Inference only. Every weight is read once, whatever the number of rows."""
    x, weight = x.contiguous(), weight.contiguous()  # held by name: the kernel gets addresses alone
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = torch.empty((*x.shape[:-1], weight.shape[0]), dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1], weight.shape[0], x.shape[-1])
    native.call("linear", x.dtype, (*sizes, *_places(x, weight, bias, y), torch.get_num_threads()))
    return y


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Inference only."""
    x, weight = x.contiguous(), None if weight is None else weight.to(x.dtype).contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    sizes = (x.numel() // x.shape[-1], x.shape[-1])
    bits = struct.unpack("q", struct.pack("d", epsilon))[0]
    native.call("rms_norm", x.dtype, (*sizes, *_places(x, weight, y), bits, torch.get_num_threads()))
    return y


def gated_square(h: Tensor) -> Tensor:
    """Of h (…, 2F); keeps only h for its gradient."""
    return (_gate if recording() else _gate_forward)(h)


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


def _places(*tensors: Tensor | None) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


_gate = torch.library.custom_op("atma::gated_square_native", _gate_forward, mutates_args=())
_gate_gradient = torch.library.custom_op("atma::gated_square_native_backward", _gate_backward, mutates_args=())


@_gate.register_fake
def _(h):
    return h.new_empty((*h.shape[:-1], h.shape[-1] // 2))


@_gate_gradient.register_fake
def _(grad, h):
    return h.new_empty(h.shape)


def _save(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradient(ctx, grad: Tensor):
    return _gate_gradient(grad, *ctx.saved_tensors)


_gate.register_autograd(_gradient, setup_context=_save)
