"""The compiled step of a neural memory is the definition's, for every rule, from every place of the grid, in place."""

import random

import pytest
import torch

from atma import state as states
from atma.ops import native
from atma.ops.fast_weights import Memory, Rule, empty, fast_weights
from tests.ops.memories import PRESETS, Text, assert_same, text

pytestmark = pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")

CHOICES = {
    "network": ("matrix", "mlp", "gated"),
    "activation": ("gelu", "silu"),
    "residual": ("none", "identity", "skip"),
    "norm": (False, True),
    "bias": ("dot", "l2", "lp", "huber", "huber_coordinate", "huber_switch"),
    "p": (1.5, 3.0),
    "retention": ("l2", "l2", "lq", "kl", "renorm", "renorm_after_read"),
    "q": (3.0, 4.0),
    "decay_to": ("zero", "initial"),
    "optimiser": ("gd", "momentum", "muon"),
    "schedule": ("muon", "lact"),
    "anchor": ("all", "all", "hidden"),
    "average": (False, False, True),
    "granularity": ("token", "token", "chunk"),
    "chunk": (1, 3),
    "window": (1, 1, 4),
    "gates": ("head", "channel", "matrix"),
}
SIZES = ({}, {"wide": 19, "deep": 37}, {"wide": 16, "deep": 32})
"""Less than a vector, some vectors and a rest, and whole vectors."""

KL = 1e-11
"""Rows of ρ(Z) are nearly equal, so a core is nearly its own mean, and a layer norm magnifies rounding, up to 1/√ε
times."""


def some_rules(count, seed):
    """Random ones of those that are offered."""
    draw, found = random.Random(seed), []
    while len(found) < count:
        options = {name: draw.choice(values) for name, values in CHOICES.items()}
        try:
            Rule(**options)
        except ValueError:
            continue
        if options["residual"] != "skip" or options["gates"] != "channel":
            found.append(options)
    return found


def in_dtype(given, dtype):
    """Records of tensors in another dtype."""
    if isinstance(given, torch.Tensor):
        return given.to(dtype) if given.is_floating_point() else given
    if not isinstance(given, tuple):
        return given
    parts = [in_dtype(part, dtype) for part in given]
    return type(given)(*parts) if hasattr(given, "_fields") else tuple(parts)


def at_two_places(given, phase):
    """A state whose first row has read `phase` tokens and whose second has read none."""
    state = empty(given.memory, 2)
    if not phase:
        return state
    ahead = fast_weights(*given.part(slice(phase)), state, backend="reference")[1]
    return states.stack([states.rows(ahead, [0]), states.rows(empty(given.memory, 2), [1])])


