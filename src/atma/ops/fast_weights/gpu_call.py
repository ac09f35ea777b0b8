"""The call of the scan's kernels (gpu_scan.py, gpu_back.py): which memories they take, what they are given and find."""
# pyright: reportMissingImports=false

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.gpu_back import back_kernel
from atma.ops.fast_weights.gpu_scan import BIASES, FLAT, TILE, scan_kernel
from atma.ops.fast_weights.network import Weights, by_head
from atma.ops.fast_weights.pieces import Grid, Piece
from atma.ops.fast_weights.rule import Memory, Rule
from atma.ops.fast_weights.state import MemoryState

WIDEST = 256
"""Values that a program has side by side."""


def taken(rule: Rule, piece: Piece) -> bool:
    """Whether the kernels compute this rule, whose scan is asked for."""
    plain = rule.network != "gated" and rule.anchor == "all" and rule.retention == "l2" and rule.bias in BIASES
    return plain and piece.k.dtype == torch.float32 and piece.v.shape[3] <= WIDEST


class Given(NamedTuple):
    """What the scan is of, of N pieces and B rows; what a rule has not is None, or no matrices."""

    k: Tensor  # (N B, H, J, K′), the window's tail among the J
    target: Tensor  # (N B, H, J, V): v − J k, of the bias dot v
    delta: Tensor | None  # (N B, H, J, 1 or V)
    kept: Tensor  # B of the last token (N B, H)
    wrote: Tensor  # G of the last token (N B, H, J)
    moved: Tensor | None  # f of the last token (N B, H)
    momentum_kept: Tensor | None  # (N B, H)
    momentum_wrote: Tensor | None  # (N B, H, J)
    gain: Tensor | None  # (H, V)
    shift: Tensor | None
    most: Tensor | None  # (H, matrices): how far each may be from its start, where there is a radius
    initial: Weights  # (H, rows, columns)
    anchor: Weights  # (B, H, rows, columns)
    weights: Weights
    momentum: Weights

    @classmethod
    def of(cls, piece: Piece, by: Coefficients, memory: Memory, state: MemoryState) -> "Given":
        """From the arguments of `scan`."""
        rule, target, most = memory.rule, piece.v, None
        if rule.residual != "none" and rule.bias != "dot":
            target = target - (piece.k if memory.skip is None else by_head(piece.k, memory.skip))
        if not math.isinf(rule.radius):
            norms = [torch.linalg.vector_norm(w, dim=(-2, -1)) for w in memory.initial]
            most = rule.radius * torch.stack(norms, -1)
        last = by.B[..., 0, -1], by.G[:, :, 0, -1], None if by.f is None else by.f[..., 0, -1]
        behind = None if by.of_s is None else by.of_s[..., 0], None if by.of_u is None else by.of_u[:, :, 0]
        slow = memory.gain, memory.shift, most, memory.initial
        return cls(
            piece.k, target, piece.delta, *last, *behind, *slow, state.anchor, state.weights, state.momentum or ()
        )

    @classmethod
    def from_flat(cls, rule: Rule, tensors: Iterable[Any]) -> "Given":
        """From all tensors, one after another."""
        rest, n = list(tensors), rule.matrices
        return cls(*rest[:11], *_parted(rest[11:], (n, n, n, n * (rule.optimiser == "momentum"))))


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
    def from_flat(cls, rule: Rule, tensors: Iterable[Any]) -> "Found":
        """From all tensors, one after another."""
        rest, n, momentum = list(tensors), rule.matrices, rule.matrices * (rule.optimiser == "momentum")
        return cls(*rest[:3], *_parted(rest[3:], (n, momentum, n, n, momentum)))


class Held(NamedTuple):
    """What the scan leaves for its gradient, beside `Given`."""

    e: Tensor
    h: Tensor | None
    back: Tensor | None
    far: Tensor  # (N B, H, 2): ‖A − W⁰‖ at boundaries, where there is a radius
    weights: Weights  # slots: W̄ and A before, and A behind each piece
    momentum: Weights  # slots: S before, and behind each piece


def flat(record: tuple[Any, ...]) -> list[Tensor | None]:
    """All tensors of a record, one after another."""
    return [x for part in record for x in (part if isinstance(part, tuple) else (part,))]


