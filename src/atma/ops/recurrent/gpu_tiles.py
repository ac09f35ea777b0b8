"""What the Triton kernels of linear recurrences share: tiles of a chunk, sums of decays, the solution, and their call.

Decays with a channel index never form e^(g_p − g_s) for pairs. A chunk of C tokens is halved down to single tokens;
each pair s < p is in neighbouring halves of exactly one size, with b the last token of the first: e^(g_p − g_b) goes to
p and e^(g_b − g_s) to s, both sums of terms ≤ 0 from their own ends (mixers.md, section 3.2). What is left are products
of matrices, one a size.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import narrow, unit_stride

CHUNK = {torch.float16: 64, torch.bfloat16: 64, torch.float32: 32}
"""Tokens of a chunk. Float32 has no tensor core to fill; its products in chunks of 64 would not fit in registers."""
NARROW = 128
"""Values wider than this go in tiles of as many columns; a pass with wider keys takes more warps."""
TOKEN, KEY, VALUE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What a decay belongs to: a head and token, and of it each key channel, or each value channel."""


@triton.jit
def load(pointer, start, stride, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(ROWS, COLUMNS) from row `start` on, zero past `length` rows or `width` columns."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (start + row < length)[:, None] & (column < width)[None, :]
    return tl.load(pointer + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :], mask, other=0)


