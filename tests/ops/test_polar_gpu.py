"""The Triton polar attention against the materialised oracle: on a GPU where there is one, else interpreted."""

import pytest
import torch

from tests.ops.on_gpu import DEVICE, LENGTHS  # isort: skip (before Triton)

from atma.ops.polar import gpu, reference

VIEWS = ["causal", "start", "window", "packed", "window packed"]
NAMES = ["S", "L", "Q", "M", "grad q", "grad k", "grad v", "grad scale"]


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(
        dtype
    )


def ranges(view, length, keys, batch=2):
    """first and last (B, T) int32 of a way of seeing, different in each row where they can be."""
    index = torch.arange(length).expand(batch, length)
    start = torch.zeros(batch, 1, dtype=torch.long)
    if "start" in view:
        start = torch.linspace(keys - length, (keys - length) // 3, batch).long()[:, None]
    last = start + index + 1
    first = torch.zeros_like(last)
    if "packed" in view:
        begins = torch.zeros_like(last)
        for row, cut in ((0, length // 3), (0, length // 2), (-1, length // 5)):
            begins[row, cut:] = cut
        first = begins
    if "window" in view:
        first = torch.maximum(first, last - 40)
    return first.int(), last.int()


def problem(length, heads=2, groups=1, width=16, view="causal", keys=None, dtype=torch.float32, batch=2):
    """q, k, v, scale, first, last."""
    keys = keys or (3 * length + 70 if "start" in view else length)
    q = draw(batch, heads, length, width, dtype=dtype)
    k, v = (draw(batch, groups, keys, width, seed=seed, dtype=dtype) for seed in (1, 2))
    scale = (1 + draw(batch, heads, length, seed=3).abs()) * width**-0.5
    return q, k, v, scale, *ranges(view, length, keys, batch)


def found(statistics, q, k, v, scale, first, last, device="cpu"):
    """S, L, Q, M and the gradients to q, k, v and scale for gradients drawn for S, L and Q."""
    inputs = [x.detach().to(device).requires_grad_() for x in (q, k, v, scale)]
    out = statistics(*inputs, first.to(device), last.to(device))
    given = [draw(*x.shape, seed=9).to(device, x.dtype) for x in out[:3]]
    return [x.detach().cpu() for x in (*out, *torch.autograd.grad(out[:3], inputs, given))]


def exact(arguments):
    return found(reference.statistics, *(x.double() if x.is_floating_point() else x for x in arguments))


def plain(q, k, v, scale, first, last):
    """The statistics with every product and weight in q's own low precision."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    s = torch.arange(k.shape[2])
    seen = (s >= first[..., None]) & (s < last[..., None])
    a = ((q @ k.mT) * scale.to(q.dtype)[..., None]).masked_fill(~seen[:, None], -torch.inf)
    M = a.amax(-1).detach()
    p = (a - M[..., None]).exp()
    return p @ v, p.sum(-1), p.square().sum(-1), M


def assert_close(got, want, tolerance=1e-5):
    for name, x, y in zip(NAMES, got, want, strict=False):
        error = (x.double() - y.double()).abs().max() / y.double().abs().max()
        assert error <= tolerance, f"{name} is off by {error:.1e} of its largest entry"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short inputs cross many of them."""
    for table in (gpu.FORWARD, gpu.KEY_GRADIENT, gpu.QUERY_GRADIENT, gpu.SINGLE):
        for width in gpu.WIDTHS:
            monkeypatch.setitem(table, width, gpu.Tiles(32, 16, 4, 2))


@pytest.mark.parametrize("length", LENGTHS)
def test_values_and_gradients_are_the_oracles_at_every_length(length):
    arguments = problem(length, batch=1)
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments))


HEADS = ((2, 2), (2, 1), (4, 1))
SEEING = [
    pytest.param(view, *heads, marks=() if (i + n) % 2 else pytest.mark.slow)
    for i, view in enumerate(VIEWS)
    for n, heads in enumerate(HEADS)
]


@pytest.mark.parametrize(("view", "heads", "groups"), SEEING)
def test_every_way_of_seeing_keys_holds_across_many_blocks(view, heads, groups, small_blocks):
    arguments = problem(20 if view == "start" else 50, heads, groups, view=view)
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments))


@pytest.mark.parametrize("width", gpu.WIDTHS)
def test_every_head_width_is_served(width):
    arguments = problem(35, width=width, view="start", keys=80, batch=1)
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments))


