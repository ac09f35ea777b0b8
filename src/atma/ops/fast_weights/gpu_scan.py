"""The scan of a neural memory as one Triton kernel: a program per row and head, the pieces one after another.

Of a matrix, or of a network of two, with all gradients at the last boundary (mixers.md, section 4.4). Weights do not
fit into registers: those before every piece are written anyway, so a program reads them where they lie, in tiles, and a
barrier stands between what its threads write and what others of them read. Slot 0 holds W̄ before the call, slot 1 A
before it, slot n + 2 A behind piece n; W̄ is always one of them, behind a boundary the last, and is never copied. All is
float32, products are IEEE, never tf32; there are no atomics, so equal bits every time. Not yet run on hardware.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl

from atma.ops.fast_weights.network import EPSILON
from atma.ops.gpu import add_dot

BIASES = ("dot", "l2", "huber", "huber_coordinate", "huber_switch")
"""Those that the kernel takes."""
DOT, L2, HUBER, COORDINATE = (tl.constexpr(i) for i in range(4))
TILE = 32
"""Tokens, and rows and columns of weights, that a product takes at a time: more would not fit in registers."""
FLAT = 2048
"""Numbers of a matrix that are copied, or measured, at a time."""
EPS = tl.constexpr(EPSILON)


@triton.jit
def load(pointer, row, column, stride, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """(R, C) from a place of a matrix on, zero past `rows` rows or `columns` columns."""
    row, column = row + tl.arange(0, R), column + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask, other=0.0)


@triton.jit
def store(pointer, x, row, column, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """x (R, C) at a place of a matrix (rows, columns), without what is past it."""
    row, column = row + tl.arange(0, R), column + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(pointer + row[:, None] * columns + column[None, :], x, mask)


@triton.jit
def numbers(pointer, first, count, SIZE: tl.constexpr):
    """(SIZE,) from `first` on, zero past `count`."""
    at = first + tl.arange(0, SIZE)
    return tl.load(pointer + at, at < count, other=0.0)


@triton.jit
def copy(source, target, count, SIZE: tl.constexpr):
    """`count` numbers, from one place to another."""
    for first in range(0, count, SIZE):
        at = first + tl.arange(0, SIZE)
        tl.store(target + at, numbers(source, first, count, SIZE), at < count)


@triton.jit
def clear(target, count, SIZE: tl.constexpr):
    """`count` zeros."""
    for first in range(0, count, SIZE):
        at = first + tl.arange(0, SIZE)
        tl.store(target + at, tl.zeros((SIZE,), dtype=tl.float32), at < count)


@triton.jit
def by_rows(x, j, count, weights, row, rows, width, TILE: tl.constexpr):
    """A tile of x (count, width) weightsᵀ of weights (rows, width)."""
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for c in range(0, width, TILE):
        other = tl.trans(load(weights, row, c, width, rows, width, TILE, TILE))
        total = add_dot(total, load(x, j, c, width, count, width, TILE, TILE), other)
    return total


@triton.jit
def by_columns(x, j, count, weights, column, rows, width, TILE: tl.constexpr):
    """A tile of x (count, rows) weights of weights (rows, width)."""
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for c in range(0, rows, TILE):
        other = load(weights, c, column, width, rows, width, TILE, TILE)
        total = add_dot(total, load(x, j, c, rows, count, rows, TILE, TILE), other)
    return total


@triton.jit
def by_tokens(e, z, row, column, count, rows, width, TILE: tl.constexpr):
    """A tile of eᵀ z of e (count, rows) and z (count, width)."""
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    for j in range(0, count, TILE):
        error = tl.trans(load(e, j, row, rows, count, rows, TILE, TILE))
        total = add_dot(total, error, load(z, j, column, width, count, width, TILE, TILE))
    return total


@triton.jit
def _draw_back(a, start, far_at, most, count, SIZE: tl.constexpr):
    """A matrix whose distance to its start is more than `most` is moved to where on the way it is as much."""
    total = tl.zeros((SIZE,), dtype=tl.float32)
    for first in range(0, count, SIZE):
        moved = numbers(a, first, count, SIZE) - numbers(start, first, count, SIZE)
        total += moved * moved
    far = tl.sqrt_rn(tl.sum(total, 0))
    tl.store(far_at, far)
    if far > most:
        share = most / far
        for first in range(0, count, SIZE):
            begun, at = numbers(start, first, count, SIZE), first + tl.arange(0, SIZE)
            tl.store(a + at, begun + (numbers(a, first, count, SIZE) - begun) * share, at < count)


@triton.jit
def _activated(x, SILU: tl.constexpr):
    """act(x) and act′(x)."""
    if SILU:
        sigma = 1 / (1 + tl.exp(-x))
        return x * sigma, sigma * (1 + x * (1 - sigma))
    half = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * half, half + x * tl.exp(-0.5 * x * x) * 0.3989422804014327


@triton.jit
def at_output(r, delta, BIAS: tl.constexpr):
    """∂ℓ/∂f of r = f − v, and of r = −v for the bias dot."""
    if BIAS <= L2:
        return r
    if BIAS == COORDINATE:
        return tl.minimum(tl.maximum(r, -delta), delta)
    squared = tl.sum(r * r, 1)[:, None]
    if BIAS == HUBER:
        return r * delta / tl.sqrt_rn(tl.maximum(delta * delta, squared))
    return tl.where(squared <= delta * delta, r, delta * r / tl.sqrt_rn(r * r + EPS))


@triton.jit
def _error(core, target, delta, gain, shift, real, width, BIAS: tl.constexpr, NORM: tl.constexpr):
    """e₁ of a tile of tokens, all values of each side by side; `real` columns are no padding."""
    if not NORM:
        return at_output(-target if BIAS == DOT else core - target, delta, BIAS)
    centred = tl.where(real, core - (tl.sum(core, 1) / width)[:, None], 0.0)
    root = tl.sqrt_rn(tl.sum(centred * centred, 1) / width + EPS)[:, None]
    n = centred / root
    d = gain * at_output(-target if BIAS == DOT else gain * n + shift - target, delta, BIAS)
    return (d - (tl.sum(d, 1) / width)[:, None] - n * (tl.sum(d * n, 1) / width)[:, None]) / root


@triton.jit
def _errors(
    tokens,
    slow,
    anchor,
    found,
    sizes,
    DEEP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
):
    """Of a piece e₁, and of a network h and act′ for `_behind`, which lies where e₂ will."""
    k, target, delta, delta_step, delta_width = tokens
    gain, shift = slow
    outer, inner = anchor
    e, h, back = found
    columns, width, hidden, depth = sizes
    value = tl.arange(0, V)
    real = (value < depth)[None, :]
    for j in range(0, columns, TILE):
        core, length = tl.zeros((TILE, V), dtype=tl.float32), tl.zeros((TILE,), dtype=tl.float32)
        for first in range(0, hidden, TILE):
            if DEEP:
                active, slope = _activated(by_rows(k, j, columns, inner, first, hidden, width, TILE), SILU)
                store(h, active, j, first, columns, hidden, TILE, TILE)
                store(back, slope, j, first, columns, hidden, TILE, TILE)
            else:
                active = load(k, j, first, width, columns, width, TILE, TILE)
            if NORMALISED:
                length += tl.sum(active * active, 1)
            if NORM or BIAS != DOT:
                core = add_dot(core, active, tl.trans(load(outer, 0, first, hidden, depth, hidden, V, TILE)))
        wanted, at = load(target, j, 0, depth, columns, depth, TILE, V), j + tl.arange(0, TILE)
        limit, scale, offset = wanted, wanted, wanted
        if BIAS >= HUBER:
            place = at[:, None] * delta_step + value[None, :] * delta_width
            limit = tl.load(delta + place, (at < columns)[:, None] & real, other=1.0)
        if NORM:
            scale, offset = numbers(gain, 0, depth, V)[None, :], numbers(shift, 0, depth, V)[None, :]
        error = _error(core, wanted, limit, scale, offset, real, depth, BIAS, NORM)
        if NORMALISED:
            error = error / tl.maximum(length, 1.0)[:, None]
        store(e, error, j, 0, columns, depth, TILE, V)


@triton.jit
def _behind(outer, found, sizes, TILE: tl.constexpr):
    """e₂ = W̄₁ᵀ e₁ ⊙ act′ of a piece, written over act′."""
    e, _, back = found
    columns, _, hidden, depth = sizes
    for j in range(0, columns, TILE):
        for first in range(0, hidden, TILE):
            x = by_columns(e, j, columns, outer, first, depth, hidden, TILE)
            slope = load(back, j, first, hidden, columns, hidden, TILE, TILE)
            store(back, x * slope, j, first, columns, hidden, TILE, TILE)


@triton.jit
def _write(
    pair,
    gates,
    matrix,
    momentum,
    columns,
    rows,
    width,
    MOMENTUM: tl.constexpr,
    TO_INITIAL: tl.constexpr,
    MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """A and S of one matrix behind a piece; at a boundary of an average W̄ + (A − W̄)/MEAN."""
    e, z = pair
    anchor, initial, old, new = matrix
    wrote, kept, moved, momentum_wrote, momentum_kept, ended = gates
    for row in range(0, rows, TILE):
        for column in range(0, width, TILE):
            a, s = tl.zeros((TILE, TILE), dtype=tl.float32), tl.zeros((TILE, TILE), dtype=tl.float32)
            for j in range(0, columns, TILE):
                error = tl.trans(load(e, j, row, rows, columns, rows, TILE, TILE))
                input = load(z, j, column, width, columns, width, TILE, TILE)
                a = add_dot(a, error * numbers(wrote, j, columns, TILE)[None, :], input)
                if MOMENTUM:
                    s = add_dot(s, error * numbers(momentum_wrote, j, columns, TILE)[None, :], input)
            x = load(old, row, column, width, rows, width, TILE, TILE)
            if TO_INITIAL:
                begun = load(initial, row, column, width, rows, width, TILE, TILE)
                x = begun + kept * (x - begun)
            else:
                x = kept * x
            if MOMENTUM:
                before, after = momentum
                held = load(before, row, column, width, rows, width, TILE, TILE)
                x += moved * held
                store(after, momentum_kept * held - s, row, column, rows, width, TILE, TILE)
            x -= a
            if MEAN > 0:
                mean = load(anchor, row, column, width, rows, width, TILE, TILE)
                x = tl.where(ended, mean + (x - mean) * (1 / MEAN), x)
            store(new, x, row, column, rows, width, TILE, TILE)


@triton.jit
def scan_kernel(
    given,
    slow,
    slots,
    found,
    after,
    sizes,
    DEEP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    MOMENTUM: tl.constexpr,
    TO_INITIAL: tl.constexpr,
    MEAN: tl.constexpr,
    RADIUS: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    FLAT: tl.constexpr,
    V: tl.constexpr,
):
    """All pieces of one row and head."""
    k, target, delta, kept, wrote, moved, momentum_kept, momentum_wrote, ends, begun = given
    gain, shift, initial, initial_2, most = slow
    weights, weights_2, momentum, momentum_2 = slots
    pieces, batch, heads, columns, width, hidden, depth, delta_step, delta_width = sizes
    place, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    row, head = place // heads, place % heads
    size, size_2, shape = depth * hidden, hidden * width, (columns, width, hidden, depth)
    initial, initial_2 = initial + head * size, initial_2 + head * size_2
    norm = gain + head * depth, shift + head * depth
    weights, momentum = weights + place * size, momentum + place * size
    weights_2, momentum_2 = weights_2 + place * size_2, momentum_2 + place * size_2
    step, step_2 = programs.to(tl.int64) * size, programs.to(tl.int64) * size_2
    at = tl.zeros((), dtype=tl.int32)
    for n in range(pieces):
        one = n * programs.to(tl.int64) + place
        if PACKED:
            if tl.load(begun + n * batch + row) != 0:
                copy(initial, weights + (n + 1) * step, size, FLAT)
                if DEEP:
                    copy(initial_2, weights_2 + (n + 1) * step_2, size_2, FLAT)
                if MOMENTUM:
                    clear(momentum + n * step, size, FLAT)
                    if DEEP:
                        clear(momentum_2 + n * step_2, size_2, FLAT)
                at = n + 1
            tl.debug_barrier()
        keys, anchor, anchor_2 = k + one * columns * width, weights + at * step, weights_2 + at * step_2
        tokens = keys, target + one * columns * depth, delta + one * columns * delta_step, delta_step, delta_width
        h, back = found[1] + one * columns * hidden, found[2] + one * columns * hidden
        made = found[0] + one * columns * depth, h, back
        _errors(tokens, norm, (anchor, anchor_2), made, shape, DEEP, BIAS, NORM, NORMALISED, SILU, TILE, V)
        tl.debug_barrier()
        if DEEP:
            _behind(anchor, made, shape, TILE)
            tl.debug_barrier()
        ended = tl.load(ends + n * batch + row) != 0
        gates = wrote + one * columns, tl.load(kept + one), 0.0, wrote, 0.0, ended
        if MOMENTUM:
            of_s = momentum_wrote + one * columns, tl.load(momentum_kept + one)
            gates = gates[0], gates[1], tl.load(moved + one), of_s[0], of_s[1], ended
        matrix = anchor, initial, weights + (n + 1) * step, weights + (n + 2) * step
        held = momentum + n * step, momentum + (n + 1) * step
        if DEEP:
            _write((made[0], h), gates, matrix, held, columns, depth, hidden, MOMENTUM, TO_INITIAL, MEAN, TILE)
            matrix = anchor_2, initial_2, weights_2 + (n + 1) * step_2, weights_2 + (n + 2) * step_2
            held = momentum_2 + n * step_2, momentum_2 + (n + 1) * step_2
            _write((back, keys), gates, matrix, held, columns, hidden, width, MOMENTUM, TO_INITIAL, MEAN, TILE)
        else:
            _write((made[0], keys), gates, matrix, held, columns, depth, width, MOMENTUM, TO_INITIAL, MEAN, TILE)
        tl.debug_barrier()
        if ended:
            if RADIUS:
                new, new_2, far = weights + (n + 2) * step, weights_2 + (n + 2) * step_2, after[2] + 2 * one
                _draw_back(new, initial, far, tl.load(most + 2 * head), size, FLAT)
                _draw_back(new_2, initial_2, far + 1, tl.load(most + 2 * head + 1), size_2, FLAT)
            at = n + 2
        tl.debug_barrier()
    copy(weights + at * step, after[0] + place * size, size, FLAT)
    if DEEP:
        copy(weights_2 + at * step_2, after[1] + place * size_2, size_2, FLAT)
