"""The choosing of keys against searches written out query by query: in every backend, in pages, however it is cut."""

import pytest
import torch

from atma.ops import native, search
from atma.ops.paged import Pages
from atma.ops.search import Reach

BACKENDS = ["reference", *(["native"] if native.available(torch.float64) else [])]
HIP = [Reach(2, 8, 4, 6), Reach(2, 16, 0, 0), Reach(4, 12, 8, 5), Reach(1, 3, 1, 1), Reach(2, 4, 2, 7)]
HEAVY = [
    Reach(4, window=6, share=8, least=8, most=16),
    Reach(2, window=0, share=3, least=1, most=9),
    Reach(4, window=1),
]


def case(length, heads=4, groups=2, width=8, seed=0, rows=2):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(rows, n, length, width, generator=generator, dtype=torch.float64) for n in (heads, groups))
    return q, k, torch.arange(1, length + 1, dtype=torch.int32).expand(rows, -1)


def halving(q, k, last, reach):
    """The blocks that a query reads by mixers.md, section 6.2, with lists."""
    block, end = reach.block, max(last - reach.window, 0)
    count = end - reach.sinks
    if count <= reach.kept:
        return list(range(-(-last // block)))
    total, parts = -(-count // block), reach.kept // block
    intervals = [range(j * total // parts, (j + 1) * total // parts) for j in range(parts)]

    def score(part):
        first = range(reach.sinks + part[0] * block, min(reach.sinks + (part[0] + 1) * block, end))
        return max(float(q @ k[s]) for s in first)

    while any(len(part) > 1 for part in intervals):
        cut = [half for part in intervals for half in (part[: len(part) // 2], part[len(part) // 2 :]) if len(half)]
        best = sorted(cut, key=lambda part: (-score(part), part[0]))[:parts]
        intervals = sorted(best, key=lambda part: part[0])
    found = {reach.sinks // block + part[0] for part in intervals} | set(range(reach.sinks // block))
    return sorted(found | set(range(end // block, -(-last // block))))


def heaviest(q, k, last, reach):
    """The pages of the k largest scores before the window, at most ⌈k/page⌉ by the largest, and the window's."""
    block, before = reach.block, max(last - reach.window, 0) // reach.block
    tokens = min(reach.most, max(reach.least, last // reach.share))
    order = sorted(range(before * block), key=lambda s: (-float(q @ k[s]), s))[:tokens]
    pages = list(dict.fromkeys(s // block for s in order))[: -(-tokens // block)]
    return sorted({*pages, *range(before, -(-last // block))})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("choose", "oracle", "reach"),
    [(search.search_blocks, halving, reach) for reach in HIP]
    + [(search.heaviest_pages, heaviest, reach) for reach in HEAVY],
)
def test_every_query_chooses_what_a_search_written_out_finds(choose, oracle, reach, backend):
    q, k, last = case(53)
    chosen = choose(q, k, last, reach, backend)
    for b, h, i in [(b, h, i) for b in range(2) for h in range(4) for i in range(53)]:
        expected = oracle(q[b, h, i], k[b, h // 2], i + 1, reach)
        found = chosen[b, h, i].tolist()
        assert found == expected + [-1] * (chosen.shape[3] - len(expected)), (b, h, i)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("choose", "reach"), [(search.search_blocks, HIP[0]), (search.heaviest_pages, HEAVY[0])])
def test_a_choice_is_the_same_however_a_text_is_cut_and_whatever_lies_behind(choose, reach, backend):
    q, k, last = case(70, width=16)
    q, k = q.float(), k.float()
    whole = choose(q, k, last, reach, backend)
    for begin, end in ((0, 1), (33, 34), (20, 70), (69, 70)):
        some = choose(q[:, :, begin:end], k, last[:, begin:end], reach, backend)
        assert torch.equal(some, whole[:, :, begin:end])
    later = k.clone()
    later[:, :, 41:] = torch.nan
    assert torch.equal(choose(q[:, :, :41], later, last[:, :41], reach, backend), whole[:, :, :41])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("choose", "reach"), [(search.search_blocks, HIP[0]), (search.heaviest_pages, HEAVY[0])])
@pytest.mark.parametrize("page", [8, 16])
def test_pages_are_searched_as_keys_in_one_piece_are(choose, reach, page, backend):
    q, k, last = case(60, width=24)
    count = -(-60 // page)
    table = torch.randperm(2 * count + 3, generator=torch.Generator().manual_seed(1), dtype=torch.int32)[: 2 * count]
    keys = Pages(torch.full((2 * count + 3, 2, page, 24), torch.nan, dtype=k.dtype), table.view(2, count))
    for b, n in [(b, n) for b in range(2) for n in range(count)]:
        held = k[b, :, n * page : (n + 1) * page]
        keys.pool[int(keys.table[b, n]), :, : held.shape[1]] = held
    found = choose(q, keys, last, reach, backend)
    expected = choose(q, k, last, reach, backend)
    assert torch.equal(found[..., : expected.shape[3]], expected)
    assert (found[..., expected.shape[3] :] == -1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_of_equal_scores_the_first_is_chosen(backend):
    q, k, last = case(40)
    k = torch.ones_like(k)
    found = search.search_blocks(q, k, last, Reach(2, 4, 0, 4), backend)
    assert found[0, 0, 39].tolist()[:4] == halving(q[0, 0, 39], k[0, 0], 40, Reach(2, 4, 0, 4))
    assert search.heaviest_pages(q, k, last, Reach(4, 0, 0, 4, 8, 8, 8), backend)[0, 0, 39].tolist()[:3] == [0, 1, 9]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_key_that_is_no_number_moves_no_other_query(backend):
    q, k, last = case(60)
    spoilt = k.clone()
    spoilt[0, 0, 20] = torch.nan
    for choose, reach in ((search.search_blocks, HIP[0]), (search.heaviest_pages, HEAVY[0])):
        clean, found = (choose(q, x, last, reach, backend) for x in (k, spoilt))
        assert torch.equal(found[1], clean[1]) and torch.equal(found[0, 2:], clean[0, 2:])
        assert torch.equal(found[0, :, :20], clean[0, :, :20])
        assert (found >= -1).all() and (found.diff(dim=-1)[found[..., 1:] >= 0] > 0).all()


@pytest.mark.skipif(len(BACKENDS) == 1, reason="needs the compiled kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_and_precisions_choose_by_the_same_products(dtype):
    q, k, last = (x.to(dtype) if x.dtype == torch.float64 else x for x in case(300, width=16))
    wide = [x.double() for x in (q, k)]
    before = torch.get_num_threads()
    for choose, reach in ((search.search_blocks, Reach(2, 32, 4, 16)), (search.heaviest_pages, Reach(16, window=16))):
        found = choose(q, k, last, reach)
        assert (found == choose(*wide, last, reach)).float().mean() > 0.99
        try:
            torch.set_num_threads(3)
            assert torch.equal(choose(q, k, last, reach), found)
            assert torch.equal(choose(q[:, :, -1:], k, last[:, -1:], reach), found[:, :, -1:])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("reach", "told"),
    [
        (Reach(2, 7), "kept must be whole blocks of 2 tokens, not 7"),
        (Reach(2, 8, 3), "sinks must be whole blocks of 2 tokens, not 3"),
        (Reach(2, 8, window=-1), "window must be at least 0, not -1"),
        (Reach(0, 8), "block must be at least 1, not 0"),
        (Reach(4, 0), "kept must be at least one block of 4 tokens, not 0"),
    ],
)
def test_what_makes_no_choice_is_refused_with_the_number(reach, told):
    q, k, last = case(9)
    with pytest.raises(ValueError, match=told):
        search.search_blocks(q, k, last, reach)


def test_what_does_not_fit_is_refused():
    q, k, last = case(9)
    with pytest.raises(ValueError, match="do not fit together"):
        search.search_blocks(q, k[..., :4], last, HIP[0])
    with pytest.raises(ValueError, match="last must be"):
        search.heaviest_pages(q, k, last[:, :4], HEAVY[0])
    with pytest.raises(ValueError, match="block must divide a page of 6 keys, not be 4"):
        pages = Pages(torch.zeros(2, 2, 6, 8, dtype=q.dtype), torch.zeros(2, 2, dtype=torch.int32))
        search.heaviest_pages(q, pages, last, HEAVY[0])
