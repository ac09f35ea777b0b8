"""The convolution written as a (T, T) band matrix per channel: slow, obvious, differentiable by autograd."""

import torch
from torch import Tensor

from atma.ops.segments import tokens_before


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    tail = x.new_zeros(batch, taps - 1, channels) if tail is None else tail.to(x.dtype)
    inputs = torch.cat([tail, x], 1)
    at = torch.arange(length + taps - 1, device=x.device)
    lag = at[:length, None] + taps - 1 - at
    seen = ((lag >= 0) & (lag < taps)).expand(batch, -1, -1)
    if segment_ids is not None:
        seen = seen & (lag <= tokens_before(segment_ids)[:, :, None])
    band = weight.flip(1)[:, lag.clamp(0, taps - 1)]
    return torch.einsum("cts,bts,bsc->btc", band, seen.to(x.dtype), inputs)
