"""The gradient of gpu_scan.py's scan: a program per row and head, the pieces from the last to the first.

Weights before every piece, e₁, h and e₂ are those that the scan left; what is of tokens and cheap is computed again.
A program carries the gradients of A, W̄ and S behind a piece, where they lie, to before it. Of tokens no gradient is
summed across programs, of slow weights each program has its own share. Not yet run on hardware.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import triton
import triton.language as tl

from atma.ops.fast_weights.gpu_scan import (
    COORDINATE,
    DOT,
    EPS,
    HUBER,
    L2,
    at_output,
    by_columns,
    by_rows,
    by_tokens,
    clear,
    load,
    numbers,
    store,
)
from atma.ops.gpu import add_dot


@triton.jit
def _curved(x, SILU: tl.constexpr):
    """act′(x) and act″(x)."""
    if SILU:
        sigma = 1 / (1 + tl.exp(-x))
        return sigma * (1 + x * (1 - sigma)), sigma * (1 - sigma) * (2 + x * (1 - 2 * sigma))
    bell = tl.exp(-0.5 * x * x) * 0.3989422804014327
    return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * bell, bell * (2 - x * x)


@triton.jit
def _through_output(o, r, delta, BIAS: tl.constexpr):
    """Of gradients o of `at_output`, those of r and of δ; of a δ for all values its shares."""
    if BIAS <= L2:
        return o, o
    if BIAS == COORDINATE:
        within = tl.abs(r) < delta
        return tl.where(within, o, 0.0), tl.where(within, 0.0, tl.where(r > 0, o, -o))
    squared, zero = tl.sum(r * r, 1)[:, None], tl.zeros_like(r)
    beyond = squared > delta * delta
    if BIAS == HUBER:
        root = tl.sqrt_rn(tl.where(beyond, squared, 1.0))
        along = r * (tl.sum(r * o, 1)[:, None] / tl.where(beyond, squared, 1.0))
        return tl.where(beyond, delta / root * (o - along), o), tl.where(beyond, r * o / root, zero)
    square = r * r + EPS
    root = tl.sqrt_rn(square)
    return tl.where(beyond, o * delta * EPS / (square * root), o), tl.where(beyond, o * r / root, zero)


@triton.jit
def _mean(x, width):
    """(TILE, 1), padding being zero."""
    return (tl.sum(x, 1) / width)[:, None]


@triton.jit
def _through_error(grad, core, target, delta, gain, shift, real, width, share, BIAS: tl.constexpr, NORM: tl.constexpr):
    """Of gradients of e₁ = share · error, those of core, r, δ, the norm's gain and shift, and share (TILE,)."""
    if not NORM:
        r = -target if BIAS == DOT else core - target
        o = at_output(r, delta, BIAS)
        by_r, by_delta = _through_output(share * grad, r, delta, BIAS)
        return tl.zeros_like(core) if BIAS == DOT else by_r, by_r, by_delta, by_r, by_r, tl.sum(o * grad, 1)
    centred = tl.where(real, core - _mean(core, width), 0.0)
    root = tl.sqrt_rn(_mean(centred * centred, width) + EPS)
    n = centred / root
    r = -target if BIAS == DOT else gain * n + shift - target
    o = at_output(r, delta, BIAS)
    d = gain * o
    error = tl.where(real, (d - _mean(d, width) - n * _mean(d * n, width)) / root, 0.0)
    u = share * grad / root
    of_d = tl.where(real, u - _mean(u, width) - n * _mean(u * n, width), 0.0)
    by_r, by_delta = _through_output(gain * of_d, r, delta, BIAS)
    by_gain, by_shift = o * of_d, tl.zeros_like(n)
    of_n = -u * _mean(d * n, width) - d * _mean(u * n, width)
    if BIAS != DOT:
        of_n += gain * by_r
        by_gain += n * by_r
        by_shift = by_r
    of_root = -tl.sum(u * error, 1)[:, None] - tl.sum(of_n * n, 1)[:, None] / root
    of_centred = tl.where(real, of_n / root + of_root * n / width, 0.0)
    by_core = tl.where(real, of_centred - _mean(of_centred, width), 0.0)
    return by_core, by_r, by_delta, by_gain, by_shift, tl.sum(error * grad, 1)


