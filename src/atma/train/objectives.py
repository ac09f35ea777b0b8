"""Optional terms of the loss on the residual stream: pull its samples towards a wanted distribution.

Each regulariser is a function of N samples of width D, (N, D), and a generator, and returns a scalar ≥ 0. They are the
four of the published sweep (maths.md, section 6; Weak-SIGReg 2603.05924, LeJEPA 2511.08544). The model knows nothing of
them: `residual_stream` listens at the blocks.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from atma.model import Model

SKETCH_WIDTH = 64
_DIRECTIONS = 64
_HALF_POINTS = 9
_REACH = 5.0
_TINY = 1e-8

Regulariser = Callable[[Tensor, torch.Generator], Tensor]


def weak(samples: Tensor, generator: torch.Generator) -> Tensor:
    """‖cov(Sx) − I‖_F of a random sketch S to 64 channels, entries N(0, 1)/√D: zero when the sketch is white."""
    width = samples.size(-1)
    sketch = _normal((width, SKETCH_WIDTH), samples, generator) / width**0.5
    seen = samples @ sketch
    seen = seen - seen.mean(0)
    covariance = seen.mT @ seen / max(len(seen) - 1, 1)
    return torch.linalg.matrix_norm(covariance - torch.eye(SKETCH_WIDTH).to(covariance))


def strong(samples: Tensor, generator: torch.Generator) -> Tensor:
    """Mismatch of the characteristic function with that of N(0, 1) along 64 random directions, times N.

    ∫ |φ(t) − e^{−t²/2}|² e^{−t²/2} dt over 17 points t ∈ [−5, 5] by trapezoids, averaged over directions. The integrand
    is even, so the 9 points t ≥ 0 carry it; they are walked one at a time, which keeps (N, 64) the largest tensor.
    """
    directions = _normal((samples.size(-1), _DIRECTIONS), samples, generator)
    seen = samples @ (directions / directions.norm(dim=0))
    step = _REACH / (_HALF_POINTS - 1)
    total = seen.new_zeros(())
    for i in range(1, _HALF_POINTS):
        point = torch.tensor(i * step, dtype=seen.dtype, device=seen.device)
        target = torch.exp(-(point**2) / 2)
        gap = (torch.cos(point * seen).mean(0) - target) ** 2 + torch.sin(point * seen).mean(0) ** 2
        total = total + (1 if i == _HALF_POINTS - 1 else 2) * step * target * gap.mean()
    return total * len(samples)


def discrete(samples: Tensor, generator: torch.Generator) -> Tensor:
    """`weak` on rows scaled to norm √D: only directions matter."""
    return weak(_unit(samples) * samples.size(-1) ** 0.5, generator)


def zipfian(samples: Tensor, generator: torch.Generator) -> Tensor:
    """Orthogonal directions with Zipf-distributed lengths: RMS cosine between samples plus the distance of row norms.

    The second part is ‖p − z‖ of the sorted row norms p and z ∝ 1/rank, each summing to 1. The off-diagonal norm of
    the (N, N) Gram matrix of directions comes from the (D, D) one, and is divided by √(N(N−1)) so that it does not
    grow with the batch. `generator` is not drawn from.
    """
    count = len(samples)
    unit = _unit(samples)
    squares = (unit.mT @ unit).square().sum() - unit.square().sum(-1).square().sum()
    cosine = (squares.clamp(min=0) / max(count * (count - 1), 1) + _TINY**2).sqrt()
    norms = samples.norm(dim=-1).sort(descending=True).values
    zipf = 1 / torch.arange(1, count + 1, dtype=samples.dtype, device=samples.device)
    return cosine + torch.linalg.vector_norm(norms / (norms.sum() + _TINY) - zipf / zipf.sum())


def regulariser(name: str) -> Regulariser:
    """The regulariser of that name in a recipe."""
    known: dict[str, Regulariser] = {"weak": weak, "strong": strong, "discrete": discrete, "zipfian": zipfian}
    if name not in known:
        raise ValueError(f"no regulariser '{name}'; known: none, {', '.join(known)}")
    return known[name]


@contextlib.contextmanager
def residual_stream(model: Model) -> Iterator[list[Tensor]]:
    """Collect the output (B, T, D) of each block, in order, of the forward passes run inside."""
    seen: list[Tensor] = []

    def listen(_module: object, _inputs: object, output: object) -> None:
        value = output[0] if isinstance(output, tuple) else output
        assert isinstance(value, Tensor)
        seen.append(value)

    hooks = [block.register_forward_hook(listen) for block in model.blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def regularise(name: str, stream: list[Tensor], generator: torch.Generator) -> Tensor:
    """The regulariser averaged over the blocks of `stream`, in float32 whatever the compute type."""
    penalty = regulariser(name)
    with torch.autocast(stream[0].device.type, enabled=False):
        terms = [penalty(value.float().flatten(0, -2), generator) for value in stream]
    return torch.stack(terms).mean()


def _unit(samples: Tensor) -> Tensor:
    return samples / samples.norm(dim=-1, keepdim=True).clamp(min=_TINY)


def _normal(shape: tuple[int, int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype).to(like.device)
