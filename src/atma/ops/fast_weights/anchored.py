"""The scan of a matrix memory by compiled kernels (ops/native/anchored_*.cpp), with their gradient by hand.

In a matrix alone, nothing but e depends on the anchor: e is of N(W̄ k) − (v − J k), and what is written is e kᵀ. All
else that the kernels take is known for all pieces before the first. Their matrices lie as (K′, V).
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from atma.ops import native
from atma.ops.fast_weights.coefficients import Coefficients
from atma.ops.fast_weights.network import by_head
from atma.ops.fast_weights.pieces import Grid, Piece
from atma.ops.fast_weights.reads import Scanned
from atma.ops.fast_weights.rule import Memory, Rule
from atma.ops.fast_weights.scan import scan
from atma.ops.fast_weights.state import MemoryState, chosen

BIASES = {"dot": 0, "l2": 1, "huber": 2}
# In the order of the compiled struct, of which the gradient takes the whole.
_GIVEN = (
    "k target delta gain shift kept wrote moved momentum_kept momentum_wrote initial weights anchor momentum ends begun"
)
_FOUND = "e before momentum_before after anchor_after momentum_after"
_FIELDS = f"pieces batch heads columns width value_width bias average to_initial threads {_GIVEN} {_FOUND}"
_SLOPES = " ".join(f"grad_{name}" for name in (*_FOUND.split(), *_GIVEN.split()[:14]))


class _Given(NamedTuple):
    """Of N pieces and B rows; what a rule has not is None."""

    k: Tensor  # (N B, H, J, K′), the window's tail among the J
    target: Tensor  # (N B, H, J, V): v − J k, of the bias dot v
    delta: Tensor | None  # (N B, H, J)
    gain: Tensor | None  # (H, V)
    shift: Tensor | None
    kept: Tensor  # B of the last token (N B, H)
    wrote: Tensor  # G of the last token (N B, H, J)
    moved: Tensor | None  # f of the last token (N B, H)
    momentum_kept: Tensor | None  # (N B, H)
    momentum_wrote: Tensor | None  # (N B, H, J)
    initial: Tensor | None  # (H, K′, V), where W° is W⁰ or documents begin
    weights: Tensor  # (B, H, K′, V)
    anchor: Tensor
    momentum: Tensor | None
    ends: Tensor  # (N, B) bool
    begun: Tensor | None


class _Found(NamedTuple):
    e: Tensor  # (N B, H, J, V)
    before: Tensor  # (N B, H, K′, V)
    momentum_before: Tensor | None
    after: Tensor  # (B, H, K′, V)
    anchor_after: Tensor
    momentum_after: Tensor | None


def anchored(
    piece: Piece, by: Coefficients, memory: Memory, state: MemoryState, grid: Grid, fresh: MemoryState | None
) -> tuple[Scanned, MemoryState]:
    """Arguments and results of `scan`; what the kernels do not take is its own."""
    rule = memory.rule
    if torch.compiler.is_compiling() or not _taken(rule) or not native.available(piece.k.dtype):
        return scan(piece, by, memory, state, grid, fresh)
    to_initial = rule.decay_to == "initial" and not rule.average
    settings = BIASES[rule.bias], rule.chunk * rule.average, to_initial
    given = _given(piece, by, memory, state, grid, to_initial)
    found = _Found(*cast(Any, _Scan.apply(settings, *(x if x is None else x.contiguous() for x in given))))
    momentum = None if found.momentum_before is None else (found.momentum_before.mT,)
    before = state._replace(weights=(found.before.mT,), momentum=momentum)
    after = state._replace(
        weights=(found.after.mT,),
        anchor=(found.anchor_after.mT,),
        momentum=None if found.momentum_after is None else (found.momentum_after.mT,),
    )
    if fresh is not None and grid.begun is not None and rule.average:
        state = chosen(grid.begun[:, 0], fresh, state)
    return Scanned(before, state, [(found.e, piece.k)]), after


def _taken(rule: Rule) -> bool:
    """Whether the kernels compute this rule, whose scan is asked for."""
    return rule.network == "matrix" and rule.anchor == "all" and rule.bias in BIASES and rule.retention == "l2"


def _given(piece: Piece, by: Coefficients, memory: Memory, state: MemoryState, grid: Grid, to_initial: bool) -> _Given:
    target = piece.v
    if memory.rule.residual != "none" and memory.rule.bias != "dot":
        target = target - (piece.k if memory.skip is None else by_head(piece.k, memory.skip))
    return _Given(
        k=piece.k,
        target=target,
        delta=None if piece.delta is None else piece.delta[..., 0],
        gain=memory.gain,
        shift=memory.shift,
        kept=by.B[..., 0, -1],
        wrote=by.G[:, :, 0, -1],
        moved=None if by.f is None else by.f[..., 0, -1],
        momentum_kept=None if by.of_s is None else by.of_s[..., 0],
        momentum_wrote=None if by.of_u is None else by.of_u[:, :, 0],
        initial=memory.initial[0].mT if to_initial or grid.begun is not None else None,
        weights=state.weights[0].mT,
        anchor=state.anchor[0].mT,
        momentum=None if state.momentum is None else state.momentum[0].mT,
        ends=grid.ends.mT,
        begun=None if grid.begun is None else grid.begun.mT,
    )


class _Scan(torch.autograd.Function):
    """The kernels, forward and backward; all tensors contiguous."""

    @staticmethod
    def forward(ctx: Any, settings: tuple[int, int, bool], *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        given = _Given(*tensors)  # pyright: ignore[reportArgumentType]
        matrix, size = given.weights, given.k.shape
        before = [matrix.new_empty(*size[:2], *matrix.shape[2:]) for _ in range(1 + (given.momentum is not None))]
        after = [torch.empty_like(matrix) for _ in range(2 + (given.momentum is not None))]
        found = _Found(torch.empty_like(given.target), *(*before, None)[:2], *(*after, None)[:3])  # pyright: ignore
        native.call("anchored_forward", matrix.dtype, _FIELDS, _packed(settings, given, found))
        ctx.settings = settings
        ctx.save_for_backward(*given, *found[:3])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        given, found = _Given(*saved[:16]), _Found(*saved[16:], None, None, None)  # pyright: ignore
        batch = len(given.weights)
        grads = [None if x is None else torch.empty_like(x) for x in given[:14]]
        for i in (3, 4, 10):  # of slow weights, each row's
            slow = given[i]
            grads[i] = None if slow is None else slow.new_empty(batch, *slow.shape)
        slopes = tuple(None if x is None else x.contiguous() for x in slopes)
        values = (*_packed(ctx.settings, given, found), *native.addresses(*slopes, *grads))
        native.call("anchored_backward", given.weights.dtype, f"given {_SLOPES}", values)
        for i in (3, 4, 10):
            slow = grads[i]
            grads[i] = None if slow is None else slow.sum(0)
        return None, *grads, None, None


def _packed(settings: tuple[int, int, bool], given: _Given, found: _Found) -> tuple[int, ...]:
    rows, heads, columns, width = given.k.shape
    batch, value = len(given.weights), given.target.shape[3]
    sizes = (rows // batch, batch, heads, columns, width, value)
    return (*sizes, *settings, torch.get_num_threads(), *native.addresses(*given, *found))
