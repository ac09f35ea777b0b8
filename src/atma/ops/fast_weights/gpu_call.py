"""The call of the scan's kernel (gpu_scan.py): which memories it takes, what it is given and what it finds."""

# pyright: reportMissingImports=false

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.gpu_scan import BIASES, FLAT, TILE, scan_kernel
from atma.ops.fast_weights.network import Weights, by_head
from atma.ops.fast_weights.pieces import Grid, Piece
from atma.ops.fast_weights.rule import Memory, Rule
from atma.ops.fast_weights.scan import scan
from atma.ops.fast_weights.state import MemoryState, empty

WIDEST = 256
"""Values that a program has side by side."""


def taken(rule: Rule, piece: Piece) -> bool:
    """Whether the kernel computes this rule, whose scan is asked for."""
    plain = rule.network != "gated" and rule.anchor == "all" and rule.retention == "l2" and rule.bias in BIASES
    return plain and piece.k.dtype == torch.float32 and piece.v.shape[3] <= WIDEST


class Given(NamedTuple):
    """What the scan is of, of N pieces and B rows; what a rule has not is None, or no matrices."""

    k: Tensor  # (N B, H, J, K′), the window's tail among the J
    v: Tensor  # (N B, H, J, V)
    delta: Tensor | None  # (N B, H, J, 1 or V)
    B: Tensor  # of the last token (N B, H, 1, 1)
    G: Tensor  # of the last token (N B, H, 1, 1, J)
    f: Tensor | None  # of the last token (N B, H, 1, 1)
    of_s: Tensor | None  # (N B, H, 1)
    of_u: Tensor | None  # (N B, H, 1, J)
    gain: Tensor | None  # (H, V)
    shift: Tensor | None
    skip: Tensor | None  # (H, V, K′)
    initial: Weights  # (H, rows, columns)
    anchor: Weights  # (B, H, rows, columns)
    weights: Weights
    momentum: Weights

    @classmethod
    def of(cls, piece: Piece, by: Coefficients, memory: Memory, state: MemoryState) -> "Given":
        """From the arguments of `scan`."""
        last = by.B[..., -1:], by.G[..., -1:, :], None if by.f is None else by.f[..., -1:]
        slow = memory.gain, memory.shift, memory.skip, memory.initial
        held = state.anchor, state.weights, state.momentum or ()
        return cls(piece.k, piece.v, piece.delta, *last, by.of_s, by.of_u, *slow, *held)

    @classmethod
    def from_flat(cls, rule: Rule, tensors: Iterable[Any]) -> "Given":
        """From all tensors, one after another."""
        rest, n = list(tensors), rule.matrices
        return cls(*rest[:11], *_parted(rest[11:], (n, n, n, n * (rule.optimiser == "momentum"))))

    def scanned(self, rule: Rule, grid: Grid) -> "Found":
        """By PyTorch; a document begins with W⁰."""
        memory = Memory(rule, self.initial, self.gain, self.shift, self.skip)
        piece = Piece(self.k, self.k, self.v, *[None] * 3, self.delta, *[None] * 3)  # pyright: ignore
        state = MemoryState(None, self.anchor, self.weights, self.momentum or None)  # pyright: ignore
        fresh = None if grid.begun is None else empty(memory, len(grid.begun))
        by = Coefficients(self.B, self.G, self.f, self.of_s, self.of_u)
        (before, _, pairs), after = scan(piece, by, memory, state, grid, fresh)
        h, back = (pairs[0][1], pairs[1][0]) if len(pairs) > 1 else (None, None)
        momenta = before.momentum or (), after.momentum or ()
        return Found(pairs[0][0], h, back, before.weights, momenta[0], after.weights, after.anchor, momenta[1])


class Found(NamedTuple):
    """What reads need, and the state behind."""

    e: Tensor  # e₁ (N B, H, J, V)
    h: Tensor | None  # (N B, H, J, E) of a network
    back: Tensor | None  # e₂ (N B, H, J, E)
    before: Weights  # (N B, H, rows, columns)
    momentum_before: Weights
    after: Weights  # (B, H, rows, columns)
    anchor_after: Weights
    momentum_after: Weights

    @classmethod
    def of(cls, rule: Rule, tensors: Iterable[Any]) -> "Found":
        """From all tensors, one after another."""
        rest, n, momentum = list(tensors), rule.matrices, rule.matrices * (rule.optimiser == "momentum")
        return cls(*rest[:3], *_parted(rest[3:], (n, momentum, n, n, momentum)))


