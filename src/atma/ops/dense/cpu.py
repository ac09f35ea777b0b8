"""PyTorch's own operations, on any device and for any dtype."""

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In float32, and rounded after, where bfloat16 is widened: up to nine times sooner than PyTorch's bfloat16."""
    if not widens(x):
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def widens(x: Tensor) -> bool:
    """Whether x is bfloat16 on a processor that has no products of it."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether PyTorch's products of bfloat16 are the processor's own; outside of x86 they are taken to be."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def rms_norm(x: Tensor, weight: Tensor | None, width: int, epsilon: float, low: torch.dtype) -> Tensor:
    return F.rms_norm(x, (width,), None if weight is None else weight.to(x.dtype), epsilon).to(low)


def gated(h: Tensor, kind: str) -> Tensor:
    a, g = h.chunk(2, -1)
    if kind == "square":
        return g * F.relu(a).square()
    return g * (F.silu(a) if kind == "silu" else F.gelu(a, approximate="tanh"))


def newton_schulz(gram: Tensor, coefficients: tuple[float, float, float], turns: int) -> Tensor:
    (a, b, c), factor = coefficients, None
    add_product = torch.addmm if gram.ndim == 2 else torch.baddbmm
    for turn in range(turns):
        polynomial = add_product(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        factor = polynomial if factor is None else polynomial @ factor
        if turn + 1 < turns:
            gram = polynomial @ gram @ polynomial
    assert factor is not None
    return factor
