"""How a global mixer begins, ready to find what followed a token before: initial values of Canon and of projections."""

import torch
from torch import Tensor, nn


def start_at_previous(taps: Tensor, head_width: int) -> None:
    """Canon taps (G·K, W) such that z + conv(z) is z in each head's lower channels and the previous z in its upper."""
    upper = torch.arange(taps.shape[0]) % head_width >= head_width // 2
    nn.init.zeros_(taps)
    taps[upper, -1], taps[upper, -2] = -1.0, 1.0


def share_projection(q_proj: nn.Linear, keys: Tensor, heads: int, groups: int) -> None:
    """Copy each key head's weights, of (G·K, D), into the first rows, of queries, of the heads that read it."""
    rows = keys.unflatten(0, (groups, -1)).repeat_interleave(heads // groups, 0)
    q_proj.weight.unflatten(0, (heads, -1))[:, : rows.shape[1]] = rows


def start_scaled(alpha: Tensor, out_proj: nn.Linear, generator: torch.Generator | None) -> None:
    """A memory's scale α (D,) at zero, and its output projection (D, inputs) of N(0, 1/inputs), or neither would learn
    (mixers.md, formula 7.1)."""
    nn.init.zeros_(alpha)
    nn.init.normal_(out_proj.weight, 0.0, out_proj.in_features**-0.5, generator=generator)
