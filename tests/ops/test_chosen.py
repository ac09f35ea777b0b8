"""Pages chosen by scores, and attention over them: every backend against the materialised oracle."""

import pytest
import torch

from atma.ops.backend import use_backend
from atma.ops.chosen import choose_pages, chosen_statistics, hold_rows, page_boxes, slots_of
from atma.ops.paged.pages import Pages
from atma.ops.polar import statistics_of
from tests.ops.backends import FAST

B, H, G, K, PAGE = 2, 4, 2, 20, 4


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ends(queries: int, starts: tuple[int, ...]) -> torch.Tensor:
    return (torch.tensor(starts)[:, None] + torch.arange(queries) + 1).int()


def in_pages(x: torch.Tensor, size: int) -> Pages:
    """The rows (B, G, S, ·), S a multiple of `size`, in a pool whose pages lie in any order."""
    count = x.shape[2] // size
    order = torch.randperm(len(x) * count, generator=torch.Generator().manual_seed(1))
    pool = torch.full((len(x) * count, x.shape[1], size, x.shape[3]), torch.nan, dtype=x.dtype)
    pool[order] = x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    return Pages(pool, order.view(len(x), count).int())


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("queries", "starts"), [(1, (0, 60)), (1, (95, 7)), (40, (0, 23)), (96, (0, 0))])
@pytest.mark.parametrize(("k", "window"), [(0, 1), (3, 1), (3, 6), (99, 9)])
@pytest.mark.parametrize("backend", FAST)
@torch.no_grad()
def test_each_query_chooses_the_pages_of_largest_score_before_its_window(backend, k, window, queries, starts, paged):
    summaries, u, last = drawn(B, G, 96, 5), drawn(B, H, queries, 19, seed=1), ends(queries, starts)
    summaries[:, :, 4:8] = summaries[:, :, 12:16]  # equal scores
    whole = choose_pages(u, summaries, last, PAGE, k, window, "reference")
    found = choose_pages(u, in_pages(summaries, 8) if paged else summaries, last, PAGE, k, window, backend)
    assert found.shape == (B, H, queries, slots_of(k, window, PAGE)) and torch.equal(found, whole)
    for b, h, i in [(0, 1, 0), (1, 3, queries - 1)]:
        end = int(last[b, i])
        near = list(range(max(0, end - window) // PAGE, (end - 1) // PAGE + 1))
        scores = [float(u[b, h, i] @ summaries[b, h // 2, n * PAGE :][:PAGE].flatten()[:19]) for n in range(near[0])]
        best = sorted(range(near[0]), key=lambda n: (-scores[n], n))[:k]
        assert [n for n in found[b, h, i].tolist() if n >= 0] == sorted(best) + near


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(("queries", "starts"), [(1, (0, 60)), (37, (0, 23))])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("many", [False, True], ids=["one query", "a query a page"])
@pytest.mark.parametrize("backend", FAST)
@torch.no_grad()
def test_the_sums_are_those_of_the_chosen_keys(backend, many, biased, queries, starts, paged):
    q, k, v, scale = (
        drawn(B, H, queries, K),
        drawn(B, G, 64, K, seed=1),
        drawn(B, G, 64, K, seed=2),
        drawn(B, H, queries),
    )
    last = ends(queries, starts)
    pages = choose_pages(drawn(B, H, queries, 4), drawn(B, G, 64, 1, seed=4), last, PAGE, 2, 5, "reference")
    bias = drawn(B, H, queries, pages.shape[3], seed=5) if biased else None
    q = drawn(B, H, queries, pages.shape[3], K, seed=6) if many else q
    whole = chosen_statistics(q, k, v, scale, (pages, PAGE), last, bias, "reference")
    held = [in_pages(x, 8) if paged else x for x in (k, v)]
    found = chosen_statistics(q, *held, scale, (pages, PAGE), last, bias, backend)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
@torch.no_grad()
def test_all_pages_chosen_are_the_sums_over_all_keys(backend):
    q, k, v, scale, last = (
        drawn(B, H, 30, K),
        drawn(B, G, 50, K),
        drawn(B, G, 50, K),
        drawn(B, H, 30),
        ends(30, (0, 20)),
    )
    pages = choose_pages(drawn(B, H, 30, 4), drawn(B, G, 50, 1), last, PAGE, 99, 1, backend)
    found = chosen_statistics(q, k, v, scale, (pages, PAGE), last, None, backend)
    whole = statistics_of(backend, q)(q, k, v, scale, torch.zeros_like(last), last)
    for one, other in zip(found, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("backend", FAST)
@torch.no_grad()
def test_a_page_has_its_box_once_it_is_full(backend, paged):
    keys, boxes = drawn(B, G, 64, 6), torch.zeros(B, G, 64, 3, dtype=torch.float64)
    held, into = (in_pages(x, 8) if paged else x for x in (keys, boxes))
    with use_backend(backend):
        into = page_boxes(held, into, torch.tensor([3, 10], dtype=torch.int32), 15, PAGE)
    found = into if isinstance(into, torch.Tensor) else into.pool[into.table.long()].transpose(1, 2).flatten(2, 3)
    for row, full in enumerate([range(4), range(2, 6)]):
        for n in range(16):
            page = keys[row, :, n * PAGE : (n + 1) * PAGE]
            box = torch.cat([page.amin(1), page.amax(1)], -1) if n in full else torch.zeros(G, 12, dtype=torch.float64)
            assert torch.equal(found[row, :, n * PAGE : (n + 1) * PAGE].flatten(1), box)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("backend", FAST)
@torch.no_grad()
def test_rows_are_held_in_pages_at_their_positions(backend, dtype):
    x = (drawn(B, G, 11, 3) * 9).to(dtype)
    whole = torch.zeros(B, G, 32, 3, dtype=dtype)
    held = in_pages(whole.double(), 8)
    held = held._replace(pool=held.pool.to(dtype))
    with use_backend(backend):
        hold_rows(held, x, torch.tensor([0, 17], dtype=torch.int32))
    whole[0, :, :11], whole[1, :, 17:28] = x[0], x[1]
    assert torch.equal(held.pool[held.table.long()].transpose(1, 2).flatten(2, 3), whole)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@torch.no_grad()
def test_a_query_without_any_page_has_sums_of_nothing(backend):
    q, k, v, last = drawn(1, 2, 3, K), drawn(1, 1, 8, K), drawn(1, 1, 8, K), ends(3, (0,))
    pages = torch.full((1, 2, 3, 2), -1, dtype=torch.int32)
    S, L, Q, M = chosen_statistics(q, k, v, drawn(1, 2, 3), (pages, PAGE), last, None, backend)
    assert not S.any() and not L.any() and not Q.any() and M.max() < -1e29


def test_what_does_not_fit_is_told():
    u, summaries, last = drawn(B, H, 3, 9), drawn(B, G, 16, 2), ends(3, (0, 0))
    with pytest.raises(ValueError, match="cannot hold the 9 of u"):
        choose_pages(u, summaries, last, PAGE, 1, 1)
    with pytest.raises(ValueError, match="window at least 1, not 1 and 0"):
        choose_pages(u[..., :8], summaries, last, PAGE, 1, 0)
    with pytest.raises(ValueError, match="H a multiple of G"):
        choose_pages(u[:, :3, :, :8], summaries, last, PAGE, 1, 1)