@triton.jit
def store(pointer, x, start, stride, length, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (start + row < length)[:, None] & (column < width)[None, :]
    at = pointer + tl.cast(start, tl.int64) * stride + row[:, None] * stride + column[None, :]
    tl.store(at, narrow(x, pointer.dtype.element_ty), mask)


@triton.jit
def load_row(pointer, start, length, C: tl.constexpr):
    at = start + tl.arange(0, C)
    return tl.load(pointer + at, mask=at < length, other=0)


@triton.jit
def births(segment_ids, start, length, C: tl.constexpr):
    """(C,): how many documents have begun in the chunk up to each token; equal for tokens of one document."""
    at = start + tl.arange(0, C)
    followed = (at > 0) & (at < length)
    ids = tl.load(segment_ids + at, mask=followed, other=0)
    before = tl.load(segment_ids + at - 1, mask=followed, other=0)
    return tl.cumsum((ids != before).to(tl.int32), 0)


@triton.jit
def decays(log_decay, segment_ids, start, length, C: tl.constexpr, PACKED: tl.constexpr):
    """D (C, C), zero above the diagonal and across documents; g (C), zero once a document has begun in the chunk.

    Padding does not decay. Every sum begins at the token whose write it carries.
    """
    p = tl.arange(0, C)
    rates = load_row(log_decay, start, length, C)
    # Column s sums log γ from s + 1 on: D never is a difference of sums, which would cancel and cross documents.
    sums = tl.cumsum(tl.where(p[:, None] > p[None, :], rates[:, None], 0.0), 0)
    within = p[:, None] >= p[None, :]
    entry = tl.exp(tl.cumsum(rates, 0))
    if PACKED:
        # D between tokens of different documents, and g after the first, are 0.
        seen = births(segment_ids, start, length, C)
        within = within & (seen[:, None] == seen[None, :])
        entry = tl.where(seen == 0, entry, 0.0)
    return tl.where(within, tl.exp(sums), 0.0), entry


@triton.jit
def last_row(x, C: tl.constexpr):
    """Row C − 1 of (C, C) as (C)."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], x, 0.0), 0)


@triton.jit
def _joined(blocks, A, PAIRS: tl.constexpr, SIZE: tl.constexpr):
    """From the inverses (2 · PAIRS, SIZE, SIZE) of I + A's diagonal blocks to those of the blocks twice as large."""
    pair, half = tl.arange(0, PAIRS), tl.arange(0, 2)
    halves = tl.reshape(blocks, (PAIRS, 2, SIZE, SIZE))
    is_first = (half == 0)[None, :, None, None]
    first = tl.sum(tl.where(is_first, halves, 0.0), 1)
    second = tl.sum(tl.where(is_first, 0.0, halves), 1)
    same = pair[:, None, None, None, None, None] == pair[None, None, None, :, None, None]
    below = (half[:, None, None, None, None] > half[None, None, None, :, None])[None]
    between = tl.where(same & below, tl.reshape(A, (PAIRS, 2, SIZE, PAIRS, 2, SIZE)), 0.0)
    between = tl.sum(tl.sum(tl.sum(between, 4), 3), 1)
    # [[F, 0], [B, S]]⁻¹ = [[F⁻¹, 0], [−S⁻¹ B F⁻¹, S⁻¹]], for all pairs of blocks at once.
    corner = -tl.dot(tl.dot(second, between, input_precision="ieee"), first, input_precision="ieee")
    row, column = half[None, :, None, None, None], half[None, None, None, :, None]
    left = tl.where(row == 0, first[:, None, :, None, :], corner[:, None, :, None, :])
    right = tl.where(row == 0, 0.0, second[:, None, :, None, :])
    return tl.reshape(tl.where(column == 0, left, right), (PAIRS, 2 * SIZE, 2 * SIZE))


@triton.jit
def invert(A, C: tl.constexpr):
    """(I + A)⁻¹ for strictly lower A: forward substitution in diagonal blocks of 16, which are then joined in pairs.

    Substitution, not powers of A: those grow like binomials where tokens repeat, and cancel.
    """
    SMALL: tl.constexpr = 16
    COUNT: tl.constexpr = C // SMALL
    block, i, j = tl.arange(0, COUNT), tl.arange(0, SMALL)[None, :, None], tl.arange(0, SMALL)[None, None, :]
    diagonal = block[:, None, None, None] == block[None, None, :, None]
    a = tl.sum(tl.where(diagonal, tl.reshape(A, (COUNT, SMALL, COUNT, SMALL)), 0.0), 2)
    blocks = tl.where((i == j) & (block >= 0)[:, None, None], 1.0, 0.0)
    for r in range(1, SMALL):
        # Row r of each block's inverse: e_r less A's row r times the rows already there.
        row = tl.sum(tl.where(i == r, a, 0.0), 1)
        solved = tl.sum(row[:, :, None] * blocks, 1)
        blocks = tl.where(i == r, blocks - solved[:, None, :], blocks)
    blocks = _joined(blocks, A, COUNT // 2, SMALL)
    if COUNT > 2:
        blocks = _joined(blocks, A, COUNT // 4, 2 * SMALL)
    return tl.reshape(blocks, (C, C))


@triton.jit
def since(rates, SIZE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """(C, COLUMNS): the sum from the first token of each piece of SIZE tokens to p, p included."""
    if SIZE > 1:
        rates = tl.reshape(tl.cumsum(tl.reshape(rates, (C // SIZE, SIZE, COLUMNS)), 1), (C, COLUMNS))
    return rates


@triton.jit
def until(later, SIZE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """(C, COLUMNS): the sum from s + 1 to the last token of s's piece; row s of `later` is of token s + 1."""
    inside = tl.where((tl.arange(0, C) % SIZE != SIZE - 1)[:, None], later, 0.0)
    if SIZE > 1:
        inside = tl.reshape(tl.cumsum(tl.reshape(inside, (C // SIZE, SIZE, COLUMNS)), 1, reverse=True), (C, COLUMNS))
    return inside


@triton.jit
def spread(reads, tails, SIZE: tl.constexpr, C: tl.constexpr, COLUMNS: tl.constexpr):
    """Gradient of the rates by those of the exponents `since` (p ≥ l) and `until` (s < l) of each piece."""
    total = reads
    if SIZE > 1:
        shape: tl.constexpr = (C // SIZE, SIZE, COLUMNS)
        after = tl.cumsum(tl.reshape(reads, shape), 1, reverse=True)
        before = tl.cumsum(tl.reshape(tails, shape), 1)
        total = tl.reshape(after + before, (C, COLUMNS)) - tails
    return total


@triton.jit
def neighbours(SIZE: tl.constexpr, C: tl.constexpr):
    """(C, C): p in a second half, s in the first half before it, each of SIZE tokens."""
    piece = tl.arange(0, C) // SIZE
    return (piece[:, None] == piece[None, :] + 1) & (piece % 2 == 1)[:, None]


@triton.jit
def edges(rates, later, segment_ids, start, length, C: tl.constexpr, COLUMNS: tl.constexpr, PACKED: tl.constexpr):
    """Decays since before the chunk (C, COLUMNS), to its end (C, COLUMNS), and over all of it (COLUMNS,).

    0 where a document has begun in between.
    """
    entry, last = tl.exp(since(rates, C, C, COLUMNS)), tl.exp(until(later, C, C, COLUMNS))
    whole = tl.exp(tl.sum(rates, 0))
    if PACKED:
        seen = births(segment_ids, start, length, C)
        count = tl.max(seen, 0)
        entry = tl.where((seen == 0)[:, None], entry, 0.0)
        last = tl.where((seen == count)[:, None], last, 0.0)
        whole = tl.where(count == 0, whole, 0.0)
    return entry, last, whole


class Call(NamedTuple):
    """What every kernel of one call takes. Rows are addressed by stride; only rows with gaps are copied."""

    inputs: tuple[Tensor, ...]  # q, k, v, log_decay, beta, segment_ids; the last unread where PACKED is false
    strides: tuple[int, ...]  # over batch, head and token of q, k and v
    sizes: tuple[int, ...]  # H, H / G, H / G', T, K, V
    packed: bool

    @property
    def chunk(self) -> int:
        return CHUNK[self.inputs[0].dtype]

    @property
    def chunks(self) -> int:
        return triton.cdiv(self.sizes[3], self.chunk)

    @property
    def heads(self) -> int:
        """B · H: the second axis of every grid."""
        return self.inputs[0].shape[0] * self.sizes[0]

    @property
    def exact(self) -> bool:
        return self.inputs[0].dtype == torch.float32

    @property
    def parallel(self) -> dict[str, int | bool]:
        """How a kernel runs that has each chunk to itself."""
        width, stages = padded(self.sizes[4]), 1 if self.exact else 2
        return {"C": self.chunk, "WIDTH": width, "PACKED": self.packed, "num_warps": 8, "num_stages": stages}

    @property
    def depth(self) -> dict[str, int]:
        """All value columns, and how many a kernel takes at a time that asks for all."""
        full = padded(self.sizes[5])
        return {"DEPTH": full, "BLOCK": min(full, NARROW)}

    def columns(self, tiles: int) -> int:
        """Value columns that a parallel kernel with room for `tiles` tiles takes at a time."""
        return min(padded(self.sizes[5]), tiles * self.chunk // 2)

    @property
    def sequential(self) -> dict[str, int]:
        """How a pass over the chunks runs. Few value rows a program: it is the number of programs that fills a GPU."""
        width, few = padded(self.sizes[4]), min(padded(self.sizes[5]), 32)
        block, warps, stages = (16, 8, 1) if self.exact else (few, 4 if width <= NARROW else 8, 2)
        return {"C": self.chunk, "WIDTH": width, "BLOCK": block, "num_warps": warps, "num_stages": stages}

    @property
    def passes(self) -> tuple[int, int]:
        """The grid of a pass over the chunks."""
        return triton.cdiv(self.sizes[5], self.sequential["BLOCK"]), self.heads

    def buffer(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Uninitialised (B, H, …) in q's dtype, or another."""
        return self.inputs[0].new_empty(*self.inputs[0].shape[:2], *shape, dtype=dtype)


def padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def call_of(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, segment_ids: Tensor | None) -> Call:
    """The call of kernels on these."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    log_decay, beta = log_decay.contiguous(), beta.contiguous()
    ids = log_decay if segment_ids is None else segment_ids.contiguous()
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    heads, sizes = q.shape[1], (*q.shape[2:], v.shape[3])
    groups = heads // k.shape[1], heads // v.shape[1]
    return Call((q, k, v, log_decay, beta, ids), strides, (heads, *groups, *sizes), segment_ids is not None)


def shared(grad: Tensor, like: Tensor) -> Tensor:
    """(B, G, T, ·): the sum over the query heads of each key or value head."""
    return grad if grad.shape == like.shape else grad.unflatten(1, (like.shape[1], -1)).sum(2)


def shapes(q, k, v, log_decay, beta, memory, segment_ids, delta):
    """Results of a forward pass with decays of tokens or key channels, without data."""
    chunk = CHUNK[q.dtype]
    shape = (*q.shape[:2], -(-q.shape[2] // chunk))
    out, inverse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*shape, chunk, chunk if delta else 0)
    return out, memory.new_empty(memory.shape), q.new_empty(*shape, q.shape[3], v.shape[3]), inverse
