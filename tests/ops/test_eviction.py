"""Attention over what is kept: all of a short text, a bounded set of a long one, by a rule that is written out here."""

import pytest
import torch

from atma.ops import native
from atma.ops.eviction import Budget, attend_kept, empty
from atma.ops.polar import statistics_of

BACKENDS = ["reference", *(["native"] if native.available(torch.float64) else [])]
BUDGETS = [Budget(20, 8, 6, 3), Budget(16, 4, 16, 0), Budget(13, 5, 2, 2, 1.0), Budget(24, 8, 3, 7, 0.0)]


def case(length, heads=4, groups=2, width=8, rows=2, null=True):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(rows, n, length, width, generator=generator).double() for n in (heads, groups, groups))
    scale = torch.rand(rows, heads, length, generator=generator).double() + 0.3
    return q, k, v, scale, torch.randn(rows, heads, length, generator=generator).double() if null else None


def run(given, budget, cuts, backend, length=0):
    """Statistics and what is kept after a text in pieces of these sizes."""
    q, k, v, scale, null = given
    kept, pieces = empty(q.shape[0], k.shape[1], k.shape[3], budget, q), []
    at = 0
    with torch.no_grad():
        for size in cuts:
            some = slice(at, at + size)
            start = torch.full(q.shape[:1], at, dtype=torch.int32)
            part = (*(x[:, :, some] for x in (q, k, v, scale)), None if null is None else null[:, :, some])
            sums, kept = attend_kept(*part, start, kept, budget, backend)
            pieces.append(sums)
            at += size
    return [torch.cat(column, 2) for column in zip(*pieces, strict=True)], kept


