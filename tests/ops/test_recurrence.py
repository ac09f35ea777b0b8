"""The linear recurrence in every kind against the token-by-token oracle: values, memories and every gradient."""

import itertools
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from atma.ops import recurrence
from tests.ops.backends import FAST, NATIVE

RULES_AND_DECAYS = [
    *itertools.product(("add", "delta"), ("none", "fixed", "token", "channel")),
    ("add", "value"),
]
TOKEN_DECAYS = ("token", "channel", "value")
BETA, FROM = (False, True), ("memory", "nothing", "documents")
"""Whether writes are weighed; a memory before the text, or packed documents."""
GROUPS = ((4, 4, 4), (4, 2, 2), (1, 1, 4), (2, 2, 4), (2, 1, 4))
"""The heads of q, of k and of v."""
SIZES = {"batch": 2, "heads": 4, "width": 6, "depth": 5}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def decays(kind, length):
    """Of every strength: log a from about −5 to −1e−6."""
    batch, heads, width, depth = SIZES.values()
    shapes = {"fixed": (heads,), "token": (batch, heads, length)}
    shapes |= {"channel": (batch, heads, length, width), "value": (batch, heads, length, depth)}
    return None if kind == "none" else -(10 ** (3 * draw(*shapes[kind], seed=3).tanh() - 2)).clamp_max(5)


def case(rule, decay, length, beta=True, groups=(4, 2, 1), start="memory"):
    """The arguments of `recurrence` but for its backend."""
    batch, heads, width, depth = SIZES.values()
    q, k = draw(batch, groups[0], length, width), F.normalize(draw(batch, groups[1], length, width, seed=1), dim=-1)
    v, step = draw(batch, groups[2], length, depth, seed=2), 2 * draw(batch, heads, length, seed=4).sigmoid()
    memory = draw(batch, heads, depth, width, seed=5) if start == "memory" else None
    cuts = torch.tensor([[length // 3, length // 2, length - 1], [1, length // 5, 64]])
    ids = (torch.arange(length)[None, :, None] >= cuts[:, None, :]).sum(-1) if start == "documents" else None
    axis = "value" if decay == "value" else "key"
    return [q, k, v, decays(decay, length), step if beta else None, memory, ids, rule, axis]


def rounding(length):
    """A token rounds what it reads and its memory by a few sums of at most 64 terms each, in float64."""
    return 64 * length * 2**-53


def is_real(x):
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def outputs_and_gradients(arguments, backend):
    """out, the memory after, and the gradient of every tensor by one weighted sum of both."""
    arguments = [x.detach().clone().requires_grad_() if is_real(x) else x for x in arguments]
    found = recurrence(*arguments, backend=backend)
    weights = [draw(*x.shape, seed=9).to(x.dtype) for x in found]
    return [*found, *torch.autograd.grad(found, [x for x in arguments if is_real(x)], weights)]


@cache
def oracle(*options):
    return outputs_and_gradients(case(*options), "reference")


def assert_close(found, expected, tolerance):
    """The largest error of each result, relative to its largest magnitude."""
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.double() - b).abs().max() / b.abs().max().clamp_min(1e-30)
        assert error <= tolerance, f"result {place}: relative error {error:.1e}"


KINDS = [
    pytest.param(beta, groups, start, marks=() if (b + g + n) % 2 else pytest.mark.slow)
    for (b, beta), (g, groups), (n, start) in itertools.product(*map(enumerate, (BETA, GROUPS, FROM)))
]
"""Whether writes are weighed, heads and what is before; in the quick suite every two of them together."""


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("beta", "groups", "start"), KINDS)
@pytest.mark.parametrize(("rule", "decay"), RULES_AND_DECAYS)
def test_every_kind_equals_the_oracle_with_every_gradient(rule, decay, beta, groups, start, backend):
    options = (rule, decay, 65, beta, groups, start)
    assert_close(outputs_and_gradients(case(*options), backend), oracle(*options), rounding(65))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("start", ["memory", "documents"])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 130])
@pytest.mark.parametrize(("rule", "decay"), RULES_AND_DECAYS)
def test_every_length_equals_the_oracle_with_every_gradient(rule, decay, length, start, backend):
    options = (rule, decay, length, True, (4, 2, 1), start)
    assert_close(outputs_and_gradients(case(*options), backend), oracle(*options), rounding(length))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("groups", [(4, 2, 1), (1, 1, 4)])
@pytest.mark.parametrize("length", [1, 3, 65])
@pytest.mark.parametrize(("rule", "decay"), RULES_AND_DECAYS)
def test_without_gradients_the_values_are_those_of_the_oracle(rule, decay, length, groups, backend):
    arguments = case(rule, decay, length, groups=groups)
    with torch.inference_mode():
        found, expected = (recurrence(*arguments, backend=each) for each in (backend, "reference"))
    assert_close(found, expected, rounding(length))


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("rule", ["add", "delta"])
def test_heads_that_share_queries_and_keys_may_be_on_different_threads(rule, threads, backend):
    options, before = (rule, "token", 130, True, (1, 1, 4), "memory"), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = outputs_and_gradients(case(*options), backend)
    finally:
        torch.set_num_threads(before)
    assert_close(found, oracle(*options), rounding(130))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("rule", "decay"), [("add", "channel"), ("delta", "channel"), ("add", "value")])
