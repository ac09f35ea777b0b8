"""The convolution as W shifted multiply-adds, its gradient by hand so that autograd keeps only the inputs."""

import torch
from torch import Tensor

from atma.ops.operator import operator
from atma.ops.segments import tokens_before


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    tail = None if tail is None else tail.to(x.dtype)
    return _operation(x, weight, tail, segment_ids)


def _forward(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    taps, length = weight.shape[1], x.shape[1]
    since = None if segment_ids is None else tokens_before(segment_ids).unsqueeze(-1)
    # y[t] = Σ_lag w[W − 1 − lag] x[t − lag], lag by lag: the last tap is the current token's.
    y = x.contiguous() * weight[:, -1]
    for lag in range(1, taps):
        tap = weight[:, taps - 1 - lag]
        if lag < length:
            term = x[:, :-lag] * tap
            if since is not None:
                # A token less than `lag` from its document's start reads zero there.
                term.masked_fill_(since[:, lag:] < lag, 0)
            y[:, lag:] += term
        if tail is not None:
            reach = min(lag, length)
            # The first `lag` tokens of the call reach into the tail, from its end.
            y[:, :reach] += tail[:, taps - 1 - lag : taps - 1 - lag + reach] * tap
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    taps, length = weight.shape[1], x.shape[1]
    since = None if segment_ids is None else tokens_before(segment_ids).unsqueeze(-1)
    grad = grad.contiguous()
    # The convolution turned round: grad x[t] = Σ_lag w[W − 1 − lag] grad[t + lag], what was masked masked again.
    grad_x = grad * weight[:, -1]
    grad_tail = x.new_zeros(0) if tail is None else tail.new_zeros(tail.shape)
    # grad W by lag: the gradient along the input that its tap met.
    columns = [(grad * x).sum((0, 1))]
    for lag in range(1, taps):
        tap, column = weight[:, taps - 1 - lag], torch.zeros_like(weight[:, 0])
        if lag < length:
            later = grad[:, lag:]
            if since is not None:
                later = later.masked_fill(since[:, lag:] < lag, 0)
            grad_x[:, :-lag] += later * tap
            column += (later * x[:, :-lag]).sum((0, 1))
        if tail is not None:
            reach = min(lag, length)
            before = slice(taps - 1 - lag, taps - 1 - lag + reach)
            # What reached into the tail goes back to it, by the same slice.
            grad_tail[:, before] += grad[:, :reach] * tap
            column += (grad[:, :reach] * tail[:, before]).sum((0, 1))
        columns.append(column)
    # Collected from the last tap to the first.
    return grad_x, torch.stack(columns[::-1], 1), grad_tail


_operation = operator("atma::causal_conv", _forward, _backward, lambda x, *_: x.new_empty(x.shape))