@triton.jit
def _errors_back(
    tokens,
    slow,
    outer,
    made,
    grads,
    sizes,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALISED: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
):
    """Of the gradient of e₁, which it overwrites with that of core, those of target, δ, gain, shift, and of ‖h‖²."""
    target, delta, delta_step, delta_width = tokens
    gain, shift = slow
    by_error, by_target, by_delta, by_gain, by_shift, by_length = grads
    columns, _, hidden, depth = sizes
    value = tl.arange(0, V)
    real = (value < depth)[None, :]
    for j in range(0, columns, TILE):
        at = j + tl.arange(0, TILE)
        core, length = tl.zeros((TILE, V), dtype=tl.float32), tl.zeros((TILE,), dtype=tl.float32)
        for first in range(0, hidden, TILE):
            active = load(made, j, first, hidden, columns, hidden, TILE, TILE)
            if NORMALISED:
                length += tl.sum(active * active, 1)
            if NORM or BIAS != DOT:
                weights = load(outer, 0, first, hidden, depth, hidden, V, TILE)
                core = add_dot(core, active, tl.trans(weights))
        wanted = load(target, j, 0, depth, columns, depth, TILE, V)
        limit, scale, offset, share = wanted, wanted, wanted, 1.0
        place, given = at[:, None] * delta_step + value[None, :] * delta_width, (at < columns)[:, None] & real
        if BIAS >= HUBER:
            limit = tl.load(delta + place, given, other=1.0)
        if NORM:
            scale, offset = numbers(gain, 0, depth, V)[None, :], numbers(shift, 0, depth, V)[None, :]
        if NORMALISED:
            share = 1 / tl.maximum(length, 1.0)[:, None]
        grad = load(by_error, j, 0, depth, columns, depth, TILE, V)
        of_core, of_r, of_delta, of_gain, of_shift, of_share = _through_error(
            grad, core, wanted, limit, scale, offset, real, depth, share, BIAS, NORM
        )
        store(by_error, of_core, j, 0, columns, depth, TILE, V)
        store(by_target, -of_r, j, 0, columns, depth, TILE, V)
        if BIAS >= HUBER:
            if delta_width == 0:
                tl.store(by_delta + at, tl.sum(tl.where(real, of_delta, 0.0), 1), at < columns)
            else:
                tl.store(by_delta + place, of_delta, given)
        if NORM:
            _add(by_gain, 0, tl.sum(tl.where(given, of_gain, 0.0), 0), depth, V)
            _add(by_shift, 0, tl.sum(tl.where(given, of_shift, 0.0), 0), depth, V)
        if NORMALISED:
            long = tl.maximum(length, 1.0)
            tl.store(by_length + at, tl.where(length > 1, -of_share / (long * long), 0.0), at < columns)
        tl.debug_barrier()  # of gain and shift, which the next tile adds to


