"""The convolution written as the window of inputs that each token sees: slow, obvious, differentiable by autograd."""

import torch
from torch import Tensor

from atma.ops.segments import tokens_before


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    batch, _, channels = x.shape
    taps = weight.shape[1]
    tail = x.new_zeros(batch, taps - 1, channels) if tail is None else tail.to(x.dtype)
    windows = torch.cat([tail, x], 1).unfold(1, taps, 1)
    if segment_ids is not None:
        lag = torch.arange(taps - 1, -1, -1, device=x.device)
        windows = windows.masked_fill((lag > tokens_before(segment_ids).unsqueeze(-1))[:, :, None], 0)
    return torch.einsum("btcw,cw->btc", windows, weight)
