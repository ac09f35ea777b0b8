"""The loss in Triton: logits exist a tile at a time. Its tests pass on an H100.

Forward, a program owns a block of tokens and a slice of the vocabulary, computes the slice's logits tile by tile and
keeps a running log-sum-exp; the slices are joined afterwards. Backward, the vocabulary is cut into slices of bounded
(tokens × slice) size; one kernel computes a slice's logits again and leaves ∂loss/∂logit in the hidden states' dtype,
and two products take from it the gradients of the hidden states and of the weight. Each logit is computed twice in all,
whatever the width; every sum has a fixed order. Products of float32 inputs are IEEE, never tf32.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import add_dot, narrow
from atma.ops.loss.operator import loss_operator, of_bias

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FORWARD_SLICE = 4096
"""Vocabulary of one forward program."""
BACKWARD_LOGITS = 1 << 26
"""Entries of ∂loss/∂logit held at once, as long as a slice has `SMALLEST_SLICE` words: 128 MiB in bfloat16."""
SMALLEST_SLICE = 2048


def losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> Tensor:
    """(N,) float32 nats for hidden (N, D) and weight (V, D), of one dtype: float16, bfloat16 or float32."""
    if torch.is_autocast_enabled(hidden.device.type):
        low = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(low), weight.to(low)
    if hidden.dtype not in DTYPES or weight.dtype != hidden.dtype:
        found = f"{hidden.dtype} and {weight.dtype}"
        raise ValueError(f"the Triton loss takes hidden and weight both float16, bfloat16 or float32, not {found}")
    return _operation(hidden, weight, bias, targets, cap)[0]


@triton.jit
def _product_tile(
    a, b, row, column, rows, columns, inner, a_row, a_inner, b_inner, b_column, total, DEPTH: tl.constexpr
):
    """total + the tile at (row, column) of a (rows, inner) · b (inner, columns), both addressed by strides."""
    a += row.to(tl.int64)[:, None] * a_row
    b += column.to(tl.int64)[None, :] * b_column
    within, across = (row < rows)[:, None], (column < columns)[None, :]
    for start in range(0, inner, DEPTH):
        at = start + tl.arange(0, DEPTH).to(tl.int64)
        left = tl.load(a + at[None, :] * a_inner, mask=within & (at < inner)[None, :], other=0.0)
        right = tl.load(b + at[:, None] * b_inner, mask=across & (at < inner)[:, None], other=0.0)
        total = add_dot(total, left, right)
    return total


@triton.jit
def _logits(
    hidden,
    weight,
    bias,
    row,
    column,
    rows,
    columns,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
):
    """(ROWS, COLUMNS) float32 logits before the cap; a column past the last is zero, plus no bias."""
    z = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    z = _product_tile(hidden, weight, row, column, rows, columns, width, width, 1, 1, width, z, DEPTH)
    if BIASED:
        z += tl.load(bias + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    return z


@triton.jit
def _slope(z, cap):
    """y / z of y = cap z / √(z² + cap²), 1 for no cap: 0."""
    return tl.where(cap > 0, cap * tl.rsqrt(z * z + tl.where(cap > 0, cap * cap, 1.0)), 1.0)


@triton.jit
def _forward_kernel(
    hidden,
    weight,
    bias,
    targets,
    partitions,
    chosen,
    cap,
    rows,
    columns,
    width,
    slice_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Row `program_id(1)` of partitions (slices, N): log Σ exp of a slice's logits; of chosen: the target's, or 0."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    target = tl.load(targets + row, mask=row < rows, other=-1)
    highest = tl.full((ROWS,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((ROWS,), dtype=tl.float32)
    found = tl.zeros((ROWS,), dtype=tl.float32)
    first = tl.program_id(1) * slice_width
    for start in range(first, tl.minimum(first + slice_width, columns), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        z = _logits(hidden, weight, bias, row, column, rows, columns, width, ROWS, COLUMNS, DEPTH, BIASED)
        # y = cap z / √(z² + cap²); words past the last weigh nothing.
        y = z * _slope(z, cap)
        y = tl.where((column < columns)[None, :], y, float("-inf"))
        # log Σ exp with a running maximum, as in attention; no logit is stored.
        higher = tl.maximum(highest, tl.max(y, 1))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(y - higher[:, None]), 1)
        # The target's y, from the one program whose slice holds it; 0 from the others, which are added up later.
        found += tl.sum(tl.where(column[None, :] == target[:, None], y, 0.0), 1)
        highest = higher
    at = tl.program_id(1).to(tl.int64) * rows + row
    tl.store(partitions + at, highest + tl.log(total), mask=row < rows)
    tl.store(chosen + at, found, mask=row < rows)


@triton.jit
def _slope_kernel(
    hidden,
    weight,
    bias,
    targets,
    partition,
    grad,
    slopes,
    bias_shares,
    cap,
    rows,
    columns,
    width,
    first,
    slice_width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BIASED: tl.constexpr,
):
    """slopes (N, slice): grad · ∂loss/∂z for the words from `first`; bias_shares (row blocks, slice): row sums."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column = first + place
    z = _logits(hidden, weight, bias, row, column, rows, columns, width, ROWS, COLUMNS, DEPTH, BIASED)
    # slope = y / z, and dy/dz = slope³.
    slope = _slope(z, cap)
    inside = row < rows
    target = tl.load(targets + row, mask=inside, other=-1)
    normaliser = tl.load(partition + row, mask=inside, other=0.0)
    scale = tl.load(grad + row, mask=inside, other=0.0)
    # ∂loss/∂y = softmax(y) − [word is the target].
    p = tl.exp(z * slope - normaliser[:, None]) - tl.where(column[None, :] == target[:, None], 1.0, 0.0)
    p = tl.where(inside[:, None], p * scale[:, None] * (slope * slope * slope), 0.0)
    real = place < slice_width
    offsets = row.to(tl.int64)[:, None] * slice_width + place[None, :]
    tl.store(slopes + offsets, narrow(p, slopes.dtype.element_ty), mask=inside[:, None] & real[None, :])
    if BIASED:
        # A row of shares a program, summed afterwards in order: no atomics.
        tl.store(bias_shares + tl.program_id(0) * slice_width + place, tl.sum(p, 0), mask=real)