def test_a_group_that_is_no_power_of_two_is_served(small_blocks):
    arguments = problem(50, heads=3, view="window")
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments))


@pytest.mark.parametrize("width", [16, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_a_plain_computation(dtype, width):
    arguments = problem(130, groups=2, width=width, dtype=dtype)
    want = exact(arguments)
    got, coarse = found(gpu.statistics, *arguments, DEVICE), found(plain, *arguments)
    for name, x, y, z in zip(NAMES, got, coarse, want, strict=True):
        assert (x.double() - z).abs().max() <= 2 * (y.double() - z).abs().max(), name


def test_results_are_float32_and_gradients_have_the_dtype_of_their_inputs():
    got = found(gpu.statistics, *problem(3, dtype=torch.bfloat16), DEVICE)
    assert [x.dtype for x in got] == [torch.float32] * 4 + [torch.bfloat16] * 3 + [torch.float32]


def test_scales_of_either_sign_and_zero_are_served():
    q, k, v, scale, first, last = problem(65, batch=1)
    scale[..., ::3] *= -1
    scale[..., 1::5] = 0
    arguments = (q, k, v, scale, first, last)
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments))


def test_logits_far_from_zero_neither_overflow_nor_vanish(small_blocks):
    q, k, v, scale, first, last = problem(65, view="window", batch=1)
    arguments = (30 * q, 30 * k, v, scale, first, last)
    assert_close(found(gpu.statistics, *arguments, DEVICE), exact(arguments), tolerance=1e-3)


def test_inputs_need_not_be_contiguous():
    arguments = problem(40, heads=4, groups=2)
    want = found(gpu.statistics, *arguments, DEVICE)
    q, k, v, scale, first, last = arguments
    q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    v = v.transpose(2, 3).contiguous().transpose(2, 3)
    scale = scale.transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.stack((first, last), -1)
    got = found(gpu.statistics, q, k, v, scale, wide[..., 0], wide[..., 1], DEVICE)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_an_expanded_scale_gets_the_summed_gradient():
    q, k, v, _, first, last = (x.to(DEVICE) for x in problem(20))
    gradients = []
    for statistics in (gpu.statistics, reference.statistics):
        scale = torch.tensor([0.3], device=DEVICE, requires_grad=True)
        S, L, Q, _ = statistics(q, k, v, scale.expand(q.shape[:-1]), first, last)
        gradients.append(torch.autograd.grad(S.sum() + L.sum() + Q.sum(), scale)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-3)


def test_keys_that_no_query_sees_are_never_used_and_get_no_gradient(small_blocks):
    q, k, v, scale, first, last = problem(20, keys=100, view="start window", batch=1)
    want = exact((q, k, v, scale, first, last))
    unseen = torch.arange(100) >= int(last.max())
    unseen |= torch.arange(100) < int(first.min())
    k[:, :, unseen], v[:, :, unseen] = torch.nan, torch.nan
    got = found(gpu.statistics, q, k, v, scale, first, last, DEVICE)
    assert_close(got, want)
    assert unseen.any() and not got[5][:, :, unseen].any() and not got[6][:, :, unseen].any()


@pytest.mark.parametrize("view", ["start", "start window"])
@pytest.mark.parametrize("length", [1, 3])
def test_decoding_over_split_keys_equals_the_oracle(length, view, monkeypatch):
    arguments = problem(length, view=view, keys=300)
    for splits in (2, 19):
        monkeypatch.setattr(gpu, "splits_for", lambda *_, splits=splits: splits)
        got = gpu.statistics(*(x.to(DEVICE) for x in arguments))
        assert_close([x.cpu() for x in got], exact(arguments))


def test_decoding_splits_long_keys_over_the_device_and_training_splits_nothing():
    assert gpu.splits_for(programs=8, keys=131072, block=64) == 33
    assert gpu.splits_for(programs=8, keys=600, block=64) == 2
    assert gpu.splits_for(programs=8, keys=100, block=64) == 1
    assert gpu.splits_for(programs=128, keys=131072, block=64) == 1
    assert gpu.splits_for(programs=1, keys=1 << 24, block=64) == gpu.MOST_SPLITS