def assert_steps(given, state, tolerance):
    """Each token's read and the state after it, both of the state that the definition has before it: an error is a
    step's own, and not what later ones make of it."""
    for n in range(given.q.shape[2]):
        token = given.part(slice(n, n + 1))
        read, after = fast_weights(*token, states.fork(state), backend="native")
        expected, state = fast_weights(*token, state, backend="reference")
        for one, other in zip((read, *states.tensors(after)), (expected, *states.tensors(state)), strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype
            assert (one - other).double().norm() <= tolerance * other.double().norm().clamp(min=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "phase", "sizes"),
    [
        pytest.param(name, phase, SIZES[size], marks=() if size == (i + phase) % len(SIZES) else pytest.mark.slow)
        for i, name in enumerate(PRESETS)
        for phase in range(5)
        for size in range(len(SIZES))
    ],
)
def test_a_step_of_a_preset_is_the_definition_s_from_every_start(name, phase, sizes):
    given = text(**PRESETS[name], **sizes)
    assert_steps(given, at_two_places(given, phase), 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("seed", [pytest.param(n, marks=pytest.mark.slow if n >= 20 else ()) for n in range(40)])
def test_a_step_of_any_rule_is_the_definition_s(seed):
    for number, options in enumerate(some_rules(12, seed)):
        given = text(tokens=5, **options, **SIZES[number % 3])
        assert_steps(given, at_two_places(given, number % 3), KL if options["retention"] == "kl" else 1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_in_float32_is_as_near_as_the_definition_s_own(name):
    given = text(**PRESETS[name], wide=19, deep=37)
    narrow = in_dtype(given, torch.float32)
    wanted = fast_weights(*given, backend="reference")[0]
    plain = (fast_weights(*narrow, backend="reference")[0] - wanted).norm()
    state, reads = empty(narrow.memory, 2), []
    for n in range(11):
        read, state = fast_weights(*narrow.part(slice(n, n + 1)), state, backend="native")
        reads.append(read)
    assert (torch.cat(reads, 2) - wanted).norm() <= 2 * plain + 1e-5 * wanted.norm()


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_a_text_in_turn_has_the_same_bits_however_it_is_cut_and_whatever_is_beside_it(name):
    given = in_dtype(text(**PRESETS[name], wide=19, deep=37), torch.float32)
    together, after = fast_weights(*given, empty(given.memory, 2), backend="native", steady=True)
    for row in range(2):
        state, reads = empty(given.memory, 1), []
        for part in (slice(1), slice(1, 6), slice(6, 11)):
            read, state = fast_weights(*given.part(part, slice(row, row + 1)), state, steady=True)
            reads.append(read)
        assert torch.equal(torch.cat(reads, 2)[0], together[row])
        assert_same(state, states.rows(after, [row]), 0)


@torch.no_grad()
@pytest.mark.parametrize("name", PRESETS)
def test_a_text_and_packed_documents_without_gradients_are_those_of_the_definition(name):
    given = text(**PRESETS[name])
    ids = torch.tensor([[7] * 5 + [8] * 6, [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]])
    for segments in (None, ids):
        found = fast_weights(*given, None, segments, backend="native")
        assert_same(found, fast_weights(*given, None, segments, backend="reference"), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", PRESETS)
def test_a_number_that_is_none_stays_in_its_row_and_head(name, value):
    given = text(**PRESETS[name], wide=19, deep=37)
    wanted, _ = fast_weights(*given, steady=True)
    spoiled = given._replace(k=given.k.clone())
    spoiled.k[0, 1, 4, 2] = value
    found, _ = fast_weights(*spoiled, steady=True)
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[0, 0], wanted[0, 0])
    assert torch.equal(found[0, 1, :4], wanted[0, 1, :4])


@torch.no_grad()
def test_heads_may_share_keys_and_values_in_a_step():
    given = text(tokens=1, **PRESETS["titans"])
    one = given._replace(k=given.k[:, :1], v=given.v[:, :1])
    both = given._replace(k=given.k[:, :1].expand_as(given.k), v=given.v[:, :1].expand_as(given.v))
    assert_same(fast_weights(*one, backend="native"), fast_weights(*both, backend="native"), 0)


def test_a_state_is_overwritten_without_gradients_alone_and_where_it_lies():
    given = text(tokens=1, **PRESETS["titans"])
    state = empty(given.memory, 2)
    kept, forked = states.fork(state), states.fork(state)
    fast_weights(*given, state, backend="native")
    assert_same(state, kept, 0)
    with torch.no_grad():
        _, after = fast_weights(*given, state, backend="native")
        assert after.weights[0].data_ptr() == state.weights[0].data_ptr()
        assert_same(forked, kept, 0)
        wanted = fast_weights(*given, forked, backend="reference")[1]
        assert_same(after, wanted)
        strided = kept._replace(weights=tuple(w.mT.contiguous().mT for w in kept.weights))
        assert_same(fast_weights(*given, strided, backend="native")[1], wanted)


def test_what_a_gradient_may_want_is_not_overwritten():
    given = text(tokens=1, **PRESETS["titans"])
    k = given.k.clone().requires_grad_()
    read, state = fast_weights(*given._replace(k=k), backend="native")
    kept = states.fork(state)
    with torch.no_grad():
        fast_weights(*given, state, backend="native")
    assert_same(state, kept, 0)
    read.sum().backward()
    assert k.grad is not None and k.grad.isfinite().all()


@torch.no_grad()
def test_low_precision_takes_a_step_and_the_state_stays_float32():
    given = text(tokens=1, **PRESETS["titans"])
    wanted, _ = fast_weights(*given)
    low = Text(*in_dtype(tuple(given), torch.bfloat16))
    read, state = fast_weights(*low, backend="native")
    assert read.dtype == torch.bfloat16 and {x.dtype for x in states.tensors(state)} == {torch.float32, torch.int32}
    assert (read.double() - wanted).norm() < 0.1 * wanted.norm()


@torch.no_grad()
def test_what_does_not_fit_is_refused_by_the_compiled_step():
    given = text(tokens=1, **PRESETS["titans"])
    state = empty(given.memory, 2)
    cases = [
        (given._replace(v=given.v[..., :3]), None, r"initial\[0\] must be"),
        (given._replace(memory=given.memory._replace(initial=given.memory.initial[:1])), None, "must be 2 matrices"),
        (given, state._replace(momentum=None), "state.momentum must be"),
        (given, state._replace(anchor=state.anchor[:1]), "state.anchor must be"),
    ]
    for spoiled, held, message in cases:
        with pytest.raises(ValueError, match=message):
            fast_weights(*spoiled, held, backend="native")


def test_in_turn_is_for_the_compiled_kernel_without_gradients_and_documents():
    given, ids = text(tokens=2), torch.zeros(2, 2, dtype=torch.long)
    assert isinstance(given.memory, Memory)
    with torch.no_grad(), pytest.raises(ValueError, match=r"steady is for the native backend, .* not for 'cpu'"):
        fast_weights(*given, backend="cpu", steady=True)
    with torch.no_grad(), pytest.raises(ValueError, match="steady takes no packed documents"):
        fast_weights(*given, None, ids, steady=True)
    with pytest.raises(ValueError, match="steady has no gradient"):
        fast_weights(*given, steady=True)
