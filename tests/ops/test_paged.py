"""Attention over pages: the reference's numbers, and the same bits for a query whatever else is in the call."""

import pytest
import torch

from atma.ops import native, paged, polar_attention, softmax_attention, use_backend
from atma.ops.paged import Pages

needs_kernels = pytest.mark.skipif(not native.available(torch.float32), reason="needs the compiled kernels")
SHAPES = [(1, 1, 8, 16), (4, 2, 16, 16), (6, 2, 24, 32), (3, 3, 64, 48), (8, 1, 40, 16)]
"""Query heads, key heads, head width, page."""


def _case(shape, lengths, queries, dtype=torch.float64):
    """q, pages of keys and values, and the same keys and values contiguous, of rows that hold `lengths` keys before."""
    heads, groups, width, page = shape
    generator = torch.Generator().manual_seed(sum(lengths) + queries)
    rows, longest = len(lengths), max(lengths) + queries
    count = -(-longest // page)
    q, k, v = (
        torch.randn(rows, n, size, width, generator=generator, dtype=torch.float64).to(dtype)
        for n, size in ((heads, queries), (groups, longest), (groups, longest))
    )
    table = torch.randperm(rows * count + 3, generator=generator, dtype=torch.int32)[: rows * count].view(rows, count)
    keys = Pages(torch.full((rows * count + 3, groups, width, page), torch.nan, dtype=dtype), table)
    values = Pages(torch.full((rows * count + 3, groups, page, width), torch.nan, dtype=dtype), table)
    return q, k, v, keys, values, torch.tensor(lengths, dtype=torch.int32)


def _scalars(heads, width, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(heads, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    return (*values, torch.randn(heads, width, generator=generator, dtype=torch.float64).to(dtype))


def _fill(k, v, keys, values, start):
    """Hold each row's keys in two calls, the second from the row's own length on."""
    for b, length in enumerate(start.tolist()):
        table = keys.table[b : b + 1]
        own = Pages(keys.pool, table), Pages(values.pool, table)
        zero = torch.zeros(1, dtype=torch.int32)
        if length:
            paged.hold(*own, k[b : b + 1, :, :length], v[b : b + 1, :, :length], zero)
    queries = k.shape[2] - int(start.max())
    new_k, new_v = (torch.stack([x[b, :, n : n + queries] for b, n in enumerate(start.tolist())]) for x in (k, v))
    paged.hold(keys, values, new_k, new_v, start)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lengths", "queries"), [((0,), 1), ((0,), 70), ((5, 63, 31), 1), ((100, 0, 17, 64), 33)])
@torch.no_grad()
def test_pages_give_what_contiguous_keys_give(shape, lengths, queries, window, backend) -> None:
    q, k, v, keys, values, start = _case(shape, lengths, queries)
    scalars = _scalars(shape[0], shape[2])
    with use_backend(backend):
        _fill(k, v, keys, values, start)
        c, magnitude = paged.polar_attention(q, keys, values, scalars, start, window, 50, 2.0)
        read = paged.softmax_attention(q, keys, values, 0.3, start, window)
    expected = polar_attention(q, k, v, *scalars, start, None, window, 50, 2.0, backend="reference")
    torch.testing.assert_close(c, expected[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(magnitude, expected[1], rtol=1e-10, atol=1e-10)
    expected = softmax_attention(q, k, v, 0.3, start, None, window, backend="reference")
    torch.testing.assert_close(read, expected, rtol=1e-10, atol=1e-10)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_query_s_bits_do_not_depend_on_the_call(shape, dtype, threads) -> None:
    q, k, v, keys, values, start = _case(shape, (0, 0), 150, dtype)
    _fill(k, v, keys, values, start)
    scalars, before = _scalars(shape[0], shape[2], dtype), torch.get_num_threads()
    c, magnitude = paged.polar_attention(q, keys, values, scalars, start, None, 50, 2.0)
    try:
        torch.set_num_threads(threads)
        for at, count in ((0, 1), (149, 1), (70, 7), (3, 100)):
            table = keys.table[1:]
            one = Pages(keys.pool, table), Pages(values.pool, table)
            some = paged.polar_attention(
                q[1:, :, at : at + count], *one, scalars, torch.tensor([at], dtype=torch.int32), None, 50, 2.0
            )
            assert torch.equal(some[0], c[1:, :, at : at + count])
            assert torch.equal(some[1], magnitude[1:, :, at : at + count])
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def test_what_lies_behind_a_text_in_its_pages_is_never_read() -> None:
    shape = (2, 1, 16, 16)
    q, k, v, keys, values, start = _case(shape, (20,), 1, torch.float32)
    for backend in ("auto", "cpu"):
        with use_backend(backend):
            _fill(k, v, keys, values, start)
            assert paged.softmax_attention(q, keys, values, 0.3, start, None).isfinite().all()


def test_gathered_pages_are_the_keys_in_order_and_zero_behind() -> None:
    _, k, v, keys, values, start = _case((2, 2, 8, 16), (20, 3), 1)
    with torch.no_grad():
        _fill(k, v, keys, values, start)
    got = paged.gather(keys, values, start, 1, None)
    for b, length in enumerate((21, 4)):
        for whole, expected in zip((got.keys, got.values), (k, v), strict=True):
            assert torch.equal(whole[b, :, :length], expected[b, :, :length])
            assert not whole[b, :, length:].any()
    assert got.keys.shape[2] == 32
    assert torch.equal(got.start, start)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
@torch.no_grad()
def test_a_text_with_a_window_may_be_longer_than_its_table_which_is_a_ring(backend) -> None:
    length, window, page = 150, 20, 16
    q, k, v, keys, values, _ = _case((2, 2, 8, page), (0,), length)
    expected = softmax_attention(q, k, v, 0.3, None, None, window, backend="reference")
    ring = keys.table[:, :4]  # room for 64 positions: the window and a call of 20
    keys, values = keys._replace(table=ring), values._replace(table=ring)
    with use_backend(backend):
        for at in range(0, length, 20):
            start, some = torch.tensor([at], dtype=torch.int32), slice(at, min(at + 20, length))
            paged.hold(keys, values, k[:, :, some], v[:, :, some], start)
            read = paged.softmax_attention(q[:, :, some], keys, values, 0.3, start, window)
            torch.testing.assert_close(read, expected[:, :, some], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_key_that_is_not_finite_spoils_only_the_queries_that_see_it(shape, window) -> None:
    q, k, v, keys, values, start = _case(shape, (0, 17), 70)
    at = 33
    k[0, :, at], v[0, :, at] = torch.nan, torch.inf
    _fill(k, v, keys, values, start)
    c, magnitude = paged.polar_attention(q, keys, values, _scalars(shape[0], shape[2]), start, window, 50, 2.0)
    seen = torch.zeros(2, 70, dtype=torch.bool)
    seen[0, at : None if window is None else at + window] = True
    for y in (c.isfinite().all(-1), magnitude.isfinite()):
        assert torch.equal(y.all(1), ~seen)
