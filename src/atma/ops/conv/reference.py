"""The convolution written as a (T, T) band matrix per channel: slow, obvious, differentiable by autograd."""

import torch
from torch import Tensor


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    batch, length, channels = x.shape
    taps = weight.shape[1]
    tail = x.new_zeros(batch, taps - 1, channels) if tail is None else tail
    inputs = torch.cat([tail, x], 1)
    lag = torch.arange(length)[:, None] + taps - 1 - torch.arange(length + taps - 1)[None, :]
    seen = ((lag >= 0) & (lag < taps)).to(x.device).expand(batch, -1, -1)
    if segment_ids is not None:
        before = segment_ids.new_full((batch, taps - 1), -1)
        seen = seen & (segment_ids[:, :, None] == torch.cat([before, segment_ids], 1)[:, None, :])
    band = weight.flip(1)[:, lag.clamp(0, taps - 1).to(x.device)]
    return torch.einsum("cts,bts,bsc->btc", band, seen.to(x.dtype), inputs)