@pytest.mark.parametrize("page", [6, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_in_pages_equal_keys_in_one_piece(dtype, page):
    q, k, v, scale, first, last = problem(2, heads=4, groups=2, view="start", keys=20 * page, dtype=dtype)
    batch, groups, _, width = k.shape
    order = torch.randperm(2 * batch * 20, generator=torch.Generator().manual_seed(0))[: batch * 20]
    held = torch.arange(20) * page < last.max(1).values[:, None]
    pages = []
    for x in (k, v):
        x = x.unflatten(2, (20, page)).transpose(1, 2).masked_fill(~held[..., None, None, None], torch.nan)
        store = torch.full((2 * batch * 20, groups, page, width), torch.nan, dtype=dtype)
        store[order] = x.flatten(0, 1)
        pages.append(store.to(DEVICE))
    table = order.view(batch, 20).masked_fill(~held, 2**31 - 1).int()
    with torch.no_grad():
        got = gpu.statistics_paged(*(x.to(DEVICE) for x in (q, *pages, table, scale, first, last)))
        want = gpu.statistics(*(x.to(DEVICE) for x in (q, k, v, scale, first, last)))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_paged_keys_refuse_gradients():
    q, k, v, scale, first, last = problem(1)
    with pytest.raises(ValueError, match="no_grad"):
        gpu.statistics_paged(q.requires_grad_(), k, v, torch.zeros(2, 1, dtype=torch.int32), scale, first, last)


def test_the_same_inputs_give_the_same_bits(small_blocks):
    arguments = problem(40, view="packed", batch=1)
    once, again = (found(gpu.statistics, *arguments, DEVICE) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(once, again, strict=True))


def test_without_gradients_the_same_bits_come_without_the_operator():
    arguments = [x.to(DEVICE) for x in problem(30)]
    with torch.no_grad():
        direct = gpu.statistics(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(direct, gpu.statistics(*arguments), strict=True))


def test_the_maximum_is_a_constant_for_gradients():
    q, *others = (x.to(DEVICE) for x in problem(4))
    *sums, M = gpu.statistics(q.requires_grad_(), *others)
    assert all(x.requires_grad for x in sums) and not M.requires_grad


def test_no_queries_give_empty_results_and_zero_gradients():
    q, k, v, scale, first, last = (x.to(DEVICE) for x in problem(5))
    k.requires_grad_()
    S, L, _, _ = gpu.statistics(q[:, :, :0], k, v, scale[:, :, :0], first[:, :0], last[:, :0])
    (gradient,) = torch.autograd.grad(S.sum() + L.sum(), k)
    assert S.shape == (2, 2, 0, 16) and not gradient.any()


@pytest.mark.parametrize("view", ["causal", "start"])
def test_the_operators_keep_their_contracts(view):
    q, k, v, scale, first, last = (x.to(DEVICE) for x in problem(2, view=view))
    inputs = [x.requires_grad_() for x in (q, k, v, scale)]
    torch.library.opcheck(torch.ops.atma.attention_statistics_gpu.default, (*inputs, first, last))
    with torch.no_grad():
        table = torch.tensor([[0], [1]], dtype=torch.int32, device=DEVICE)
        paged = (*(x.detach() for x in (q, k, v)), table, scale.detach(), first, last)
        torch.library.opcheck(torch.ops.atma.attention_statistics_paged.default, paged)


def test_it_compiles_into_one_graph():
    arguments = [x.to(DEVICE) for x in problem(3)]
    compiled = torch.compile(lambda *x: gpu.statistics(*x)[0].square().sum(), fullgraph=True, backend="aot_eager")
    gradients = []
    for function in (compiled, lambda *x: gpu.statistics(*x)[0].square().sum()):
        q = arguments[0].clone().requires_grad_()
        gradients.append(torch.autograd.grad(function(q, *arguments[1:]), q)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda q, k, v, s, f, t: (q[..., :8], k[..., :8], v[..., :8], s, f, t), "head width 8 .*16, 32, 64, 128, 256"),
        (lambda q, k, v, s, f, t: (q.double(), k.double(), v.double(), s, f, t), "float64"),
        (lambda q, k, v, s, f, t: (q, k, v[:, :, :2], s, f, t), "do not fit"),
        (lambda q, k, v, s, f, t: (q, k, v, s[:1], f, t), "scale must be"),
        (lambda q, k, v, s, f, t: (q, k, v, s, f.long(), t), "first must be .* int32"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_their_value(spoil, words):
    with pytest.raises(ValueError, match=words):
        gpu.statistics(*spoil(*problem(3)))