def test_strong_decays_neither_overflow_nor_cancel_in_float32(rule, decay, backend):
    """log a from −1e−6 to −40 in one text."""
    arguments = case(rule, decay, 150)
    arguments[3] = -(10 ** (7.6 * torch.rand(arguments[3].shape, generator=torch.Generator().manual_seed(0)) - 6))
    low = [x.float() if is_real(x) else x for x in arguments]
    exact = outputs_and_gradients([x.double() if is_real(x) else x for x in low], "reference")
    # 16 roundings of 24 bits: what is old has decayed, so that few tokens add up.
    assert_close(outputs_and_gradients(low, backend), exact, 16 * 2**-24)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("rule", "decay"), [kind for kind in RULES_AND_DECAYS if kind[1] in TOKEN_DECAYS])
def test_a_decay_of_zero_forgets_everything(rule, decay, backend):
    arguments = case(rule, decay, 70)
    arguments[3][:, :, 40] = -torch.inf
    later = [x[:, :, 40:] for x in arguments[:5]]
    expected = recurrence(*later, None, None, rule, arguments[8], backend="reference")
    out, after = recurrence(*arguments, backend=backend)
    assert_close((out[:, :, 40:], after), expected, rounding(70))
    assert_close(outputs_and_gradients(arguments, backend), outputs_and_gradients(arguments, "reference"), rounding(70))


def changed(arguments, token, by):
    """The same but for one token of everything, of all rows."""
    given = [x.clone() if is_real(x) else x for x in arguments]
    for x in given[:5]:
        if x is not None and x.ndim > 2:
            x[:, :, token] = by(x[:, :, token])
    return given


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("rule", "decay"), RULES_AND_DECAYS)
@settings(max_examples=6)
@given(length=st.integers(2, 140), data=st.data())
def test_nothing_of_a_document_enters_another_not_even_by_rounding(rule, decay, length, data, backend):
    """Cut anywhere, each document has what it has alone, and the same bits whatever stands in the others."""
    cut = data.draw(st.integers(1, length - 1), label="cut")
    arguments = case(rule, decay, length, start="nothing")
    arguments[6] = (torch.arange(length) >= cut).int().expand(2, length).contiguous()
    out, after, *gradients = outputs_and_gradients(arguments, backend)
    second = [x[:, :, cut:] if is_real(x) and x.ndim > 2 else x for x in arguments[:5]]
    alone = recurrence(*second, None, None, rule, arguments[8], backend=backend)
    assert_close((out[:, :, cut:], after), alone, rounding(length))
    for token, of in ((0, slice(cut, None)), (length - 1, slice(0, cut))):
        other = outputs_and_gradients(changed(arguments, token, lambda x: 0.7 * x), backend)
        assert torch.equal(other[0][:, :, of], out[:, :, of])
        for a, b in zip(other[2:], gradients, strict=True):
            assert b.ndim < 3 or torch.equal(a[:, :, of], b[:, :, of])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("spoiled", ["q", "k", "v", "log_decay", "beta"])
@pytest.mark.parametrize(("rule", "decay"), RULES_AND_DECAYS)
def test_a_token_that_is_not_a_number_spoils_its_document_from_then_on_alone(rule, decay, spoiled, backend):
    arguments = case(rule, decay, 70, start="documents")
    place, end = 30, 35  # in the first row's second document, and the first token of its third
    clean, _ = recurrence(*arguments, backend="reference")
    x = arguments[("q", "k", "v", "log_decay", "beta").index(spoiled)]
    if spoiled == "log_decay" and decay not in TOKEN_DECAYS:
        x = arguments[4]
    x[0, 0, place] = torch.nan
    out, _ = recurrence(*arguments, backend=backend)
    lost = torch.zeros(clean.shape[:3], dtype=torch.bool)
    lost[0, : 4 // x.shape[1], place : place + 1 if spoiled == "q" else end] = True
    assert out[lost].isnan().all()
    torch.testing.assert_close(out[~lost], clean[~lost], rtol=1e-11, atol=1e-11)


PACKED = [("delta", "channel", "documents"), ("add", "value", "documents")]


@pytest.mark.parametrize(
    ("groups", "backend"),
    [
        ((2, 1, 2), "cpu"),
        pytest.param((1, 1, 2), "native", marks=NATIVE.marks),
        pytest.param((1, 1, 2), "cpu", marks=pytest.mark.slow),
        pytest.param((2, 1, 2), "native", marks=[*NATIVE.marks, pytest.mark.slow]),
    ],
)
@pytest.mark.parametrize(("rule", "decay", "start"), [*((*kind, "memory") for kind in RULES_AND_DECAYS), *PACKED])
def test_gradients_agree_with_finite_differences(rule, decay, start, backend, groups, monkeypatch):
    for name, size in (("batch", 1), ("heads", 2), ("width", 2), ("depth", 3)):
        monkeypatch.setitem(SIZES, name, size)
    arguments = case(rule, decay, 5, groups=groups, start=start)
    if start == "documents":
        arguments[6] = torch.tensor([[0, 0, 1, 1, 1]])
    arguments = [x.requires_grad_() if is_real(x) else x for x in arguments]
    assert torch.autograd.gradcheck(lambda *x: recurrence(*x, backend=backend), arguments)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("rule", "decay"), [("add", "none"), ("delta", "channel"), ("add", "value")])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_call_is_one_graph_with_the_same_gradients(rule, decay, backend):
    arguments = case(rule, decay, 70, beta=rule == "delta", start="documents")
    tensors = [x for x in arguments if is_real(x)]

    def loss(*given):
        given = iter(given)
        out, after = recurrence(*(next(given) if is_real(x) else x for x in arguments), backend=backend)
        return out.square().sum() + after.sum()

    plain, compiled = (
        torch.autograd.grad(function(*given), given)
        for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))
        for given in [[x.clone().requires_grad_() for x in tensors]]
    )
    assert_close(compiled, plain, rounding(70))
