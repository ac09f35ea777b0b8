"""Fast paths against the materialised oracles, custom-operator contracts, and what each operation refuses."""

import math
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from atma.ops import causal_conv, gated_delta, native, polar_attention, softcap_loss, softmax_attention, use_backend
from atma.ops.backend import backend_for
from atma.ops.polar import cpu as polar_cpu
from atma.ops.polar import native as polar_native
from atma.ops.polar import temperature_and_floor, visible_range
from tests.ops.backends import FAST

LENGTHS = [1, 2, 63, 64, 65, 200]


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def documents(batch, length, count, seed=0):
    """(B, T) ids of `count` documents or fewer, cut at random places."""
    generator = torch.Generator().manual_seed(seed)
    cuts = torch.randint(0, max(length, 1), (batch, count - 1), generator=generator)
    return (torch.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1)


def case(name, length):
    """An operation and its arguments, in all its variants."""
    heads, groups, width = 4, 2, 8
    q = draw(2, heads, length, width)
    k, v = (draw(2, groups, length, width, seed=s) for s in (1, 2))
    scalars = [*(draw(heads, seed=s) for s in range(4)), draw(heads, width)]
    rates = -draw(2, heads, length).abs(), torch.sigmoid(draw(2, heads, length, seed=3))
    ids = documents(2, length, 4)
    x, weight = draw(2, length, 6), draw(6, 4)
    cases = {
        "conv": (causal_conv, [x, weight]),
        "conv tail": (causal_conv, [x, weight, draw(2, 3, 6)]),
        "conv packed": (causal_conv, [x, weight, None, ids]),
        "polar": (polar_attention, [q, k, v, *scalars]),
        "polar packed": (polar_attention, [q, k, v, *scalars, None, ids]),
        "polar window packed": (polar_attention, [q, k, v, *scalars, None, ids, 9]),
        "softmax packed": (softmax_attention, [q, k, v, 0.3, None, ids]),
        "softmax window": (softmax_attention, [q, k, v, 0.3, None, None, 9]),
        "delta": (gated_delta, [q, F.normalize(k, dim=-1), v, *rates, draw(2, heads, width, width)]),
        "delta packed": (gated_delta, [q, F.normalize(k, dim=-1), v, *rates, None, ids]),
        "loss": (softcap_loss, [x, draw(11, 6), draw(11), ids % 11]),
    }
    return cases[name]


CASES = [
    "conv",
    "conv tail",
    "conv packed",
    "polar",
    "polar packed",
    "polar window packed",
    "softmax packed",
    "softmax window",
    "delta",
    "delta packed",
    "loss",
]


def outputs_and_gradients(function, arguments, backend):
    arguments = [x.clone().requires_grad_() if is_real(x) else x for x in arguments]
    with use_backend(backend):
        found = function(*arguments)
    found = found if isinstance(found, tuple) else (found,)
    weights = [draw(*x.shape, seed=9).to(x.dtype) for x in found]
    gradients = torch.autograd.grad(found, [x for x in arguments if is_real(x)], weights, allow_unused=True)
    return [*found, *gradients]


