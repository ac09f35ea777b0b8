"""What polar attention certifies: the golden case, bounds that nothing breaks, and shadows by every backend."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file

from atma.ops import native
from atma.ops.certified import (
    Groups,
    bar,
    box_bound,
    certificate,
    empty,
    hold,
    quantise,
    shadow_attention,
    shadow_statistics,
)
from atma.ops.paged.pages import Pages
from atma.ops.polar import fold, statistics_of
from tests.ops.backends import NATIVE

SLACK = 1e-12
"""What float64 itself loses of sums of some hundred numbers."""


def golden_groups(vectors, pages, summarised):
    """The keys of the pages that are read, and the others' groups, of the golden case."""
    q, k, v, size = vectors["q"], vectors["k"], vectors["v"], 8
    read = torch.tensor([n // size in pages for n in range(len(k))])
    logits = vectors["temperature"] * (k @ q) * len(q) ** -0.5
    left = [n for n in range(len(k) // size) if n not in pages]
    norms = torch.linalg.vector_norm(v.view(-1, size, v.shape[1]), dim=-1)[left]
    sums = (v.view(-1, size, v.shape[1])[left].sum(1), norms.sum(-1)) if summarised else (None, None)
    count = torch.full((len(left),), float(size), dtype=q.dtype)
    groups = Groups(count, vectors["page_low"][left], vectors["page_high"][left], norms.amax(-1), *sums)
    return logits[read], v[read], groups


def test_the_certificate_is_that_of_the_golden_vector(golden_mixers):
    path = golden_mixers / "certificate.safetensors"
    with safe_open(path, "pt") as file:
        cases = json.loads(file.metadata()["about"])["config"]["cases"]
    vectors = load_file(path)
    null = vectors["temperature"] * vectors["floor"]
    for case in cases:
        summarised = case["key"].endswith("summarise")
        given = golden_groups(vectors, case["pages"], summarised)
        found = certificate(*given, null, vectors["null_value"], vectors["slope"])
        torch.testing.assert_close(found.direction, vectors[f"{case['key']}.direction"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.magnitude, vectors[f"{case['key']}.magnitude"], rtol=1e-9, atol=1e-12)
        for name in ("direction_error", "magnitude_error", "variation"):
            assert float(getattr(found, name)) == pytest.approx(case[name], rel=1e-9)
        assert [float(x) for x in found.null_weight] == pytest.approx(case["null_weight"], rel=1e-9)


def exactly(logits, values, null, null_value, kappa):
    """Direction, magnitude and the null's weight of all keys (…, n), in float64."""
    x = torch.maximum(logits.amax(-1), null)
    e, zeta = (logits - x[..., None]).exp(), (null - x).exp()
    L, Q, D = e.sum(-1), e.square().sum(-1), (e[..., None] * values).sum(-2) + zeta[..., None] * null_value
    c = D / torch.maximum(torch.linalg.vector_norm(D, dim=-1), 1e-6 * (zeta + L))[..., None]
    m = torch.where(L > 0, L / (zeta + L) * L * (L / Q), 0)
    return c, torch.tanh(kappa * m.log1p()), zeta / (zeta + L), (e, zeta)


def drawn_case(generator, trials, keys, read, width):
    """Logits, values, null and slope of many trials, from tame to adversarial: ties, huge temperatures, empty reads."""

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    t = 10 ** (3 * torch.rand(trials, 1, generator=generator, dtype=torch.float64) - 1)
    logits = t * normal(trials, keys)
    kind = torch.arange(trials) % 5
    logits = torch.where((kind == 1)[:, None], (logits / t).round() * t, logits)  # ties
    values = normal(trials, keys, width) * 10 ** normal(trials, 1, 1)
    pull = values[:, :1] * torch.where((kind == 2)[:, None, None], -1.0, 1.0)  # skipped against read
    values = torch.where((kind == 2)[:, None, None] & (torch.arange(keys) >= read)[:, None], pull, values)
    null = t[:, 0] * normal(trials) * 2 + torch.where(kind == 3, -50.0, 0.0)
    null_value = normal(trials, width) * torch.where(kind == 4, 0.0, 1.0)[:, None]
    return logits, values, null, null_value, 10 ** normal(trials).clamp(-2, 1)


def broken(seed, trials, keys, read, width):
    """How far the worst of many trials is above what is certified; below 0 if none is."""
    generator = torch.Generator().manual_seed(seed)
    logits, values, null, null_value, kappa = drawn_case(generator, trials, keys, read, width)
    c, mu, weight, (e, zeta) = exactly(logits, values, null, null_value, kappa)
    left, size = logits[:, read:], 4
    count = left.shape[1] // size
    pages, rows = left.unflatten(1, (count, size)), values[:, read:].unflatten(1, (count, size))
    wide = torch.rand(trials, count, generator=generator, dtype=torch.float64) * (torch.arange(trials) % 2)[:, None]
    norms = torch.linalg.vector_norm(rows, dim=-1)
    sizes = torch.full((trials, count), float(size), dtype=torch.float64)
    ranges = sizes, pages.amin(-1) - wide, pages.amax(-1) + wide, norms.amax(-1)
    worst = -torch.inf
    for sums in ((None, None), (rows.sum(2), norms.sum(-1))):
        found = certificate(logits[:, :read], values[:, :read], Groups(*ranges, *sums), null, null_value, kappa)
        off = torch.linalg.vector_norm(found.direction - c, dim=-1)
        low, high = found.null_weight
        total = zeta + e.sum(-1)
        mass = e[:, read:].sum(-1) / total  # half the sum of |w − w′|, what is skipped weighing nothing
        for excess in (
            off - found.direction_error,
            (found.magnitude - mu).abs() - found.magnitude_error,
            low - weight,
            weight - high,
            mass - found.variation,
        ):
            worst = max(worst, float(excess.max()))
    return worst


SIZES = [(4, 0, 3), (12, 4, 1), (40, 8, 16), (9, 1, 5)]


@pytest.mark.parametrize(("keys", "read", "width"), SIZES)
def test_no_bound_is_broken_in_random_and_adversarial_cases(keys, read, width):
    assert broken(keys, 750, keys, read, width) <= SLACK


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "read", "width"), SIZES)
@pytest.mark.parametrize("seed", range(10))
def test_no_bound_is_broken_in_thirty_thousand_cases(keys, read, width, seed):
    assert broken(100 + seed, 750, keys, read, width) <= SLACK


def test_a_key_under_the_bar_may_be_dropped_without_looking_at_any_other():
    null, visible = torch.tensor([2.0, 9.0], dtype=torch.float64), torch.tensor([10.0, 1e6], dtype=torch.float64)
    most = visible * (bar(null, visible, 1e-3) - null).exp()
    torch.testing.assert_close(most, torch.full_like(most, 1e-3))


def test_a_box_holds_every_product():
    generator = torch.Generator().manual_seed(0)
    q, keys = torch.randn(9, 33, generator=generator), torch.randn(7, 16, 33, generator=generator)
    low, high = box_bound(q, keys.amin(1), keys.amax(1))
    products = torch.einsum("qk,psk->qps", q, keys)
    assert (products <= high[..., None]).all() and (products >= low[..., None]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_in_eight_bits_is_no_farther_from_the_exact_one_than_it_says(dtype):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(500, 40, generator=generator) * 10 ** torch.randn(500, 1, generator=generator)).to(dtype)
    x[0], x[1, 1:] = 0, 0
    rows, scale, error, norm = quantise(x)
    near = rows.double() * scale.double()
    assert (torch.linalg.vector_norm(x.double() - near, dim=-1) <= error[:, 0].double()).all()
    assert (torch.linalg.vector_norm(near, dim=-1) <= norm[:, 0].double()).all()
    assert (error[:, 0].double() <= 0.51 * 40**0.5 * scale[:, 0].double() + 1e-30).all()


class Read:
    """One call of attention of shadows, with everything it needs."""

    def __init__(self, queries, keys, dtype=torch.float32, width=24, sharp=1.0):
        g = torch.Generator().manual_seed(3)
        B, H, G, K = 2, 4, 2, width
        self.k, self.v = (torch.randn(B, G, keys, K, generator=g).to(dtype) for _ in range(2))
        self.q = torch.randn(B, H, queries, K, generator=g).to(dtype)
        self.scale = torch.full((B, H, queries), sharp * K**-0.5)
        self.null = torch.rand(B, H, queries, generator=g) * 3
        self.slope, self.null_value = torch.randn(H, generator=g) - 1, torch.randn(H, K, generator=g)
        self.last = (torch.tensor([[keys - queries], [keys - queries - 5]]) + torch.arange(queries) + 1).int()
        self.first = torch.zeros_like(self.last)
        self.start = torch.zeros(B, dtype=torch.int32)

    def shadows(self):
        return hold(empty(2, 2, self.k.shape[2], self.k.shape[3]), self.k, self.v, self.start)

    def attend(self, backend, tolerances=(0.05, 0.02), held=None):
        k, v, shadows = held or (self.k, self.v, self.shadows())
        logits = (self.scale, self.null, self.slope, self.null_value)
        return shadow_attention(self.q, k, v, shadows, *logits, self.first, self.last, tolerances, backend)

    def exact(self):
        q, k, v = (x.double() for x in (self.q, self.k, self.v))
        S, L, Q, M = statistics_of("reference", q)(q, k, v, self.scale.double(), self.first, self.last)
        return fold(S, L, Q, self.null.double() - M, self.slope.double(), self.null_value.double())


BACKENDS = ["reference", NATIVE]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tolerances", [(0.05, 0.02), (0.003, 0.0005)])
@pytest.mark.parametrize(("queries", "keys", "sharp"), [(1, 200, 1.0), (1, 999, 6.0), (20, 64, 2.0), (3, 9, 0.1)])
@torch.no_grad()
def test_what_is_read_is_as_near_the_exact_as_is_certified(queries, keys, sharp, tolerances, backend):
    case = Read(queries, keys, sharp=sharp)
    c, mu, certain = case.attend(backend, tolerances)
    whole, magnitude = case.exact()
    rounding = 2e-5  # of float32 sums, which no bound is of
    assert (certain.direction_error <= tolerances[0]).all() and (certain.magnitude_error <= tolerances[1]).all()
    off = torch.linalg.vector_norm(c.double() - whole, dim=-1)
    assert (off <= certain.direction_error + rounding).all()
    assert ((mu.double() - magnitude).abs() <= certain.magnitude_error + rounding).all()
    visible = (case.last - case.first)[:, None].expand_as(certain.read)
    assert (certain.read <= visible).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tolerances", [(0.0, 0.02), (0.05, 0.0)])
@torch.no_grad()
def test_a_tolerance_of_zero_reads_everything_and_says_so(tolerances, backend):
    case = Read(3, 77)
    c, mu, certain = case.attend(backend, tolerances)
    whole, magnitude = case.exact()
    torch.testing.assert_close(c.double(), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mu.double(), magnitude, rtol=1e-4, atol=1e-5)
    assert torch.equal(certain.read, case.last[:, None].expand_as(certain.read))
    assert not certain.direction_error.any() and not certain.magnitude_error.any()


def in_pages(x, size):
    count = x.shape[2] // size
    order = torch.randperm(len(x) * count, generator=torch.Generator().manual_seed(1))
    pool = torch.zeros(len(x) * count, x.shape[1], size, x.shape[3], dtype=x.dtype)
    pool[order] = x.unflatten(2, (count, size)).transpose(1, 2).flatten(0, 1)
    return Pages(pool, order.view(len(x), count).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.skipif(not native.available(torch.float32), reason=str(native.status().reason))
@torch.no_grad()
def test_a_query_has_the_same_bits_in_pages_and_whatever_is_asked_beside_it(dtype):
    case = Read(33, 128, dtype)
    shadows = case.shadows()
    whole = case.attend("native", held=(case.k, case.v, shadows))
    paged = [type(shadows)(*(in_pages(x, 32) for x in shadows)), *(in_pages(x, 32) for x in (case.k, case.v))]
    other = case.attend("native", held=(paged[1], paged[2], paged[0]))
    for a, b in zip((*whole[:2], *whole[2]), (*other[:2], *other[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
    for name in ("q", "scale", "null"):
        setattr(case, name, getattr(case, name)[:, :, 20:21])
    case.first, case.last = case.first[:, 20:21], case.last[:, 20:21]
    alone = case.attend("native", held=(case.k, case.v, shadows))
    assert all(torch.equal(a[:, :, 20:21], b) for a, b in zip(whole[:2], alone[:2], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_what_lies_behind_the_last_key_changes_nothing(backend):
    case = Read(2, 61)
    expected = case.attend(backend)
    shadows = case.shadows()
    spoilt = []
    for x in (case.k, case.v, *shadows):
        more = torch.full((*x.shape[:2], 9, x.shape[3]), 77 if x.dtype == torch.int8 else torch.nan, dtype=x.dtype)
        spoilt.append(torch.cat([x, more], 2))
    found = case.attend(backend, held=(spoilt[0], spoilt[1], type(shadows)(*spoilt[2:])))
    exact = 0 if backend == "native" else 1e-5  # a product of another size is another order of additions
    for a, b in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=exact, atol=exact)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_the_sums_of_shadows_are_those_of_what_they_stand_for(backend):
    case = Read(5, 150)
    shadows = case.shadows()
    pairs = (shadows.keys, shadows.key_scale), (shadows.values, shadows.value_scale)
    keys, values = (x.double() * unit.double() for x, unit in pairs)
    oracle = statistics_of("reference", keys)(case.q.double(), keys, values, case.scale.double(), case.first, case.last)
    found = shadow_statistics(case.q, shadows, case.scale, case.first, case.last, backend)
    shift = (oracle[3] - found[3].double()).exp()
    # Compiled, a query is 16 bits: a logit may be off by a 65,534th of its largest channel times the sum of |k|.
    off = case.q.abs().amax(-1) / 65534 * keys.abs().sum(-1).amax(-1).repeat_interleave(2, 1)[..., None] * case.scale
    for one, other, power in zip(found[:3], oracle[:3], (1, 1, 2), strict=True):
        wide = other.ndim == 4
        most = 2 * power * off.double() * oracle[2 if power == 2 else 1] * shift**power + 1e-5
        most = most[..., None] * values.abs().amax() if wide else most
        assert ((one.double() - other * (shift[..., None] if wide else shift**power)).abs() <= most).all()


def test_tolerances_that_are_none_and_gradients_are_refused():
    case = Read(1, 9)
    with pytest.raises(ValueError, match="magnitude_tolerance must be at least 0"), torch.no_grad():
        case.attend("auto", (0.1, -1.0))
    case.q.requires_grad_()
    with pytest.raises(ValueError, match="no gradient"):
        case.attend("auto")


def test_kappa_is_softplus_of_the_slope():
    case = Read(1, 40)
    with torch.no_grad():
        _, mu, _ = case.attend("reference", (0.0, 0.0))
    assert (mu < torch.tanh(F.softplus(case.slope)[:, None] * torch.log(torch.tensor(41.0)))).all()
