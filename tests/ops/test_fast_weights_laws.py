"""The laws over every neural memory: cuts, rows, packed documents, shared heads, precision, and its state."""

import pytest
import torch

from atma import state as states
from atma.ops import use_backend
from atma.ops.fast_weights import Kernel, Memory, empty, empty_kernel, fast_weights
from tests.ops.memories import BACKENDS, KERNELS, PRESETS, assert_same, kernel_text, text

ALL = [*PRESETS, *KERNELS]


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request):
    with use_backend(request.param):
        yield


def any_text(name, **sizes):
    return kernel_text(name, **sizes) if name in KERNELS else text(**sizes, **PRESETS[name])


def start(given, room=11):
    """The state before the first token."""
    if isinstance(given.memory, Kernel):
        return empty_kernel(given.memory, len(given.q), room, (given.q.shape[3], given.v.shape[3]))
    return empty(given.memory, len(given.q))


@pytest.mark.parametrize("name", ALL)
def test_a_text_may_be_cut_at_any_token(name):
    given = any_text(name)
    whole, after = given.run(start(given))
    for cut in (1, 3, 4, 5, 8, 10):  # inside, at and beside the ends of chunks of four
        first, state = given.part(slice(cut)).run(start(given))
        rest, state = given.part(slice(cut, None)).run(state)
        assert_same((torch.cat([first, rest], 2), state), (whole, after))


@pytest.mark.parametrize("name", ALL)
def test_rows_may_stand_at_different_places_of_the_grid(name):
    given = any_text(name)
    whole, after = given.run(start(given))
    _, ahead = given.part(slice(3)).run(start(given))
    mixed = states.stack([states.rows(ahead, [0]), states.rows(start(given), [1])])
    parts = [given.part(slice(3, 11), slice(0, 1)), given.part(slice(8), slice(1, 2))]
    both = type(given)(*(together(a, b) for a, b in zip(parts[0], parts[1], strict=True)))
    read, state = both.run(mixed)
    torch.testing.assert_close(read, torch.stack([whole[0, :, 3:11], whole[1, :, :8]]), rtol=1e-10, atol=1e-10)
    assert state.length.tolist() == [11, 8]
    assert_same(states.rows(state, [0]), states.rows(after, [0]))


def together(a, b):
    """Two rows of the same thing; slow weights are one's."""
    if isinstance(a, Memory | Kernel) or a is None:
        return a
    return torch.cat([a, b]) if isinstance(a, torch.Tensor) else type(a)(*map(together, a, b))


@pytest.mark.parametrize("name", ALL)
def test_packed_documents_are_each_document_alone(name):
    given = any_text(name)
    ids = torch.tensor([[7] * 5 + [8] * 6, [1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1]])
    cuts = [[(0, 5), (5, 11)], [(0, 2), (2, 3), (3, 11)]]
    given.k.requires_grad_()
    read, after = given.run(segment_ids=ids)
    alone = [[given.part(slice(a, b), slice(row, row + 1)).run() for a, b in cuts[row]] for row in range(2)]
    joined = torch.cat([torch.cat([out for out, _ in documents], 2) for documents in alone])
    last = states.stack([states.grow(documents[-1][1], states.capacity(after)) for documents in alone])
    assert_same((read, after), (joined, last))
    [found], [wanted] = (torch.autograd.grad((x * x).sum(), given.k, retain_graph=True) for x in (read, joined))
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
def test_no_state_is_the_state_before_the_first_token_and_a_state_given_stays(name):
    given = any_text(name)
    state = start(given)
    kept = states.fork(state)
    assert_same(given.run(state), given.run())
    assert_same(state, kept, 0)


@pytest.mark.parametrize("name", ALL)
def test_heads_may_share_keys_and_values(name):
    given = any_text(name, heads=2)
    one = given._replace(k=given.k[:, :1], v=given.v[:, :1])
    both = given._replace(k=given.k[:, :1].expand_as(given.k), v=given.v[:, :1].expand_as(given.v))
    assert_same(one.run(), both.run(), 0)


@pytest.mark.parametrize("name", ALL)
def test_low_precision_is_read_and_the_state_stays_float32(name):
    given = any_text(name)
    wanted, _ = given.run()
    for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        read, state = given._replace(**{one: getattr(given, one).to(dtype) for one in "qkv"}).run()
        assert read.dtype == dtype
        assert {x.dtype for x in states.tensors(state)} == {torch.float32, torch.int32}
        assert (read.double() - wanted).norm() < most * wanted.norm()


@pytest.mark.parametrize("name", ALL)
def test_a_state_is_saved_and_read_again(name, tmp_path):
    given = any_text(name)
    _, state = given.run(start(given))
    states.save(state, tmp_path / "state.safetensors")
    assert_same(states.load(tmp_path / "state.safetensors", start(given))[0], state, 0)
    assert states.capacity(state) == (11 if name in KERNELS else 0)


@pytest.mark.parametrize("name", ALL)
def test_nothing_to_remember_has_finite_gradients(name):
    """Zeros under every root: of keys, values, and the initial weights where no norm is taken of them."""
    given = any_text(name)
    q, k, v = (torch.zeros_like(x).requires_grad_() for x in (given.q, given.k, given.v))
    if name in PRESETS and given.memory.rule.retention in ("l2", "kl"):
        given = given._replace(memory=given.memory._replace(initial=tuple(0 * w for w in given.memory.initial)))
    read, state = given._replace(q=q, k=k, v=v).run()
    loss = read.square().sum() + sum(x.square().sum() for x in states.tensors(state))
    for gradient in torch.autograd.grad(loss, (q, k, v)):
        assert gradient.isfinite().all()


def test_a_kernel_memory_does_not_read_what_lies_behind_its_length():
    given = kernel_text("dot_window")
    state = start(given)
    littered = state._replace(keys=state.keys + 3, written=state.written + 3)
    torch.testing.assert_close(given.run(littered)[0], given.run(state)[0], rtol=0, atol=0)


def test_fast_weights_stay_out_of_autocast():
    given = text(**PRESETS["titans"])
    low = given._replace(**{one: getattr(given, one).float() for one in "qkv"})
    with torch.autocast("cpu", torch.bfloat16):
        read, _ = fast_weights(low.q, low.k, low.v, low.gates, low.memory)
    torch.testing.assert_close(read, low.run()[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_behind_a_text_in_a_kernel_is_never_read(name):
    given = kernel_text(name)
    state = start(given, 20)
    littered = state._replace(keys=state.keys + torch.nan, written=state.written + torch.inf)
    torch.testing.assert_close(given.run(littered)[0], given.run(start(given, 20))[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", KERNELS)
def test_what_a_kernel_has_written_is_not_written_again(name):
    given = kernel_text(name)
    _, state = given.part(slice(7)).run(start(given, 11))
    _, after = given.part(slice(7, 11)).run(states.branch(state))
    for before, later in ((state.keys, after.keys), (state.written, after.written)):
        assert torch.equal(before[:, :, :7], later[:, :, :7])


@pytest.mark.parametrize("name", ["lact", "allmem", "lact_muon", "moneta", "titans"])
def test_a_state_of_a_call_with_gradients_shares_nothing_with_the_one_before(name):
    given = any_text(name)
    state = start(given)
    given.q.requires_grad_()
    read, after = given.part(slice(2)).run(state)
    with torch.no_grad():
        given.part(slice(2, 5)).run(after)
    [found] = torch.autograd.grad((read * read).sum(), given.q)
    [wanted] = torch.autograd.grad(given.part(slice(2)).run(start(given))[0].square().sum(), given.q)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