def is_real(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_equals_the_oracle_with_every_gradient(name, length, backend):
    function, arguments = case(name, length)
    fast, oracle = (outputs_and_gradients(function, arguments, each) for each in (backend, "reference"))
    for a, b in zip(fast, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", CASES)
def test_float32_stays_within_1e_4_of_float64(name, backend):
    function, arguments = case(name, 130)
    low = [x.float() if is_real(x) else x for x in arguments]
    exact, found = outputs_and_gradients(function, arguments, "cpu"), outputs_and_gradients(function, low, backend)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", [name for name in CASES if name != "loss"])
def test_bfloat16_is_within_twice_the_error_of_a_plain_bfloat16_reference(name, backend):
    function, arguments = case(name, 130)
    low = [x.bfloat16() if is_real(x) else x for x in arguments]
    exact, plain = function(*arguments, backend="reference"), function(*low, backend="reference")
    with use_backend(backend):
        found = function(*low)
    for a, b, c in zip(*((x,) if torch.is_tensor(x) else x for x in (found, plain, exact)), strict=True):
        assert (a - c).abs().max() <= 2 * (b - c).abs().max()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("name", ["conv tail", "polar", "softmax window"])
def test_gradients_agree_with_finite_differences(name, backend):
    function, arguments = case(name, 5)
    arguments = [x.clone().requires_grad_() if is_real(x) else x for x in arguments]
    with use_backend(backend):
        assert torch.autograd.gradcheck(lambda *x: function(*x), arguments)


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=20)
@given(
    length=st.integers(1, 40), starts=st.lists(st.integers(0, 30), min_size=2, max_size=2), window=st.integers(1, 50)
)
def test_queries_that_start_anywhere_equal_the_oracle(length, starts, window, backend):
    q, k, v = draw(2, 4, length, 8), draw(2, 2, 70, 8), draw(2, 2, 70, 8, seed=1)
    scalars = [*(draw(4, seed=s) for s in range(4)), draw(4, 8)]
    start = torch.tensor(starts)
    fast, oracle = (polar_attention(q, k, v, *scalars, start, None, window, backend=b) for b in (backend, "reference"))
    for a, b in zip(fast, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", FAST)
def test_many_key_blocks_equal_the_oracle(monkeypatch, backend):
    monkeypatch.setattr(polar_cpu, "QUERY_BLOCK", 16)
    monkeypatch.setattr(polar_cpu, "BLOCK_SCORES", 1)
    function, arguments = case("polar packed", 600)
    fast, oracle = (outputs_and_gradients(function, arguments, each) for each in (backend, "reference"))
    for a, b in zip(fast, oracle, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def operators():
    """Each custom operator that runs here, in training and with a state, on arguments as a model hands them over."""
    q, k, v = draw(2, 4, 5, 4), draw(2, 2, 5, 4), draw(2, 2, 5, 4, seed=1)
    keys, values, start = draw(2, 2, 9, 4), draw(2, 2, 9, 4, seed=1), torch.tensor([0, 3])
    scale, x, taps, tail, ids = draw(2, 4, 5), draw(2, 5, 3), draw(3, 4), draw(2, 3, 3), documents(2, 5, 2)
    views = {
        "packed": (q, k, v, scale, *visible_range(q, None, ids, 3)),
        "start": (q, keys, values, scale, *visible_range(q, start, None, 3)),
        "one query": (q[:, :, :1], keys, values, scale[..., :1], *visible_range(q[:, :, :1], start, None, None)),
    }
    for name in (
        "conv.cpu",
        "conv.native",
        "dense.native",
        "loss.cpu",
        "loss.native",
        "recurrent.cpu",
        "recurrent.native",
    ):
        import_module(f"atma.ops.{name}")  # which registers its operators
    ops = torch.ops.atma
    cases = {"gate native": (ops.gated_native.default, (x.repeat(1, 1, 2), "silu"))}
    for backend, conv, polar in (
        ("", ops.causal_conv, ops.attention_statistics),
        (" native", ops.causal_conv_native, ops.attention_statistics_native),
    ):
        cases |= {
            f"conv{backend}": (conv.default, (x, taps, None, None)),
            f"conv packed{backend}": (conv.default, (x, taps, None, ids)),
            f"conv tail{backend}": (conv.default, (x, taps, tail, None)),
            f"conv one token{backend}": (conv.default, (x[:, :1], taps, tail, None)),
            **{f"polar {view}{backend}": (polar.default, given) for view, given in views.items()},
        }
    cases |= recurrences(q, k, v, ids)
    hidden, weight, bias, targets = draw(5, 3), draw(7, 3), draw(7), torch.arange(5)
    for backend, loss in (("", ops.softcap_loss), (" native", ops.softcap_loss_native)):
        cases[f"loss{backend}"] = (loss.default, (hidden, weight, bias, targets, 15.0))
        cases[f"loss without bias{backend}"] = (loss.default, (hidden, weight, None, targets, 15.0))
    return cases


def recurrences(q, k, v, ids):
    """Both rules, each kind of decay, with and without beta, documents and a second token."""
    ops, memory, beta = torch.ops.atma, draw(2, 4, 4, 4), draw(2, 4, 5).sigmoid()
    one, channel = -draw(2, 4, 5).abs(), -draw(2, 4, 5, 4).abs()
    kinds = {
        "add": (None, None, None, "add"),
        "add by channel packed": (channel, beta, ids, "add"),
        "delta": (one, beta, None, "delta"),
        "delta packed": (None, beta, ids, "delta"),
        "delta by channel": (channel, None, None, "delta"),
        "delta one token": (one, beta, None, "delta"),
        "value": (channel, None, None),
        "value one token packed": (channel, beta, ids[:, :1]),
    }
    cases = {}
    for name, (decay, step, documents, *rule) in kinds.items():
        size = 1 if "one" in name else 5
        taken = [x if x is None else x[:, :, :size] for x in (q, k, v[:, :1], decay, step)]
        blocked, compiled = (
            (ops.recurrence, ops.recurrence_native)
            if rule
            else (ops.recurrence_by_value, ops.recurrence_by_value_native)
        )
        for backend, operator in (("", blocked), (" native", compiled)):
            cases[f"recurrence {name}{backend}"] = (operator.default, (*taken, memory, documents, *rule))
    return cases


def heads_beside_tokens(x):
    """The same numbers, laid out as a projection leaves them: (B, T, H, K), or channels before tokens."""
    if not is_real(x) or x.ndim < 3:
        return x
    axes = (1, 2) if x.ndim == 4 else (-1, -2)
    return x.transpose(*axes).contiguous().transpose(*axes)


@pytest.mark.parametrize(
    "layout",
    [pytest.param(lambda x: x, id="contiguous", marks=pytest.mark.slow), heads_beside_tokens],
)
@pytest.mark.parametrize("name", list(operators()))
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_each_custom_operator_keeps_its_contract(name, layout):
    if "native" in name and not native.available(torch.float64):
        pytest.skip(native.status().reason)
    operator, arguments = operators()[name]
    arguments = [layout(x) for x in arguments]
    torch.library.opcheck(operator, tuple(x.detach().requires_grad_() if is_real(x) else x for x in arguments))


class Seen(TorchDispatchMode):
    """The custom operators called inside, and on what."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "atma":
            self.calls.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [lambda x: x, heads_beside_tokens], ids=["contiguous", "permuted"])
@pytest.mark.parametrize("name", [name for name in operators() if "one" not in name])
def test_the_gradient_of_each_custom_operator_keeps_its_contract(name, layout):
    if "native" in name and not native.available(torch.float64):
        pytest.skip(native.status().reason)
    operator, arguments = operators()[name]
    arguments = [layout(x) for x in arguments]
    arguments = [x.detach().requires_grad_() if is_real(x) else x for x in arguments]
    results = operator(*arguments)
    results = [x for x in (results if isinstance(results, tuple) else (results,)) if x.requires_grad]
    with Seen() as seen:
        given = [layout(draw(*x.shape, seed=9)) for x in results]
        torch.autograd.grad(results, [x for x in arguments if is_real(x)], given, allow_unused=True)
    [(gradient, taken)] = seen.calls
    taken = tuple(x.detach() if is_real(x) else x for x in taken)
    torch.library.opcheck(gradient, taken, test_utils=("test_schema", "test_faketensor"))


def test_polar_properties_hold():
    """|c| ≤ 1, μ in [0, 1), and with equal scores over m keys and a sunken null the magnitude is that of n_eff = m."""
    q, k = draw(1, 1, 64, 8), draw(1, 1, 64, 8)
    scalars = [*(draw(1, seed=s) for s in range(4)), draw(1, 8)]
    c, magnitude = polar_attention(q, k, draw(1, 1, 64, 8, seed=1), *scalars)
    assert c.norm(dim=-1).max() <= 1 + 1e-12
    assert magnitude.min() >= 0
    assert magnitude.max() < 1
    slope = torch.tensor([-1.5], dtype=torch.float64)
    sunk = [slope, torch.tensor([-1e4], dtype=torch.float64), slope, slope, torch.zeros(1, 8, dtype=torch.float64)]
    _, equal = polar_attention(q * 0, k, k, *sunk)
    counts = torch.arange(1, 65, dtype=torch.float64)
    torch.testing.assert_close(equal[0, 0], torch.tanh(F.softplus(slope) * counts.log1p()), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sharpening", [0.0, 1.0, 2.0])
def test_a_count_limit_changes_nothing_up_to_it_and_something_beyond(sharpening):
    _, arguments = case("polar", 40)
    free, limited = (polar_attention(*arguments, count_limit=n, sharpening=sharpening) for n in (None, 24))
    for a, b in zip(free, limited, strict=True):
        torch.testing.assert_close(b[:, :, :24], a[:, :, :24], rtol=0, atol=0)
        assert not torch.allclose(b[:, :, 24:], a[:, :, 24:])


def test_beyond_the_count_limit_the_floor_stays_and_the_temperature_sharpens():
    """One query at n = 64 with the limit at 16 is one without a limit whose gain and floor are those by hand."""
    q, k, v = draw(1, 1, 1, 8), draw(1, 1, 64, 8, seed=1), draw(1, 1, 64, 8, seed=2)
    gain, base, slope, magnitude = (draw(1, seed=s) for s in range(4))
    null, start = draw(1, 8), torch.tensor([63])
    limited = polar_attention(q, k, v, gain, base, slope, magnitude, null, start, count_limit=16, sharpening=2.0)
    growth = F.softplus(gain) * (math.log(16) + 2 * math.log(4)) / math.log(64)
    floor = base + F.softplus(slope) * math.sqrt(math.log(17))
    by_hand = (growth.expm1().log(), floor, torch.full((1,), -1e3, dtype=torch.float64), magnitude, null, start)
    for a, b in zip(limited, polar_attention(q, k, v, *by_hand), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


@pytest.mark.skipif(not native.available(torch.float64), reason=native.status().reason)
@pytest.mark.parametrize(("count_limit", "sharpening"), [(None, 1.0), (1, 2.0), (24, 0.0), (24, 1.7)])
def test_the_compiled_temperature_and_floor_are_those_of_the_one_formula(count_limit, sharpening):
    q, start = draw(2, 4, 40, 8), torch.tensor([0, 1000])
    scalars = tuple(10 * draw(4, seed=s) for s in range(3))
    first, last = visible_range(q, start, None, 700)
    t, floor = temperature_and_floor((last - first).double(), *scalars, count_limit, sharpening)
    scale, null = polar_native.logit_scalars(q, first, last, scalars, count_limit, sharpening)
    torch.testing.assert_close(scale, t / math.sqrt(8), rtol=1e-14, atol=0)
    torch.testing.assert_close(null, t * floor, rtol=1e-13, atol=1e-13 * float(t.max()))


def test_temperature_and_floor_have_the_gradients_of_their_scalars():
    scalars = [draw(3, seed=s).requires_grad_() for s in range(3)]
    count = torch.tensor([[1.0, 5.0, 90.0]], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *given: temperature_and_floor(count, *given, 12, 1.5), scalars)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("length", "window", "count_limit"), [(1, None, None), (3, 20, None), (16, None, 12)])
def test_without_gradients_few_queries_equal_the_oracle(backend, dtype, length, window, count_limit):
    q, k, v = draw(2, 4, length, 8), draw(2, 2, 70, 8), draw(2, 2, 70, 8, seed=1)
    scalars = [draw(4, seed=s) * 3 for s in range(4)]
    low = [x.to(dtype) for x in (q, k, v, *scalars, draw(4, 8))]
    exact = [x.double() for x in low]
    settings = (torch.tensor([0, 50]), None, window, count_limit, 1.7)
    with torch.inference_mode(), use_backend(backend):
        found = polar_attention(*low, *settings)
    oracle = polar_attention(*exact, *settings, backend="reference")
    for a, b in zip(found, oracle, strict=True):
        error = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype]
        assert a.dtype == dtype and (a.double() - b).abs().max() <= error * b.abs().max()


@pytest.mark.parametrize("backend", FAST)
def test_keys_values_and_tails_of_another_dtype_are_read_as_what_they_are(backend):
    q, k, v = draw(1, 2, 40, 8), draw(1, 1, 40, 8), draw(1, 1, 40, 8, seed=1)
    x, taps, tail = draw(1, 9, 5), draw(5, 3), draw(1, 2, 5)
    with use_backend(backend):
        mixed = softmax_attention(q.float(), k, v.bfloat16(), 0.4)
        convolved = causal_conv(x.float(), taps, tail)
    exact = softmax_attention(q, k, v.bfloat16().double(), 0.4, backend="reference")
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        convolved.double(), causal_conv(x, taps, tail, backend="reference"), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("window", [None, 9000])
def test_queries_far_behind_held_keys_equal_the_oracle(backend, window):
    q, k, v = draw(1, 2, 20, 8), draw(1, 1, 20_000, 8), draw(1, 1, 20_000, 8, seed=1)
    start = torch.tensor([19_970])
    with use_backend(backend):
        fast = softmax_attention(q, k, v, 0.4, start, None, window)
    torch.testing.assert_close(fast, softmax_attention(q, k, v, 0.4, start, None, window, "reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("length", [3, 300])
def test_nan_is_not_hidden(backend, dtype, length):
    """A key or query that is not a number makes every output that sees it not a number."""
    place = length // 2
    for spoiled in range(2):
        inputs = [draw(1, 1, length, 8, seed=s, dtype=dtype) for s in range(3)]
        inputs[spoiled][0, 0, place] = torch.nan
        with use_backend(backend):
            y = softmax_attention(*inputs, 0.3)
        seeing = slice(place, place + 1) if spoiled == 0 else slice(place, None)
        assert y[:, :, seeing].isnan().all() and y[:, :, :place].isfinite().all()


def test_direction_does_not_know_how_many_keys_matched():
    """The same set of keys, without noise, at 1× and 64× gives the same direction."""
    keys, values = draw(1, 1, 4, 8).repeat(1, 1, 64, 1), draw(1, 1, 4, 8, seed=1).repeat(1, 1, 64, 1)
    query = draw(1, 1, 1, 8, seed=2)
    zero = torch.zeros(1, dtype=torch.float64)
    scalars = [zero - 50, zero - 1e4, zero - 50, zero, torch.zeros(1, 8, dtype=torch.float64)]
    few, _ = polar_attention(query, keys, values, *scalars, torch.tensor([3]))
    many, _ = polar_attention(query, keys, values, *scalars, torch.tensor([255]))
    torch.testing.assert_close(many, few, rtol=0, atol=1e-12)


def test_a_large_null_is_folded_in_without_overflow():
    q, k = draw(1, 1, 9, 8, dtype=torch.float32), draw(1, 1, 9, 8, dtype=torch.float32)
    one = torch.ones(1)
    c, magnitude = polar_attention(q, k, k, one, one * 500, one, one, torch.ones(1, 8))
    torch.testing.assert_close(c, torch.full_like(c, 8**-0.5))
    assert magnitude.abs().max() < 1e-6


def test_ignored_targets_have_no_loss_and_no_gradient():
    hidden = draw(4, 6).requires_grad_()
    loss = softcap_loss(hidden, draw(11, 6), None, torch.tensor([1, -100, 3, -100]))
    loss.sum().backward()
    assert loss[1] == loss[3] == 0
    assert hidden.grad is not None
    assert not hidden.grad[[1, 3]].any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_conv(draw(1, 4, 3), draw(2, 4)), "weight must be"),
        (lambda: causal_conv(draw(1, 4, 3), draw(3, 4), draw(1, 2, 3)), "tail must be"),
        (lambda: softmax_attention(draw(1, 3, 4, 8), draw(1, 2, 4, 8), draw(1, 2, 4, 8), 1.0), "do not fit"),
        (lambda: softmax_attention(draw(1, 2, 4, 8), draw(1, 2, 5, 8), draw(1, 2, 5, 8), 1.0), "one key per query"),
        (lambda: softcap_loss(draw(2, 3), draw(5, 3), None, torch.tensor([1, 5])), "found 1 to 5"),
        (lambda: backend_for("cuda"), "no backend 'cuda'"),
        (lambda: use_backend("triton").__enter__(), "no backend 'triton'"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_offending_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()