def told(q, k, v, scale, null, budget):
    """One row and head of keys, token by token, with lists: what queries read (H, T, K) and sum, and what is kept."""
    held, lately, wholly, reads, sums = [], {}, {}, [], []
    for n in range(q.shape[1]):
        held.append(n)
        lately[n] = wholly[n] = 0.0
        a = (q[:, n] @ k[held].mT) * scale[:, n, None]
        e = a.exp()
        reads.append(e @ v[held] / e.sum(-1, keepdim=True))
        sums.append(e.sum(-1))
        share = e / (e.sum(-1) + (0 if null is None else null[:, n].exp()))[:, None]
        for s, weight in zip(held, share.sum(0).tolist(), strict=True):
            lately[s] += weight
            wholly[s] += weight
        if (n + 1) % budget.block == 0:
            free = [s for s in held if s + budget.window <= n]
            if len(held) > budget.budget:
                anchors = sorted(free, key=lambda s: -lately[s])[: budget.anchors]
                chosen = {s for s in held if s not in free} | {s for s in free for x in anchors if abs(x - s) <= 1}
                rest = sorted((s for s in free if s not in chosen), key=lambda s: -wholly[s])
                held = sorted(chosen | set(rest[: budget.budget - len(chosen)]))
            lately = {s: lately[s] * budget.decay for s in held}
    return torch.stack(reads, 1), torch.stack(sums, 1), held, lately


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("null", [True, False])
def test_what_is_kept_and_read_is_what_the_rule_says(budget, null, backend):
    q, k, v, scale, floor = case(75, null=null)
    (S, L, _, M), kept = run((q, k, v, scale, floor), budget, [75], backend)
    for b, g in [(b, g) for b in range(2) for g in range(2)]:
        own = slice(2 * g, 2 * g + 2)
        of_null = None if floor is None else floor[b, own]
        reads, sums, held, lately = told(q[b, own], k[b, g], v[b, g], scale[b, own], of_null, budget)
        torch.testing.assert_close(S[b, own] / L[b, own, :, None], reads, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(M[b, own] + L[b, own].log(), sums.log(), rtol=1e-10, atol=1e-10)
        place = kept.place[b, g].tolist()
        assert place == held + [-1] * (budget.slots - len(held))
        expected = torch.tensor([lately[s] for s in held], dtype=torch.float64)
        torch.testing.assert_close(kept.lately[b, g, : len(held)], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(kept.values[b, g, : len(held)], v[b, g, held], rtol=0, atol=0)
        torch.testing.assert_close(kept.keys[b, g, :, : len(held)], k[b, g, held].mT, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("budget", BUDGETS)
def test_any_cut_keeps_and_reads_the_same(budget, backend):
    given = case(75)
    whole, kept = run(given, budget, [75], backend)
    exact = {"rtol": 0, "atol": 0} if backend == "native" else {"rtol": 1e-10, "atol": 1e-10}
    for cuts in ([1] * 75, [40, 35], [7, 1, 60, 7]):
        parts, other = run(given, budget, cuts, backend)
        for a, b in zip((*parts, *other), (*whole, *kept), strict=True):
            torch.testing.assert_close(a, b, **exact)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_within_the_budget_is_read_whole(backend):
    q, k, v, scale, null = case(60)
    sums, kept = run((q, k, v, scale, null), Budget(64, 8, 6, 3), [60], backend)
    last = torch.arange(1, 61, dtype=torch.int32).expand(2, -1)
    expected = statistics_of("reference", q)(q, k, v, scale, torch.zeros_like(last), last)
    for a, b in zip(sums, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert (kept.place >= 0).sum(-1).eq(60).all()


@pytest.mark.skipif(len(BACKENDS) == 1, reason="needs the compiled kernels")
@pytest.mark.parametrize("width", [8, 12, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precisions_follow_the_reference(dtype, width):
    given = [x.to(dtype) if i < 3 else x.float() for i, x in enumerate(case(75, 14, 2, width))]
    budget = Budget(64, 16, 8, 3)
    found, kept = run(given, budget, [75], "native")
    expected, other = run(given, budget, [75], "reference")
    assert (kept.place == other.place).float().mean() > 0.95
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a[:, :, :64], b[:, :, :64], rtol=1e-4, atol=1e-4)


def test_rows_at_different_positions_are_each_alone():
    budget, given = BUDGETS[0], case(75)
    for backend in BACKENDS:
        whole, _ = run(given, budget, [75], backend)
        early, late = (run(given, budget, [n], backend)[1] for n in (10, 41))
        kept = type(early)(*(torch.stack([a[0], b[1]]) for a, b in zip(early, late, strict=True)))
        some = [torch.stack([x[0, :, 10:30], x[1, :, 41:61]]) for x in given]
        with torch.no_grad():
            sums, _ = attend_kept(*some, torch.tensor([10, 41], dtype=torch.int32), kept, budget, backend)
        for a, b in zip(sums, whole, strict=True):
            torch.testing.assert_close(a, torch.stack([b[0, :, 10:30], b[1, :, 41:61]]), rtol=1e-10, atol=1e-10)


def test_gradients_flow_and_touch_nothing():
    q, k, v, scale, null = (x[..., :12, :] if x.ndim == 4 else x[..., :12] for x in case(20))
    kept = empty(2, 2, 8, BUDGETS[0], q)
    before = [x.clone() for x in kept]
    start = torch.zeros(2, dtype=torch.int32)

    def read(*given):
        (S, L, _, _), _ = attend_kept(*given, scale, null, start, kept, BUDGETS[0])
        return S / L[..., None]

    y = read(*(x.requires_grad_() for x in (q, k, v)))
    y.square().sum().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(kept, before, strict=True))


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        (Budget(100, 64, 128), "budget must be at least the window of 128 tokens, not 100"),
        (Budget(20, 8, 6, 5), "anchors must be 0 to 4, a third of what is kept beside the window, not 5"),
        (Budget(20, 0, 6, 3), "block must be at least 1, not 0"),
        (Budget(20, 8, 6, 3, 1.5), "decay must be 0 to 1, not 1.5"),
    ],
)
def test_a_budget_that_cannot_be_is_refused_with_the_number(budget, told):
    with pytest.raises(ValueError, match=told):
        budget.check()
