"""Newton–Schulz rounds, which bring the singular values of a matrix near 1 (Muon; mixers.md, section 4.3)."""

import torch
from torch import Tensor

ROUNDS = {
    "muon": ((3.4445, -4.7750, 2.0315),) * 5,
    "lact": (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
}
"""(a, b, c) of each round, by schedule."""


def newton_schulz(matrix: Tensor, schedule: str = "muon") -> Tensor:
    """NS of matrices (…, rows, columns): X = S/(‖S‖ + 1e-7), then X ← a X + (b G + c G²) X with G = X Xᵀ, five times.

    Of 0 it is 0, with a finite gradient. schedule: "muon", or LaCT's "lact". float32 or wider.
    """
    if schedule not in ROUNDS:
        raise ValueError(f"schedule must be one of {', '.join(ROUNDS)}, not {schedule!r}")
    x = matrix / (torch.linalg.vector_norm(matrix, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in ROUNDS[schedule]:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