@triton.jit
def _product_kernel(
    a,
    b,
    out,
    rows,
    columns,
    inner,
    a_row,
    a_inner,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    ADDED: tl.constexpr,
):
    """out (rows, columns) = a · b, added to what is there if ADDED; b (inner, columns) row by row."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    total = _product_tile(a, b, row, column, rows, columns, inner, a_row, a_inner, columns, 1, total, DEPTH)
    if ADDED:
        total += tl.load(at, mask=mask, other=0.0)
    tl.store(at, narrow(total, out.dtype.element_ty), mask=mask)


def _tiles(dtype: torch.dtype) -> dict[str, int]:
    """Tile of a product and how it is run: float32 has no tensor cores to feed and twice the bytes."""
    if dtype == torch.float32:
        return {"ROWS": 64, "COLUMNS": 64, "DEPTH": 32, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLUMNS": 128, "DEPTH": 64, "num_warps": 8, "num_stages": 3}


def _forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Losses and log partition sums, both (N,) float32."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, width), columns, tiles = hidden.shape, weight.shape[0], _tiles(hidden.dtype)
    slices = triton.cdiv(columns, FORWARD_SLICE)
    partitions = hidden.new_empty(slices, rows, dtype=torch.float32)
    chosen = torch.empty_like(partitions)
    tensors = hidden, weight, None if bias is None else bias.contiguous(), targets, partitions, chosen
    grid, sizes = (triton.cdiv(rows, tiles["ROWS"]), slices), (rows, columns, width, FORWARD_SLICE)
    if rows > 0:
        with torch.cuda.device_of(hidden):
            _forward_kernel[grid](*tensors, cap, *sizes, BIASED=bias is not None, **tiles)
    # The slices of the vocabulary joined, in their order.
    partition = partitions.logsumexp(0)
    return (partition - chosen.sum(0)).masked_fill_(targets < 0, 0), partition


def _backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, partition: Tensor, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    (rows, width), columns = hidden.shape, weight.shape[0]
    grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    grad_weight, grad_bias = torch.zeros_like(weight), torch.zeros(columns, device=hidden.device)
    if rows == 0:
        return grad_hidden.to(hidden.dtype), grad_weight, of_bias(grad_bias, bias, hidden)
    widest = min(columns, max(SMALLEST_SLICE, BACKWARD_LOGITS // rows))
    slopes = hidden.new_empty(rows * widest)
    tensors = hidden, weight, None if bias is None else bias.contiguous(), targets, partition
    scale = grad.contiguous().masked_fill(targets < 0, 0)
    with torch.cuda.device_of(hidden):
        for first in range(0, columns, widest):
            count = min(widest, columns - first)
            part, words = slopes[: rows * count], slice(first, first + count)
            shares = _slopes((*tensors, scale, part), cap, (rows, columns, width, first, count))
            grad_bias[words] = shares.sum(0)
            # grad hidden gains a slice's share; grad weight of these words is complete.
            _product(part, weight[words], grad_hidden, (rows, width, count), (count, 1), True)
            _product(part, hidden, grad_weight[words], (count, width, rows), (1, count), False)
    return grad_hidden.to(hidden.dtype), grad_weight, of_bias(grad_bias, bias, hidden)


def _slopes(tensors: tuple, cap: float, sizes: tuple[int, ...]) -> Tensor:
    """Run the slope kernel; returns the shares of the bias's gradient, (row blocks, slice) or one row of zeros."""
    biased, tiles = tensors[2] is not None, _tiles(tensors[0].dtype)
    grid = triton.cdiv(sizes[0], tiles["ROWS"]), triton.cdiv(sizes[-1], tiles["COLUMNS"])
    shares = torch.zeros(grid[0] if biased else 1, sizes[-1], device=tensors[0].device)
    _slope_kernel[grid](*tensors, shares, cap, *sizes, BIASED=biased, **tiles)
    return shares


def _product(a: Tensor, b: Tensor, out: Tensor, sizes: tuple[int, int, int], strides: tuple, added: bool) -> None:
    tiles = _tiles(b.dtype)
    grid = triton.cdiv(sizes[0], tiles["ROWS"]), triton.cdiv(sizes[1], tiles["COLUMNS"])
    _product_kernel[grid](a, b, out, *sizes, *strides, ADDED=added, **tiles)


_operation = loss_operator("atma::softcap_loss_gpu", _forward, _backward)
