"""What a radius is for: a memory whose steps from one anchor would grow without end stays near where it started."""

import math

import pytest
import torch

from atma.ops import use_backend
from atma.ops.fast_weights import Gates, Rule, empty
from atma.ops.fast_weights.network import network
from tests.ops.memories import BACKENDS, MLP, text


@pytest.fixture(autouse=True, params=BACKENDS)
def _backend(request):
    with use_backend(request.param):
        yield


def moved(state, memory):
    """‖A − W⁰‖/‖W⁰‖ of each matrix (matrices, B, H)."""
    pairs = zip(state.weights, memory.initial, strict=True)
    return torch.stack([(a - w).norm(dim=(-2, -1)) / w.norm(dim=(-2, -1)) for a, w in pairs])


def of_one_token(given, keep=0.98):
    """The same token again and again, at steps of ½ and 16 of them from each anchor."""
    q, k, v = (x[:, :, :1].expand_as(x) for x in given[:3])
    momentum = None if given.gates.momentum is None else torch.full_like(given.gates.step, 0.5)
    step = torch.full_like(given.gates.step, 0.5)
    return given._replace(q=q, k=k, v=v, gates=Gates(step, torch.full_like(step, keep), momentum))


@pytest.mark.parametrize("options", [{}, {"optimiser": "momentum"}, {"network": "gated"}, {"norm": True}], ids=str)
def test_the_same_token_again_and_again(options):
    given = of_one_token(text(320, chunk=16, **MLP | options | {"radius": 4.0}))
    reads, state = given.run()
    assert bool(torch.isfinite(reads).all()) and bool((moved(state, given.memory) <= 4 + 1e-9).all())


def test_without_a_radius_it_has_no_end():
    reads, state = of_one_token(text(320, chunk=16, **MLP)).run()
    assert float(reads.abs().max()) > 1e12 and float(moved(state, text(320, chunk=16, **MLP).memory).max()) > 1e6


def test_what_it_forgets_brings_it_back():
    given = of_one_token(text(320, chunk=16, **MLP, radius=4.0), keep=0.9)
    _, state = given.run()
    assert bool((moved(state, given.memory) > 1).any())
    _, state = given._replace(gates=Gates(0 * given.gates.step, given.gates.keep)).run(state)
    known, begun = (
        network(w, given.q[:, :, :1], given.memory) for w in (state.weights, empty(given.memory, 2).weights)
    )
    torch.testing.assert_close(known, begun, rtol=1e-4, atol=1e-4)


def test_within_it_nothing_changes():
    free, held = (text(**MLP, radius=radius) for radius in (math.inf, 40.0))
    (reads, state), (same, after) = free.run(), held.run()
    assert torch.equal(reads, same) and all(map(torch.equal, state.weights, after.weights))


def test_it_is_drawn_back_on_the_way_to_its_start():
    free, held = (text(4, **MLP, radius=radius) for radius in (math.inf, 0.05))
    (_, far), (_, near) = free.run(), held.run()
    assert bool((moved(far, free.memory) > 0.05).all())
    for a, b, w in zip(far.weights, near.weights, free.memory.initial, strict=True):
        share = 0.05 * w.norm(dim=(-2, -1)) / (a - w).norm(dim=(-2, -1))
        torch.testing.assert_close(b, w + share[..., None, None] * (a - w))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"radius": 0.0}, "positive"),
        ({"radius": 2.0}, 'network = "matrix"'),
        ({"network": "mlp", "retention": "lq", "radius": 2.0}, 'retention = "l2"'),
        ({"network": "mlp", "granularity": "chunk", "radius": 2.0}, 'granularity = "token"'),
    ],
)
def test_where_there_is_none(options, named):
    with pytest.raises(ValueError, match="'radius'") as caught:
        Rule(**options)
    assert named in str(caught.value)