def _parted(tensors: list[Any], sizes: tuple[int, ...]) -> list[tuple[Any, ...]]:
    return [tuple(tensors.pop(0) for _ in range(size)) for size in sizes]


def scanned_by_kernel(rule: Rule, grid: Grid, given: Given) -> Found:
    """The scan, and its gradient where one is asked for."""
    laid = [None if x is None else x.contiguous() for x in flat(given)]
    if not torch.is_grad_enabled():
        return _forward(rule, grid, Given.from_flat(rule, laid))[0]
    return Found.from_flat(rule, _Scan.apply(rule, grid, *laid))


class _Scan(torch.autograd.Function):
    """The kernels, forward and backward; all tensors contiguous."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, grid: Grid, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        found, held = _forward(rule, grid, Given.from_flat(rule, tensors))
        ctx.rule, ctx.grid = rule, grid
        ctx.save_for_backward(*tensors, *flat(held))
        ctx.set_materialize_grads(False)
        return tuple(flat(found))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        rule, saved, count = ctx.rule, ctx.saved_tensors, len(ctx.needs_input_grad) - 2
        given, n = Given.from_flat(rule, saved[:count]), rule.matrices
        rest = list(saved[count:])
        held = Held(*rest[:4], *_parted(rest[4:], (n, n * (rule.optimiser == "momentum"))))
        grads = flat(_backward(rule, ctx.grid, given, held, Found.from_flat(rule, slopes)))
        return None, None, *(x if needed else None for x, needed in zip(grads, ctx.needs_input_grad[2:], strict=True))


def _forward(rule: Rule, grid: Grid, given: Given) -> tuple[Found, Held]:
    pieces, rows, heads, columns = grid.here.shape[1], *given.k.shape[:3]
    weights = tuple(_slots(pieces, anchor, held) for anchor, held in zip(given.anchor, given.weights, strict=True))
    momentum, h, back = tuple(_slots(pieces, held) for held in given.momentum), None, None
    if rule.network == "mlp":
        h, back = given.k.new_empty(2, rows, heads, columns, given.initial[0].shape[2]).unbind()
    e, far = torch.empty_like(given.target), given.k.new_empty(rows, heads, 2)
    anchor = tuple(torch.empty_like(x[0]) for x in weights)
    arguments = _tokens(grid, given), _slow(given), (*_two(weights), *_two(momentum or weights))
    with torch.cuda.device_of(given.k):
        scan_kernel[_programs(given),](
            *arguments, _real(e, h, back), (*_two(anchor), far), _sizes(grid, given), **_how(rule, given, grid)
        )
    found = Found(
        *(e, h, back),
        tuple(x[1:-1].flatten(0, 1) for x in weights),
        tuple(x[:-1].flatten(0, 1) for x in momentum),
        tuple(x[-1].clone() for x in weights),  # so that a state keeps nothing of the pieces
        anchor,
        tuple(x[-1].clone() for x in momentum),
    )
    return found, Held(e, h, back, far, weights, momentum)


def _backward(rule: Rule, grid: Grid, given: Given, held: Held, slopes: Found) -> Given:
    """The gradients of `given`."""
    zero = [None if x is None else torch.zeros_like(x) for x in given[:8]]
    by_e, by_h, by_back = (_own(x, like) for x, like in zip(slopes[:3], held[:3], strict=True))
    before = _each(slopes.before, [x[1:-1].flatten(0, 1) for x in held.weights])
    momentum_before = _each(slopes.momentum_before, [x[:-1].flatten(0, 1) for x in held.momentum])
    by_weights, by_anchor = (
        [_own(x, like) for x, like in zip(each, given.weights, strict=True)]
        for each in (slopes.after, slopes.anchor_after)
    )
    by_momentum = [_own(x, like) for x, like in zip(slopes.momentum_after, given.momentum, strict=True)]
    by_initial = [torch.zeros_like(x) for x in given.weights]
    batch, heads = given.weights[0].shape[:2]
    by_gain, by_shift = given.k.new_zeros(2, batch, heads, given.target.shape[3]).unbind()
    by_most, columns = given.k.new_zeros(batch, heads, 2), given.k.shape[2]
    scratch = given.k.new_empty(2, batch, heads, columns, given.weights[0].shape[3])
    with torch.cuda.device_of(given.k):
        back_kernel[_programs(given),](
            (*_tokens(grid, given), _anchors(grid)),
            _slow(given),
            (*_two(held.weights), *_two(held.momentum or held.weights)),
            (*_real(held.e, held.h, held.back), held.far),
            (*_real(by_e, by_h, by_back), *_real(*zero)),
            (*_two(before), *_two(momentum_before or before)),
            (*_two(by_weights), *_two(by_anchor), *_two(by_momentum or by_weights)),
            (*_two(by_initial), by_gain, by_shift, by_most),
            (*scratch.unbind(), given.k.new_empty(batch, heads, columns)),
            _sizes(grid, given),
            **_how(rule, given, grid),
        )
    of_norm = (None, None) if given.gain is None else (by_gain.sum(0), by_shift.sum(0))
    of_most = None if given.most is None else by_most.sum(0)
    of_matrices = tuple(x.sum(0) for x in by_initial), tuple(by_anchor), tuple(by_weights), tuple(by_momentum)
    return Given(*zero, *of_norm, of_most, *of_matrices)  # pyright: ignore[reportArgumentType]


def _own(x: Tensor | None, like: Tensor | None) -> Any:
    """A gradient that may be written, zero where none came."""
    if like is None:
        return None
    return torch.zeros_like(like) if x is None else x.clone(memory_format=torch.contiguous_format)


def _each(slopes: Weights, like: list[Tensor]) -> list[Tensor]:
    pairs = zip(slopes, like, strict=True)
    return [torch.zeros_like(other) if x is None else x.contiguous() for x, other in pairs]


def _slots(pieces: int, *first: Tensor) -> Tensor:
    """(slots, B, H, rows, columns): these, and one more for each piece."""
    slots = first[0].new_empty(len(first) + pieces, *first[0].shape)
    for slot, x in zip(slots, first, strict=False):
        slot.copy_(x)
    return slots


def _programs(given: Given) -> int:
    return given.weights[0].shape[0] * given.weights[0].shape[1]


def _real(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """What a rule has not is its first tensor, which is not looked at."""
    return tuple(tensors[0] if x is None else x for x in tensors)  # pyright: ignore[reportReturnType]


def _two(matrices: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """A matrix alone stands for both."""
    first, *rest = matrices
    return first, rest[0] if rest else first


def _tokens(grid: Grid, given: Given) -> tuple[Tensor, ...]:
    begun = None if grid.begun is None else grid.begun.mT.int().contiguous()
    return _real(*given[:8], grid.ends.mT.int().contiguous(), begun)


def _anchors(grid: Grid) -> Tensor:
    """(N, B) int32: the slot of W̄ at each piece."""
    renewed = torch.zeros_like(grid.ends)
    renewed[:, 1:] = grid.ends[:, :-1]
    renewed = renewed if grid.begun is None else renewed | grid.begun
    slot = 1 + torch.arange(renewed.shape[1], device=renewed.device, dtype=torch.int32)
    return torch.where(renewed, slot, 0).cummax(1).values.mT.contiguous()


def _slow(given: Given) -> tuple[Tensor, ...]:
    return *_real(given.k, given.gain, given.shift)[1:], *_two(given.initial), _real(given.k, given.most)[1]


def _sizes(grid: Grid, given: Given) -> tuple[int, ...]:
    wide = 1 if given.delta is None else given.delta.shape[3]
    hidden, depth = given.initial[0].shape[2], given.target.shape[3]
    return grid.here.shape[1], len(grid.here), *given.k.shape[1:], hidden, depth, wide, int(wide > 1)


def _how(rule: Rule, given: Given, grid: Grid) -> dict[str, Any]:
    """The kernels' constants. One stage: a pipeline would load a tile before it is written."""
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
    how |= {"TILE": TILE, "FLAT": FLAT, "V": max(16, triton.next_power_of_2(given.target.shape[3]))}
    return how | {"num_warps": 8 if how["V"] <= 128 else 16, "num_stages": 1}