def flat(record: tuple[Any, ...]) -> list[Tensor | None]:
    """All tensors of a record, one after another."""
    return [x for part in record for x in (part if isinstance(part, tuple) else (part,))]


def _parted(tensors: list[Any], sizes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    return [tuple(tensors.pop(0) for _ in range(size)) for size in sizes]


def launched(rule: Rule, grid: Grid, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The kernel: of `Given`, all tensors one after another, so those of `Found`."""
    given = Given.from_flat(rule, tensors)
    pieces, batch, (rows, heads, columns, _) = grid.here.shape[1], len(grid.here), given.k.shape
    weights = [_slots(pieces, anchor, held) for anchor, held in zip(given.anchor, given.weights, strict=True)]
    momentum = [_slots(pieces, held) for held in given.momentum]
    h = back = None
    if rule.network == "mlp":
        h, back = given.k.new_empty(2, rows, heads, columns, given.initial[0].shape[2]).unbind()
    found = Found(
        given.v.new_empty(given.v.shape),
        *(h, back),
        tuple(x[1:-1].flatten(0, 1) for x in weights),
        tuple(x[:-1].flatten(0, 1) for x in momentum),
        after=(),
        anchor_after=tuple(torch.empty_like(x[0]) for x in weights),
        momentum_after=(),
    )
    arguments = _arguments(rule, grid, given, (weights, momentum), found)
    with torch.cuda.device_of(given.k):  # one stage: a pipeline would load a tile before it is written
        scan_kernel[batch * heads,](*arguments, **_how(rule, given, grid), num_warps=8, num_stages=1)
    # Copies, so that a state keeps nothing of the pieces.
    after, momentum_after = (tuple(x[-1].clone() for x in each) for each in (weights, momentum))
    return tuple(flat(found._replace(after=after, momentum_after=momentum_after)))


def _slots(pieces: int, *first: Tensor) -> Tensor:
    """(slots, B, H, rows, columns): these, and one more for each piece."""
    slots = first[0].new_empty(len(first) + pieces, *first[0].shape)
    for slot, x in zip(slots, first, strict=False):
        slot.copy_(x)
    return slots


def _arguments(
    rule: Rule, grid: Grid, given: Given, slots: tuple[list[Tensor], list[Tensor]], found: Found
) -> tuple[Any, ...]:
    """Those of the kernel that are no constants; what a rule has not is some other tensor, which is not looked at."""
    target, k = given.v, given.k.contiguous()
    if rule.residual != "none" and rule.bias != "dot":
        target = target - (k if given.skip is None else by_head(k, given.skip))
    wide = 1 if given.delta is None else given.delta.shape[3]
    tokens = k, target, given.delta, given.B, given.G, given.f, given.of_s, given.of_u
    bounds = grid.ends.mT.int(), None if grid.begun is None else grid.begun.mT.int()
    most = None if math.isinf(rule.radius) else _most(given.initial, rule.radius)
    slow = given.gain, given.shift, *_two(given.initial), most
    sizes = grid.here.shape[1], len(grid.here), *k.shape[1:], given.initial[0].shape[2], target.shape[3]
    return (
        tuple((k if x is None else x).contiguous() for x in (*tokens, *bounds)),
        tuple((k if x is None else x).contiguous() for x in slow),
        (*_two(slots[0]), *_two(slots[1] or slots[0])),
        tuple(found.e if x is None else x for x in (found.e, found.h, found.back)),
        _two(found.anchor_after),
        (*sizes, wide, int(wide > 1)),
    )


def _two(matrices: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """A matrix alone stands for both."""
    first, *rest = matrices
    return first, rest[0] if rest else first


def _most(initial: Weights, radius: float) -> Tensor:
    """(H, matrices): how far each may be from its start."""
    return radius * torch.stack([torch.linalg.vector_norm(w, dim=(-2, -1)) for w in initial], -1)


def _how(rule: Rule, given: Given, grid: Grid) -> dict[str, Any]:
    """The kernel's constants."""
    how = {
        "DEEP": rule.network == "mlp",
        "BIAS": BIASES.index(rule.bias),
        "NORM": rule.norm,
        "NORMALISED": rule.normalised,
        "SILU": rule.activation == "silu",
        "MOMENTUM": rule.optimiser == "momentum",
        "TO_INITIAL": rule.decay_to == "initial" and not rule.average,
        "MEAN": rule.chunk * rule.average,
        "RADIUS": not math.isinf(rule.radius),
        "PACKED": grid.begun is not None,
    }
    return how | {"TILE": TILE, "FLAT": FLAT, "V": max(16, triton.next_power_of_2(given.v.shape[3]))}
