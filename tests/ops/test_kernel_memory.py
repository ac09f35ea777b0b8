"""Kernel memories in turn: compiled, written where they lie, against the definition, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from atma import state as states
from atma.ops import native
from atma.ops.backend import implementation
from atma.ops.fast_weights import Kernel, empty_kernel, kernel_memory
from tests.ops.memories import KERNELS, assert_same, kernel_text

compiled = pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")


@compiled
@pytest.mark.parametrize("name", KERNELS)
def test_a_token_of_a_kernel_memory_written_where_it_lies_is_the_definitions(name):
    given = kernel_text(name, tokens=23)
    _, ahead = given.part(slice(7)).run(empty_kernel(given.memory, 2, 30, (4, 5)))
    empty_rows = empty_kernel(given.memory, 2, 30, (4, 5))
    both = [states.stack([states.rows(ahead, [0]), states.rows(empty_rows, [1])]) for _ in range(2)]
    keys = both[0].keys
    for n in range(7, 23):
        with torch.no_grad():
            token = given.part(slice(n, n + 1))
            steps = [
                kernel_memory(*token, one, backend=name)
                for one, name in zip(both, ("native", "reference"), strict=True)
            ]
        both = [after for _, after in steps]
        assert_same(steps[0], steps[1], 1e-10)
    assert both[0].keys is keys


@compiled
@pytest.mark.parametrize("rule", ["add", "delta"])
@pytest.mark.parametrize("window", [1, 3, 9])
@pytest.mark.parametrize("room", [6, 13])
def test_tokens_of_a_kernel_memory_in_turn_are_the_definitions(rule, window, room):
    """Shared keys and values, windows longer than the room, up to the last place."""
    torch.manual_seed(0)
    memory = Kernel(torch.rand(4).double() + 1, rule, window, rule == "add")
    q, k = (F.normalize(torch.randn(2, heads, room, 5).double(), dim=-1) for heads in (4, 2))
    v, omega = torch.randn(2, 1, room, 3).double(), torch.rand(2, 4, room, window).double()
    both = [empty_kernel(memory, 2, room, (5, 3)) for _ in range(2)]
    spread = torch.empty(4, dtype=torch.int32)
    with torch.no_grad():
        for part in (slice(0, 1), slice(1, 4), slice(4, room)):
            given = [x[:, :, part] for x in (q, k, v, omega)]
            spread[::2] = both[0].length
            both[0] = both[0]._replace(length=spread[::2])  # not contiguous
            steps = [
                kernel_memory(*given, memory, one, backend=name)
                for one, name in zip(both, ("native", "reference"), strict=True)
            ]
            both = [after for _, after in steps]
            assert_same(steps[0], steps[1], 1e-10)


@compiled
def test_a_step_without_gradients_leaves_what_an_earlier_one_keeps():
    found = []
    for backend in ("reference", "native"):
        torch.manual_seed(0)
        memory = Kernel(torch.ones(1).double(), "add", 3)
        omega = torch.rand(1, 1, 1, 3).double().requires_grad_()
        q, v = F.normalize(torch.randn(1, 1, 1, 4).double(), dim=-1), torch.randn(1, 1, 1, 3).double()
        read, state = kernel_memory(q, q, v, omega, memory, empty_kernel(memory, 1, 4, (4, 3)), backend=backend)
        with torch.no_grad():
            kernel_memory(q, q, 2 * v, omega, memory, state, backend=backend)
        found.append(torch.autograd.grad(read.sum(), omega)[0])
    assert torch.equal(*found)


def test_states_of_a_kernel_memory_that_do_not_fit_are_refused():
    given = kernel_text("dot", tokens=3)
    state = empty_kernel(given.memory, 2, 8, (4, 5))
    for wrong, told in (
        (state._replace(keys=state.keys.int()), "state.keys"),
        (state._replace(length=state.length - 1), "3 tokens behind -1 do not fit"),
        (state._replace(length=state.length + 6), "3 tokens behind 6 do not fit"),
        (state._replace(length=state.length.float()), "state.length"),
    ):
        with pytest.raises(ValueError, match=told):
            given.run(wrong)


@compiled
def test_a_step_without_room_reads_no_number_and_writes_nothing():
    given = kernel_text("swdt", tokens=3)
    state = empty_kernel(given.memory, 2, 3, (4, 5))
    full = state._replace(length=torch.tensor([1, 3], dtype=torch.int32))
    q, k, v, omega = (x[:, :, :1] for x in (given.q, given.k, given.v, given.omega))
    with torch.no_grad():
        read, after = implementation("fast_weights", "native").kernel_in_turn(q, k, v, omega, given.memory, full)
    assert read[0].isfinite().all() and read[1].isnan().all()
    assert after.keys[0].any() and not after.keys[1].any()
