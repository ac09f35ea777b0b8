"""The convolution in Triton: one pass forward, one pass backward. Its tests pass on an H100.

Each program owns a block of tokens and channels and reads it once per tap; the taps after the first come from the
cache. The backward pass meets every pair (input, later gradient) once and takes from it both the gradient of the input
and a partial gradient of the weight, one per program, summed in a fixed order afterwards: no atomics, equal bits
every time. Products and sums are in float32.
"""
# pyright: reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from atma.ops.gpu import narrow
from atma.ops.operator import operator

MAX_TAPS = 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def causal_conv(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    """Arguments of the reference; x, weight and tail in float16, bfloat16 or float32, at most 8 taps."""
    if weight.shape[1] > MAX_TAPS:
        raise ValueError(f"the Triton convolution takes at most {MAX_TAPS} taps, not {weight.shape[1]}")
    for tensor in (x, weight, x if tail is None else tail):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"the Triton convolution takes float16, bfloat16 and float32, not {tensor.dtype}")
    return _operation(x, weight, tail, segment_ids)


@triton.jit
def _rows(pointer, row, at, seen, channel, real, length, channels):
    """(ROWS, COLUMNS) float32 of one batch row at times `at`, zero where not `seen`."""
    offsets = (row * length + at)[:, None] * channels + channel[None, :]
    return tl.load(pointer + offsets, mask=seen[:, None] & real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _continues(segment_ids, row, at, seen, length):
    """Whether the token at time `at` is of the document of the one before it; true where not `seen`."""
    seen = seen & (at > 0)
    before = tl.load(segment_ids + row * length + at - 1, mask=seen, other=0)
    return before == tl.load(segment_ids + row * length + at, mask=seen, other=0)


@triton.jit
def _forward_kernel(
    x,
    weight,
    tail,
    segment_ids,
    y,
    length,
    channels,
    TAPS: tl.constexpr,
    TAILED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2).to(tl.int64)
    inside, real = at < length, channel < channels
    # Whether a token is of the document of the one `lag` before it: carried along as the lag grows.
    together = inside
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for lag in tl.static_range(TAPS):
        # y[t] = Σ_lag w[W − 1 − lag] x[t − lag]; the last tap is the current token's.
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=real, other=0.0).to(tl.float32)
        seen = inside & (at >= lag)
        if PACKED and lag > 0:
            together = together & _continues(segment_ids, row, at - lag + 1, seen, length)
            seen = seen & together
        value = _rows(x, row, at - lag, seen, channel, real, length, channels)
        if TAILED:
            # Before this call the inputs are the tail's; one of the two reads is zero.
            value += _rows(tail, row, at - lag + TAPS - 1, inside & (at < lag), channel, real, TAPS - 1, channels)
        total += value * tap[None, :]
    offsets = (row * length + at)[:, None] * channels + channel[None, :]
    tl.store(y + offsets, narrow(total, y.dtype.element_ty), mask=inside[:, None] & real[None, :])


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    tail,
    segment_ids,
    grad_x,
    grad_tail,
    partial,
    length,
    channels,
    TAPS: tl.constexpr,
    TAILED: tl.constexpr,
    PACKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Inputs at times `at`, negative ones in the tail; `partial` (B · blocks, taps, C) is this program's share."""
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if TAILED:
        # The tail's W − 1 inputs stand before x and are treated as it is.
        at -= TAPS - 1
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = tl.program_id(2).to(tl.int64)
    inside, real = (at >= 0) & (at < length), channel < channels
    value = _rows(x, row, at, inside, channel, real, length, channels)
    if TAILED:
        value += _rows(tail, row, at + TAPS - 1, at < 0, channel, real, TAPS - 1, channels)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    together = at < length
    share = (row * tl.num_programs(0) + tl.program_id(0)) * TAPS
    for lag in tl.static_range(TAPS):
        tap = tl.load(weight + channel * TAPS + (TAPS - 1 - lag), mask=real, other=0.0).to(tl.float32)
        seen = (at + lag >= 0) & (at + lag < length)
        if PACKED and lag > 0:
            together = together & _continues(segment_ids, row, at + lag, seen, length)
            seen = seen & together
        # Input t meets the gradient of token t + lag: w · that for itself, that · itself for the tap.
        later = _rows(grad, row, at + lag, seen, channel, real, length, channels)
        total += later * tap[None, :]
        tl.store(partial + (share + TAPS - 1 - lag) * channels + channel, tl.sum(later * value, 0), mask=real)
    offsets = (row * length + at)[:, None] * channels + channel[None, :]
    tl.store(grad_x + offsets, narrow(total, grad_x.dtype.element_ty), mask=inside[:, None] & real[None, :])
    if TAILED:
        offsets = (row * (TAPS - 1) + at + TAPS - 1)[:, None] * channels + channel[None, :]
        # What fell before the call is the tail's gradient.
        low = narrow(total, grad_tail.dtype.element_ty)
        tl.store(grad_tail + offsets, low, mask=(at < 0)[:, None] & real[None, :])


def _blocks(count: int, channels: int) -> tuple[int, int]:
    """Tokens and channels of one program."""
    return min(32, triton.next_power_of_2(count)), min(64, triton.next_power_of_2(channels))


def _forward(x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    tail, segment_ids = (None if z is None else z.contiguous() for z in (tail, segment_ids))
    batch, length, channels = x.shape
    y, taps, (rows, columns) = torch.empty_like(x), weight.shape[1], _blocks(length, channels)
    tailed = tail is not None and taps > 1
    grid = triton.cdiv(length, rows), triton.cdiv(channels, columns), batch
    with torch.cuda.device_of(x):
        _forward_kernel[grid](
            x, weight, tail, segment_ids, y, length, channels, taps, tailed, segment_ids is not None, rows, columns
        )
    return y


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, tail: Tensor | None, segment_ids: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    tail, segment_ids = (None if z is None else z.contiguous() for z in (tail, segment_ids))
    batch, length, channels = x.shape
    taps = weight.shape[1]
    tailed = tail is not None and taps > 1
    count = length + taps - 1 if tailed else length
    rows, columns = _blocks(count, channels)
    grid = triton.cdiv(count, rows), triton.cdiv(channels, columns), batch
    grad_x, grad_tail = torch.empty_like(x), x.new_empty(0) if tail is None else torch.empty_like(tail)
    # Shares of grad W by program, summed in order below.
    partial = x.new_empty(batch * grid[0], taps, channels, dtype=torch.float32)
    packed = segment_ids is not None
    tensors = grad, x, weight, tail, segment_ids, grad_x, grad_tail, partial
    with torch.cuda.device_of(x):
        _backward_kernel[grid](*tensors, length, channels, taps, tailed, packed, rows, columns)
    return grad_x, partial.sum(0).mT.contiguous().to(weight.dtype), grad_tail


_operation = operator("atma::causal_conv_gpu", _forward, _backward, lambda x, *_: x.new_empty(x.shape))
