"""How much of each inner gradient is in the weights at each token of a piece, (4.8) and (4.9) of mixers.md.

X is an axis for gates by channel, else 1; t and i count tokens of the piece, j the columns: the window's tail, then
the tokens. Products of gates are taken of the gates themselves, so that a γ of 0 and strong decays stay finite.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from atma.ops.fast_weights.pieces import Piece


class Coefficients(NamedTuple):
    """Of A_t, and of S behind the piece."""

    B: Tensor  # (B, H, X, L): of A_s − W°
    G: Tensor  # (B, H, X, L, J): of −e_j z_jᵀ
    f: Tensor | None = None  # (B, H, X, L): of S_s, with momentum
    of_s: Tensor | None = None  # H_{L,s} (B, H, X), of S_s in S
    of_u: Tensor | None = None  # (B, H, X, J), of −e_j z_jᵀ in S


def coefficients(piece: Piece, momentum: bool, forgets: bool = True) -> Coefficients:
    """(4.8) and (4.9), and (4.11)'s of S. `forgets` is false where every γ is 1."""
    B = piece.keep.cumprod(-1) if forgets else piece.keep
    R, theta = products(piece.keep) if forgets else _lower(piece.keep), piece.step[..., None, :]
    if not momentum:
        return Coefficients(B, windowed(R * theta, piece))
    assert piece.momentum is not None
    H, of_s = products(piece.momentum), piece.momentum.cumprod(-1)
    R = R * piece.here[..., None, :]
    f = (R @ of_s[..., None])[..., 0]
    of_u = windowed(H[..., -1:, :] * theta, piece)[..., 0, :]
    return Coefficients(B, windowed(R @ (H * theta), piece), f, of_s[..., -1], of_u)


def products(gate: Tensor) -> Tensor:
    """Π_{i<l≤t} of gates (…, L), (…, L, L): lower triangular with ones on the diagonal."""
    size = gate.shape[-1]
    later = torch.ones(size, size, dtype=torch.bool, device=gate.device).tril(-1)
    return torch.where(later, gate[..., None], 1.0).cumprod(-2).tril()


def _lower(gate: Tensor) -> Tensor:
    """`products` of gates (…, L) of 1."""
    return gate[..., None].expand(*gate.shape, gate.shape[-1]).tril()


def windowed(of_steps: Tensor, piece: Piece) -> Tensor:
    """What multiplies steps u_i (…, L) as it multiplies gradients: times Ω (4.9), (…, J)."""
    if piece.omega is None:
        return of_steps
    size, window = piece.omega.shape[2:]
    step, column = (torch.arange(n, device=of_steps.device) for n in (size, size + window - 1))
    lag = step[:, None] + window - 1 - column
    lags = lag.clamp(0, window - 1).expand(*piece.omega.shape[:2], -1, -1)
    omega = torch.where((lag >= 0) & (lag < window), piece.omega.gather(3, lags), 0.0)
    return of_steps @ omega[:, :, None]
