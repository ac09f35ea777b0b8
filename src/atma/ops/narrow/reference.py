"""Weights in 8 and 4 bits in plain PyTorch: how they are made, and products whose integers are summed exactly."""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 32
"""Inputs that have a scale of their own in 4 bits."""
LEAST = 1e-30
"""What is smaller than this everywhere is a row of zeros."""
TRIED = torch.linspace(0.7, 1.1, 21)
"""Of the scale that takes the largest number of a group in: the one with the least squared error is kept."""


def in_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 (O, I) and scales float32 (O,) of a weight float32 (O, I)."""
    scale = weight.abs().amax(1) / 127
    return (weight / scale.clamp(min=LEAST)[:, None]).round().clamp(-127, 127).to(torch.int8), scale


def from_8_bits(codes: Tensor, scale: Tensor, _inputs: int) -> Tensor:
    """The weight (O, I) of `in_8_bits`."""
    return codes.float() * scale[:, None]


def in_4_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes uint8 (O, 16 groups), two numbers a byte, and scales bfloat16 (O, groups) of a weight float32 (O, I)."""
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    largest = padded.gather(2, padded.abs().argmax(2, keepdim=True))[..., 0]
    best, found, kept = torch.full_like(largest, torch.inf), torch.zeros_like(padded), torch.zeros_like(largest)
    for share in TRIED.tolist():
        scale = (largest * (share / -8)).bfloat16().float()  # the largest becomes −8, of which there is no 8
        codes = (padded / torch.where(scale == 0, 1, scale)[..., None]).round().clamp(-8, 7)
        error = (codes * scale[..., None] - padded).square().sum(2)
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, scale, kept)
        found = torch.where(better[..., None], codes, found)
    pairs = (found.flatten(1) + 8).to(torch.uint8).unflatten(1, (-1, 2))
    return pairs[..., 0] | pairs[..., 1] << 4, kept.bfloat16()


def nibbles(codes: Tensor) -> Tensor:
    """The numbers int8 from −8 to 7 (O, 32 groups) of codes in 4 bits."""
    return torch.stack([codes & 15, codes >> 4], -1).flatten(1).to(torch.int8) - 8


def from_4_bits(codes: Tensor, scale: Tensor, inputs: int) -> Tensor:
    """The weight (O, I) of `in_4_bits`."""
    return (nibbles(codes).float().unflatten(1, (-1, GROUP)) * scale.float()[..., None]).flatten(1)[:, :inputs]


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers float32 from −127 to 127 of x (…, N), to the nearest, ties to even, and scales (…); NaN and 0 for
    what is not finite."""
    largest = x.float().abs().amax(-1)
    largest = torch.where(largest.isfinite(), largest, torch.nan)
    some = largest >= LEAST
    by = torch.where(some, torch.full_like(largest, 127) / largest, 0)  # one rounding: 127 / x has two
    codes = torch.where(some[..., None], (x.float() * by[..., None]).round(), 0)
    return codes, torch.where(some, largest / 127, torch.where(largest.isnan(), largest, 0))


def product(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, I) · weightᵀ + bias in x's dtype."""
    return (_product_8 if codes.dtype == torch.int8 else _product_4)(x, codes, scale, bias).to(x.dtype)


def _product_8(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Float32, rounded after the bias alone: double holds a product of two float32 numbers exactly."""
    row, by = rounded(x)
    whole = (row.double() @ codes.double().T).float().double()
    made = whole * (scale * by[..., None]).double()
    return (made if bias is None else made + bias.to(x.dtype).double()).float()


def _product_4(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    row, by = rounded(F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP)))
    weight = nibbles(codes).double().unflatten(1, (-1, GROUP)) * scale.double()[..., None]
    made = (row.double() * by.double()[..., None]).flatten(-2) @ weight.flatten(1).T
    return made if bias is None else made + bias.to(x.dtype).double()
