"""Masks and caps do what they say, to that part alone, and leave nothing behind."""

import math

import pytest
import torch

from atma.diagnose.interventions import capped, masked, noted_decays
from atma.diagnose.parts import (
    Head,
    Part,
    attending,
    channel_masks,
    channels,
    forgetting,
    head_masks,
    memory_heads,
    parse_heads,
)
from tests.diagnose.conftest import made

TOKENS = torch.randint(0, 257, (2, 70), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def hidden(model):
    return model(TOKENS)[0]


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_a_masked_channel_is_a_projection_of_zeros(any_model):
    before = hidden(any_model)
    for layer, mixer in attending(any_model).items():
        for channel, projection in mixer.channels().items():
            with masked(any_model, Part((layer,), (channel,))):
                found = hidden(any_model)
            weight = projection.weight.detach().clone()
            with torch.no_grad():
                projection.weight.zero_()
                same(found, hidden(any_model))
                projection.weight.copy_(weight)
            assert (found - before).abs().max() > 1e-3
    assert torch.equal(before, hidden(any_model))


def test_a_masked_head_is_its_columns_at_zero_in_every_channel(any_model):
    layer, mixer = list(attending(any_model).items())[-1]
    before = hidden(any_model)
    with masked(any_model, head_masks(any_model)[f"without head {layer}.1"]):
        found = hidden(any_model)
    with torch.no_grad():
        for projection in mixer.channels().values():
            projection.weight[:, projection.in_features // 2 :] = 0
    same(found, hidden(any_model))
    assert (found - before).abs().max() > 1e-3


def test_masks_are_of_the_channels_that_a_model_has():
    assert channels(made()) == ("read", "count", "memory")
    assert channels(made("nope", False)) == ("read",)
    assert list(channel_masks(made("rope", False))) == [
        "without the read of layer 1",
        "without the read of layer 3",
        "without any read",
    ]
    assert channel_masks(made())["without any memory"] == Part((1, 3), ("memory",))
    assert Part((1, 3), ("memory",)).heads(made()) == ["1.0", "1.1", "3.0", "3.1"]


def test_a_channel_that_is_not_there_is_refused():
    with (
        pytest.raises(ValueError, match="layer 1 has no channel 'count'; it has read"),
        masked(made("nope", False), Part((1,), ("count",))),
    ):
        pass
    with (
        pytest.raises(ValueError, match="layer 0 has no channel 'read'; it has none"),
        masked(made(), Part((0,), ("read",))),
    ):
        pass


def test_a_cap_on_all_heads_is_the_configured_bound(model):
    before = hidden(model)
    with capped(model, memory_heads(model), 3.0):
        found = hidden(model)
    for memory in forgetting(model).values():
        memory.max_half_life = 3.0
    assert torch.equal(found, hidden(model))
    assert (found - before).abs().max() > 1e-4


@torch.no_grad()
def test_a_cap_on_one_head_bounds_its_gamma_and_no_other(model):
    mixer, x = attending(model)[3], torch.randn(1, 9, 16, dtype=torch.float64)
    memory, projected = mixer.memory, mixer.project(x)
    with capped(model, [Head(3, 1)], 2.0):
        found, after = memory(x, projected.q, projected.k, projected.v, None)
    log_decay, beta = memory.log_decay(x), memory.beta(x)
    gamma = log_decay.exp()
    assert (gamma[:, 1] > 2**-0.5).any() and (gamma[:, 0] > 2**-0.5).any()
    gamma[:, 1] = gamma[:, 1].clamp(max=2**-0.5)
    reads = torch.zeros(9, 2, 8, dtype=torch.float64)
    for head in range(2):
        M = torch.zeros(8, 8, dtype=torch.float64)
        for t in range(9):
            q, k = (z[0, i, t] / z[0, i, t].norm() for z, i in ((projected.q, head), (projected.k, 0)))
            M = gamma[0, head, t] * M
            M = M + beta[0, head, t] * torch.outer(projected.v[0, 0, t] - M @ k, k)
            r = M @ q
            reads[t, head] = r / (r.square().mean() + 2.0**-23).sqrt()
        same(after[0, head], M)
    same(found[0], memory.out_proj(reads.flatten(1) * torch.sigmoid(memory.gate_proj(x[0]))))


def test_everything_is_undone_even_after_an_error(model):
    before, weights = hidden(model), {name: x.clone() for name, x in model.state_dict().items()}
    notes = {}
    with (
        pytest.raises(RuntimeError, match="inside"),
        masked(model, Part((1,), ("read", "count"), 0)),
        capped(model, [Head(1, 0)], 5),
        noted_decays(model, notes),
        capped(model, [Head(1, 0)], 2),
    ):
        hidden(model)
        raise RuntimeError("inside")
    assert torch.equal(before, hidden(model))
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not any("log_decay" in vars(memory) for memory in forgetting(model).values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert len(notes[1]) == 1  # of the call inside, and of none after


def test_caps_nest_and_the_tighter_one_holds(model):
    notes = {}
    with capped(model, [Head(1, 0)], 2), noted_decays(model, notes):
        hidden(model)
    assert float(notes[1][0][:, 0].max()) == pytest.approx(-math.log(2) / 2)
    assert float(notes[1][0][:, 1].max()) > -math.log(2) / 2


@pytest.mark.parametrize("half_life", [0, -1, math.inf, math.nan])
def test_a_cap_that_is_no_number_of_tokens_is_refused(model, half_life):
    with pytest.raises(ValueError, match="a cap must be a positive, finite number"), capped(model, [], half_life):
        pass


def test_a_cap_holds_in_the_steady_form_too(model):
    whole = {}
    for steady in (False, True):
        for memory in forgetting(model).values():
            memory.steady(steady)
        with capped(model, memory_heads(model), 3.0):
            whole[steady] = hidden(model)
    same(whole[True], whole[False])
    assert (whole[True] - hidden(model)).abs().max() > 1e-4


def test_heads_are_named_by_layer_and_head(model):
    assert parse_heads("1.0,3.1,1.0", model) == [Head(1, 0), Head(3, 1)]
    assert parse_heads("worst3", model) == parse_heads("worst 3", model) == 3
    assert parse_heads("all", model) == [Head(1, 0), Head(1, 1), Head(3, 0), Head(3, 1)]
    assert parse_heads("all", made("nope", False)) == []


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("0.1", "no memory head 0.1; layers with a memory: 1, 3, heads 0 to 1"),
        ("1.2", "no memory head 1.2"),
        ("worst0", "heads are named as in 2.5,6.1"),
        ("1", "not '1'"),
        ("", "not ''"),
    ],
)
def test_heads_that_are_not_there_are_refused(model, named, said):
    with pytest.raises(ValueError, match=said):
        parse_heads(named, model)
