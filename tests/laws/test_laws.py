"""The nine laws of `y, state = f(x, state)`, one test each, over every mixer, the whole model and every backend."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atma import state as trees
from atma.ops.recurrent.decays import CHUNK
from atma.state import tensors

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def run(subject, x, state, sizes):
    """Outputs and state after feeding x in pieces of the given sizes."""
    pieces = []
    for part in x.split(sizes, 1):
        y, state = subject.function(part, state)
        pieces.append(y)
    return torch.cat(pieces, 1), state


def assert_same_state(left, right):
    for a, b in zip(tensors(left), tensors(right), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 65, 130, *(pytest.param(n, marks=pytest.mark.slow) for n in (63, 64))])
def test_split_any_cut_gives_the_same_outputs_and_state(subject, length):
    x = subject.inputs(2, length)
    whole, state = run(subject, x, subject.function.init_state(2, length), [length])
    for cut in {1, length // 2, min(CHUNK - 1, length - 1), length - 1} - {0, -1, length}:
        parts, other = run(subject, x, subject.function.init_state(2, length), [cut, length - cut])
        torch.testing.assert_close(parts, whole, **TOLERANCE)
        assert_same_state(other, state)


@torch.no_grad()
def test_split_token_by_token_gives_the_same_outputs_and_state(subject):
    x = subject.inputs(2, 20)
    whole, state = run(subject, x, subject.function.init_state(2, 24), [20])
    parts, other = run(subject, x, subject.function.init_state(2, 24), [1] * 20)
    torch.testing.assert_close(parts, whole, **TOLERANCE)
    assert_same_state(other, state)


@settings(max_examples=5)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_split_random_cuts_give_the_same_outputs(sizes):
    from tests.laws.conftest import make

    subject, length = make("model-polar-memory"), sum(sizes)
    with torch.no_grad():
        x = subject.inputs(1, length)
        whole, _ = subject.function(x)
        parts, _ = run(subject, x, subject.function.init_state(1, length), sizes)
    torch.testing.assert_close(parts, whole, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 65])
def test_fresh_no_state_equals_an_empty_one(subject, length):
    x = subject.inputs(2, length)
    without, none = subject.function(x)
    fresh, _ = subject.function(x, subject.function.init_state(2, length))
    assert none is None
    torch.testing.assert_close(fresh, without, **TOLERANCE)


@torch.no_grad()
def test_causal_a_later_token_changes_nothing_before_it(subject):
    x, other = subject.inputs(1, 70), subject.inputs(1, 70, seed=1)
    changed = torch.cat([x[:, :40], other[:, 40:]], 1)
    before, after = subject.function(x)[0], subject.function(changed)[0]
    torch.testing.assert_close(after[:, :40], before[:, :40], **TOLERANCE)
    assert not torch.allclose(after[:, 40:], before[:, 40:])


def poisoned(subject, x, at, value):
    """Inputs of which row 0 holds `value` at `at` (a model's: a token with such an embedding), the model put right."""
    if not subject.is_model:
        changed = x.clone()
        changed[0, at] = value
        return changed
    rare = subject.config.vocab_size - 1
    changed = x.clamp(max=rare - 1)
    changed[0, at] = rare
    subject.function.embed.weight.data[rare] = value
    return changed


def spoilt(places, fast):
    """Each place with NaN and with infinity; slow but for one number at those of `fast`."""
    found = []
    for place in places:
        for name, value in (("nan", torch.nan), ("inf", torch.inf)):
            marks = () if fast.get(place) is value else pytest.mark.slow
            found.append(pytest.param(*place, value, marks=marks, id="-".join((*map(str, place), name))))
    return found


BOTH = [(recorded, *place) for recorded in (True, False) for place in ((9, 4), (70, 40), (130, 64), (300, 290))]
"""Whether gradients are recorded; the length, and where it is spoilt."""


@pytest.mark.parametrize(
    ("recorded", "length", "at", "value"),
    spoilt(BOTH, {(True, 130, 64): torch.nan, (True, 9, 4): torch.inf, (False, 9, 4): torch.inf}),
)
def test_causal_not_even_a_number_that_is_none_reaches_back_or_another_row(subject, recorded, length, at, value):
    if not subject.ours:
        pytest.skip("the law asks for no more than that later tokens change nothing; our operations keep NaN apart too")
    x = poisoned(subject, subject.inputs(2, length), at, value)
    with torch.set_grad_enabled(recorded):
        fresh = subject.function(x)[0]
    with torch.no_grad():
        held = run(subject, x, subject.function.init_state(2, length + 3), [length])[0]
        shorter = subject.function(x[:, :at])[0]
    for y in (fresh, held):
        assert torch.isfinite(y[1]).all() and not torch.isfinite(y[0, at]).all()
        torch.testing.assert_close(y[:, :at], shorter, **TOLERANCE)


@torch.no_grad()
def test_rows_a_row_alone_equals_the_row_in_a_batch_at_any_position(subject):
    left, right, more = subject.inputs(1, 9), subject.inputs(1, 33, seed=1), subject.inputs(2, 5, seed=2)
    states = [run(subject, x, subject.function.init_state(1, 48), [x.shape[1]])[1] for x in (left, right)]
    alone = [subject.function(more[i : i + 1], trees.fork(states[i])) for i in range(2)]
    together, state = subject.function(more, trees.stack(states))
    torch.testing.assert_close(together, torch.cat([y for y, _ in alone]), **TOLERANCE)
    for i in range(2):
        assert_same_state(trees.rows(state, [i]), alone[i][1])


@torch.no_grad()
def test_capacity_room_to_spare_changes_nothing(subject):
    x = subject.inputs(2, 30)
    exact, _ = run(subject, x, subject.function.init_state(2, 30), [20, 10])
    spare, _ = run(subject, x, subject.function.init_state(2, 100), [20, 10])
    y, state = run(subject, x[:, :20], subject.function.init_state(2, 20), [20])
    grown = subject.function(x[:, 20:], trees.grow(state, 64))[0]
    torch.testing.assert_close(spare, exact, **TOLERANCE)
    torch.testing.assert_close(torch.cat([y, grown], 1), exact, **TOLERANCE)


@torch.no_grad()
def test_shape_a_state_keeps_its_shapes_and_dtypes(subject):
    before = subject.function.init_state(3, 16)
    described = [(x.shape, x.dtype) for x in tensors(before)]
    y, after = subject.function(subject.inputs(3, 7), before)
    assert y.shape == (3, 7, subject.config.width)
    assert [(x.shape, x.dtype) for x in tensors(after)] == described


def test_consumed_a_state_is_never_touched_when_gradients_are_recorded(subject):
    state = run(subject, subject.inputs(2, 5), subject.function.init_state(2, 16), [5])[1]
    state = trees.transform(state, lambda _, x: x.detach())
    kept = trees.fork(state)
    y, _ = subject.function(subject.inputs(2, 4, seed=1), state)
    y.sum().backward()
    for now, then in zip(tensors(state), tensors(kept), strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)


@torch.no_grad()
def test_consumed_a_fork_survives_the_call_that_takes_the_original(subject):
    state = run(subject, subject.inputs(2, 5), subject.function.init_state(2, 16), [5])[1]
    kept = trees.fork(state)
    again, more = trees.fork(kept), subject.inputs(2, 4, seed=1)
    first, _ = subject.function(more, state)
    second, _ = subject.function(more, again)
    torch.testing.assert_close(second, first, rtol=0, atol=0)


LENGTHS = [5, 1, 64, 30, 33]


def packed_ids(lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


@torch.no_grad()
def test_packed_documents_in_one_row_equal_each_alone(subject):
    x = subject.inputs(1, sum(LENGTHS))
    packed, _ = subject.function(x, segment_ids=packed_ids(LENGTHS))
    alone = torch.cat([subject.function(part)[0] for part in x.split(LENGTHS, 1)], 1)
    torch.testing.assert_close(packed, alone, **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize(
    ("at", "value"), spoilt([(2,), (5,), (40,), (90,), (132,)], {(90,): torch.nan, (5,): torch.inf})
)
def test_packed_a_number_that_is_none_stays_in_its_document(subject, at, value):
    x = poisoned(subject, subject.inputs(2, sum(LENGTHS)), at, value)
    ids = packed_ids(LENGTHS).expand(2, -1)
    y = subject.function(x, segment_ids=ids)[0]
    assert torch.isfinite(y[1]).all() and not torch.isfinite(y[0, at]).all()
    assert torch.isfinite(y[0, ids[0] != ids[0, at]]).all() and torch.isfinite(y[0, :at]).all()


def test_reset_a_new_document_sees_nothing_of_the_old(subject):
    """Outputs and gradients of the new document when the old one changes: to the bit, but for a mixer from elsewhere,
    which may take sums over both that cancel."""
    exact = {"rtol": 0, "atol": 0} if subject.ours else TOLERANCE
    sizes = [40, 60]
    results = []
    for seed in (0, 1):
        x = torch.cat([subject.inputs(1, 40, seed), subject.inputs(1, 60, seed=5)], 1)
        x = (subject.function.embed(x).detach() if subject.is_model else x).requires_grad_()
        y = packed(subject, x, packed_ids(sizes))
        weights = torch.linspace(-1, 1, y[:, 40:].numel(), dtype=y.dtype).view_as(y[:, 40:])
        (gradient,) = torch.autograd.grad((y[:, 40:] * weights).sum(), x)
        results.append((y[:, 40:].detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0], **exact)
    torch.testing.assert_close(results[0][1][:, 40:], results[1][1][:, 40:], **exact)
    torch.testing.assert_close(results[0][1][:, :40], torch.zeros_like(results[0][1][:, :40]), **exact)


def packed(subject, x, segment_ids):
    """The subject's output on packed documents; a model's from its embeddings on, which gradients can be taken of."""
    if not subject.is_model:
        return subject.function(x, segment_ids=segment_ids)[0]
    for block in subject.function.blocks:
        x, _ = block(x, segment_ids=segment_ids)
    return subject.function.norm(x)