@triton.jit
def _add(pointer, first, x, count, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(pointer + at, tl.load(pointer + at, at < count, other=0.0) + x, at < count)


@triton.jit
def _add_tile(pointer, x, row, column, rows, columns, TILE: tl.constexpr):
    x += load(pointer, row, column, columns, rows, columns, TILE, TILE)
    store(pointer, x, row, column, rows, columns, TILE, TILE)


@triton.jit
def _pair_back(pair, writes, held, grads, columns, rows, width, MOMENTUM: tl.constexpr, TILE: tl.constexpr):
    """Adds to the gradients of e, z and of what each column writes to A and S, of one matrix."""
    e, z = pair
    wrote, momentum_wrote = writes
    by_a, by_s = held
    by_e, by_z, by_wrote, by_momentum_wrote = grads
    for j in range(0, columns, TILE):
        part, momentum_part = numbers(wrote, j, columns, TILE), numbers(momentum_wrote, j, columns, TILE)
        of_part, of_momentum = tl.zeros((TILE,), dtype=tl.float32), tl.zeros((TILE,), dtype=tl.float32)
        for row in range(0, rows, TILE):
            error = load(e, j, row, rows, columns, rows, TILE, TILE)
            x = by_rows(z, j, columns, by_a, row, rows, width, TILE)
            of_part += tl.sum(error * x, 1)
            x = part[:, None] * x
            if MOMENTUM:
                y = by_rows(z, j, columns, by_s, row, rows, width, TILE)
                of_momentum += tl.sum(error * y, 1)
                x += momentum_part[:, None] * y
            _add_tile(by_e, -x, j, row, columns, rows, TILE)
        _add(by_wrote, j, -of_part, columns, TILE)
        if MOMENTUM:
            _add(by_momentum_wrote, j, -of_momentum, columns, TILE)
        for column in range(0, width, TILE):
            x = part[:, None] * by_columns(e, j, columns, by_a, column, rows, width, TILE)
            if MOMENTUM:
                x += momentum_part[:, None] * by_columns(e, j, columns, by_s, column, rows, width, TILE)
            _add_tile(by_z, -x, j, column, columns, width, TILE)


@triton.jit
def _behind_back(k, e, anchor, by_behind, scratch, sizes, SILU: tl.constexpr, TILE: tl.constexpr):
    """The gradient of e₂ becomes that of W̄₁ᵀ e₁; scratch: act′, and through act″ the gradient of W̄₂ k."""
    outer, inner = anchor
    slopes, by_inner = scratch
    columns, width, hidden, depth = sizes
    for j in range(0, columns, TILE):
        for first in range(0, hidden, TILE):
            slope, curve = _curved(by_rows(k, j, columns, inner, first, hidden, width, TILE), SILU)
            back = by_columns(e, j, columns, outer, first, depth, hidden, TILE)
            grad = load(by_behind, j, first, hidden, columns, hidden, TILE, TILE)
            store(slopes, slope, j, first, columns, hidden, TILE, TILE)
            store(by_inner, grad * back * curve, j, first, columns, hidden, TILE, TILE)
            store(by_behind, grad * slope, j, first, columns, hidden, TILE, TILE)


@triton.jit
def _hidden_back(by_core, outer, h, by_h, by_length, scratch, sizes, NORMALISED: tl.constexpr, TILE: tl.constexpr):
    """The gradient of W̄₂ k, of that of core and of those of h so far."""
    slopes, by_inner = scratch
    columns, _, hidden, depth = sizes
    for j in range(0, columns, TILE):
        for first in range(0, hidden, TILE):
            x = by_columns(by_core, j, columns, outer, first, depth, hidden, TILE)
            x += load(by_h, j, first, hidden, columns, hidden, TILE, TILE)
            if NORMALISED:
                active = load(h, j, first, hidden, columns, hidden, TILE, TILE)
                x += 2 * active * numbers(by_length, j, columns, TILE)[:, None]
            x = x * load(slopes, j, first, hidden, columns, hidden, TILE, TILE)
            _add_tile(by_inner, x, j, first, columns, hidden, TILE)


@triton.jit
def _add_by_rows(target, x, weights, count, rows, width, TILE: tl.constexpr):
    """target (count, rows) += x (count, width) weightsᵀ."""
    for j in range(0, count, TILE):
        for row in range(0, rows, TILE):
            _add_tile(target, by_rows(x, j, count, weights, row, rows, width, TILE), j, row, count, rows, TILE)


@triton.jit
def _add_by_columns(target, x, weights, count, rows, width, TILE: tl.constexpr):
    """target (count, width) += x (count, rows) weights."""
    for j in range(0, count, TILE):
        for column in range(0, width, TILE):
            made = by_columns(x, j, count, weights, column, rows, width, TILE)
            _add_tile(target, made, j, column, count, width, TILE)


@triton.jit
def _add_outer(target, e, z, count, rows, width, TILE: tl.constexpr):
    """target (rows, width) += eᵀ z of `count` tokens."""
    for row in range(0, rows, TILE):
        for column in range(0, width, TILE):
            made = by_tokens(e, z, row, column, count, rows, width, TILE)
            _add_tile(target, made, row, column, rows, width, TILE)


@triton.jit
def _boundary_back(matrix, far, most, share, count, RADIUS: tl.constexpr, FLAT: tl.constexpr):
    """Of a boundary's W̄ and A those of A and W̄ before it; returns what is due to `most`."""
    new, initial, by_a, by_w, by_initial = matrix
    along, scale, limit, beyond = 0.0, 1.0, 1.0, False
    if RADIUS:
        distance, limit = tl.load(far), tl.load(most)
        beyond = distance > limit
        if beyond:
            scale = limit / distance
            total = tl.zeros((FLAT,), dtype=tl.float32)
            for first in range(0, count, FLAT):
                moved = numbers(new, first, count, FLAT) - numbers(initial, first, count, FLAT)
                total += moved * (numbers(by_a, first, count, FLAT) + numbers(by_w, first, count, FLAT))
            along = tl.sum(total, 0) / limit
    for first in range(0, count, FLAT):
        at = first + tl.arange(0, FLAT)
        grad = numbers(by_a, first, count, FLAT) + numbers(by_w, first, count, FLAT)
        if beyond:
            moved = numbers(new, first, count, FLAT) - numbers(initial, first, count, FLAT)
            kept = scale * (grad - moved * (along / limit))
            _add(by_initial, first, grad - kept, count, FLAT)
            grad = kept
        tl.store(by_a + at, grad * share, at < count)
        tl.store(by_w + at, grad * (1 - share), at < count)
    return along


@triton.jit
def _state_back(
    matrix,
    momentum,
    gates,
    count,
    MOMENTUM: tl.constexpr,
    TO_INITIAL: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Of A and S behind a piece those before it, with the reads' own; returns those of the three gates."""
    old, initial, by_a, by_old, by_initial = matrix
    held, by_s, by_held = momentum
    kept, moved, momentum_kept = gates
    of_kept, of_moved = tl.zeros((FLAT,), dtype=tl.float32), tl.zeros((FLAT,), dtype=tl.float32)
    of_s = tl.zeros((FLAT,), dtype=tl.float32)
    for first in range(0, count, FLAT):
        at = first + tl.arange(0, FLAT)
        grad, away = numbers(by_a, first, count, FLAT), numbers(old, first, count, FLAT)
        if TO_INITIAL:
            away -= numbers(initial, first, count, FLAT)
            _add(by_initial, first, (1 - kept) * grad, count, FLAT)
        of_kept += grad * away
        if MOMENTUM:
            s, of_after = numbers(held, first, count, FLAT), numbers(by_s, first, count, FLAT)
            of_moved += grad * s
            of_s += of_after * s
            made = moved * grad + momentum_kept * of_after + numbers(by_held, first, count, FLAT)
            tl.store(by_s + at, made, at < count)
        tl.store(by_a + at, kept * grad + numbers(by_old, first, count, FLAT), at < count)
    return tl.sum(of_kept, 0), tl.sum(of_moved, 0), tl.sum(of_s, 0)


@triton.jit
def _begun_back(by_initial, by_a, by_w, by_s, count, MOMENTUM: tl.constexpr, FLAT: tl.constexpr):
    """A document begins with W⁰: what came before it has no part."""
    for first in range(0, count, FLAT):
        _add(by_initial, first, numbers(by_a, first, count, FLAT) + numbers(by_w, first, count, FLAT), count, FLAT)
    clear(by_a, count, FLAT)
    clear(by_w, count, FLAT)
    if MOMENTUM:
        clear(by_s, count, FLAT)


@triton.jit
def _piece_back(
    made,
    of_made,
    steps,
    matrices,
    outputs,
    hold,
    shape,
    DEEP: tl.constexpr,
    BIAS: tl.constexpr,
    NORM: tl.constexpr,
    NORMALISED: tl.constexpr,
    SILU: tl.constexpr,
    MOMENTUM: tl.constexpr,
    TILE: tl.constexpr,
    V: tl.constexpr,
):
    """Of A and S behind a piece the gradients of its tokens and, added to it, of W̄. `hold`: scratch of a piece."""
    keys, e, h, back = made
    of_k, of_e, of_h, of_back = of_made
    writes, of_writes = steps
    outer, inner, by_a, by_a_2, by_s, by_s_2, by_w, by_w_2 = matrices
    given, norm, errors = outputs
    columns, width, hidden, depth = shape
    if DEEP:
        grads = of_back, of_k, of_writes[0], of_writes[1]
        _pair_back((back, keys), writes, (by_a_2, by_s_2), grads, columns, hidden, width, MOMENTUM, TILE)
        tl.debug_barrier()
        grads = of_e, of_h, of_writes[0], of_writes[1]
        _pair_back((e, h), writes, (by_a, by_s), grads, columns, depth, hidden, MOMENTUM, TILE)
        tl.debug_barrier()
        _behind_back(keys, e, (outer, inner), of_back, (hold[0], hold[1]), shape, SILU, TILE)
        tl.debug_barrier()
        _add_by_rows(of_e, of_back, outer, columns, depth, hidden, TILE)
        _add_outer(by_w, e, of_back, columns, depth, hidden, TILE)
        tl.debug_barrier()
        _errors_back(given, norm, outer, h, errors, shape, BIAS, NORM, NORMALISED, TILE, V)
        tl.debug_barrier()
        _hidden_back(of_e, outer, h, of_h, hold[2], (hold[0], hold[1]), shape, NORMALISED, TILE)
        _add_outer(by_w, of_e, h, columns, depth, hidden, TILE)
        tl.debug_barrier()
        _add_by_columns(of_k, hold[1], inner, columns, hidden, width, TILE)
        _add_outer(by_w_2, hold[1], keys, columns, hidden, width, TILE)
    else:
        grads = of_e, of_k, of_writes[0], of_writes[1]
        _pair_back((e, keys), writes, (by_a, by_s), grads, columns, depth, width, MOMENTUM, TILE)
        tl.debug_barrier()
        _errors_back(given, norm, outer, keys, errors, shape, BIAS, NORM, NORMALISED, TILE, V)
        tl.debug_barrier()
        _add_by_columns(of_k, of_e, outer, columns, depth, width, TILE)
        _add_outer(by_w, of_e, keys, columns, depth, width, TILE)


@triton.jit
def back_kernel(
    given,
    slow,
    slots,
    made,
    tokens,
    reads,
    carried,
    shares,
    scratch,
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
    """All pieces of one row and head. `tokens`, `shares` and, once `reads` are added, `carried` are the gradients."""
    k, target, delta, kept, wrote, moved, momentum_kept, momentum_wrote, ends, begun, anchors = given
    gain, shift, initial, initial_2, most = slow
    weights, weights_2, momentum, momentum_2 = slots
    pieces, batch, heads, columns, width, hidden, depth, delta_step, delta_width = sizes
    by_e, by_h, by_behind, by_k, by_target, by_delta, by_kept, by_wrote, by_moved, by_of_s, by_of_u = tokens
    place, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    row, head = place // heads, place % heads
    size, size_2, shape = depth * hidden, hidden * width, (columns, width, hidden, depth)
    initial, initial_2 = initial + head * size, initial_2 + head * size_2
    norm = gain + head * depth, shift + head * depth
    weights, momentum = weights + place * size, momentum + place * size
    weights_2, momentum_2 = weights_2 + place * size_2, momentum_2 + place * size_2
    step, step_2 = programs * size, programs * size_2
    by_a, by_w, by_s = carried[0] + place * size, carried[2] + place * size, carried[4] + place * size
    by_a_2, by_w_2, by_s_2 = carried[1] + place * size_2, carried[3] + place * size_2, carried[5] + place * size_2
    by_initial, by_initial_2 = shares[0] + place * size, shares[1] + place * size_2
    by_gain, by_shift, by_most = shares[2] + place * depth, shares[3] + place * depth, shares[4] + 2 * place
    by_length, mean = scratch[2] + place * columns, 1.0
    hold = scratch[0] + place * columns * hidden, scratch[1] + place * columns * hidden, by_length
    if MEAN > 0:
        mean = 1 / MEAN
    for behind in range(pieces):
        n = pieces - 1 - behind
        one = n * programs + place
        at = tl.load(anchors + n * batch + row)
        keys, outer, inner = k + one * columns * width, weights + at * step, weights_2 + at * step_2
        if tl.load(ends + n * batch + row) != 0:
            matrix = weights + (n + 2) * step, initial, by_a, by_w, by_initial
            far, limit = made[3] + 2 * one, most + 2 * head
            along = _boundary_back(matrix, far, limit, mean, size, RADIUS, FLAT)
            if RADIUS:
                tl.store(by_most, tl.load(by_most) + along)
            if DEEP:
                matrix = weights_2 + (n + 2) * step_2, initial_2, by_a_2, by_w_2, by_initial_2
                along = _boundary_back(matrix, far + 1, limit + 1, mean, size_2, RADIUS, FLAT)
                if RADIUS:
                    tl.store(by_most + 1, tl.load(by_most + 1) + along)
        tl.debug_barrier()
        e, of_e, of_k = made[0] + one * columns * depth, by_e + one * columns * depth, by_k + one * columns * width
        h, of_h = made[1] + one * columns * hidden, by_h + one * columns * hidden
        writes = wrote + one * columns, momentum_wrote + one * columns
        of_writes = by_wrote + one * columns, by_of_u + one * columns
        given_one = target + one * columns * depth, delta + one * columns * delta_step, delta_step, delta_width
        of_delta = by_delta + one * columns * delta_step
        errors = of_e, by_target + one * columns * depth, of_delta, by_gain, by_shift, by_length
        back, of_back = made[2] + one * columns * hidden, by_behind + one * columns * hidden
        one_made, of_made = (keys, e, h, back), (of_k, of_e, of_h, of_back)
        matrices = outer, inner, by_a, by_a_2, by_s, by_s_2, by_w, by_w_2
        _piece_back(
            one_made,
            of_made,
            (writes, of_writes),
            matrices,
            (given_one, norm, errors),
            hold,
            shape,
            DEEP,
            BIAS,
            NORM,
            NORMALISED,
            SILU,
            MOMENTUM,
            TILE,
            V,
        )
        tl.debug_barrier()
        gates = tl.load(kept + one), 0.0, 0.0
        if MOMENTUM:
            gates = gates[0], tl.load(moved + one), tl.load(momentum_kept + one)
        matrix = weights + (n + 1) * step, initial, by_a, reads[0] + one * size, by_initial
        held = momentum + n * step, by_s, reads[2] + one * size
        of_kept, of_moved, of_s = _state_back(matrix, held, gates, size, MOMENTUM, TO_INITIAL, FLAT)
        if DEEP:
            matrix = weights_2 + (n + 1) * step_2, initial_2, by_a_2, reads[1] + one * size_2, by_initial_2
            held = momentum_2 + n * step_2, by_s_2, reads[3] + one * size_2
            more, more_moved, more_s = _state_back(matrix, held, gates, size_2, MOMENTUM, TO_INITIAL, FLAT)
            of_kept, of_moved, of_s = of_kept + more, of_moved + more_moved, of_s + more_s
        tl.store(by_kept + one, of_kept)
        if MOMENTUM:
            tl.store(by_moved + one, of_moved)
            tl.store(by_of_s + one, of_s)
        tl.debug_barrier()
        if PACKED:
            if tl.load(begun + n * batch + row) != 0:
                _begun_back(by_initial, by_a, by_w, by_s, size, MOMENTUM, FLAT)
                if DEEP:
                    _begun_back(by_initial_2, by_a_2, by_w_2, by_s_2, size_2, MOMENTUM, FLAT)
            tl.debug_barrier()
