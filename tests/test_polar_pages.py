"""Polar attention whose pages are found by landmarks: where it is polar attention, its formula, and refusals."""

import math

import pytest
import torch

from atma.config import ModelConfig
from atma.mixers.base import Call
from tests.laws.conftest import randomise

CLOSE = {"rtol": 1e-9, "atol": 1e-10}
SMALL = {"width": 16, "depth": 1, "query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory": False}
OWN = {"page": 4, "chosen": 2, "near": 6, "landmark_width": 6, "landmark_taps": 3}


def mixer(name="polar_pages", **own):
    options = OWN | own if name == "polar_pages" else {}
    built = ModelConfig(16, pattern=(name,), **SMALL, **options).mixer(0)
    built.init_weights(torch.Generator().manual_seed(0))
    return randomise(built)


def inputs(tokens, rows=2):
    return torch.randn(rows, tokens, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def polar_of(pages):
    """Polar attention with the weights that both have."""
    polar = mixer("polar")
    polar.load_state_dict(pages.state_dict(), strict=False)
    return polar


@torch.no_grad()
def test_while_everything_is_near_it_is_polar_attention_and_no_longer():
    pages = mixer(near=20)
    x = inputs(30)
    found, whole = pages(x)[0], polar_of(pages)(x)[0]
    torch.testing.assert_close(found[:, :20], whole[:, :20], **CLOSE)
    assert not torch.allclose(found[:, 25:], whole[:, 25:])


@torch.no_grad()
def test_with_landmarks_that_say_nothing_and_every_page_chosen_it_is_polar_attention():
    pages = mixer(chosen=9)
    pages.landmark_gain.zero_()
    x = inputs(30)
    torch.testing.assert_close(pages(x)[0], polar_of(pages)(x)[0], **CLOSE)
    state = pages.init_state(2, 30)
    torch.testing.assert_close(pages(x, state)[0], polar_of(pages)(x)[0], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("i", [5, 13, 26, 28])
def test_a_query_reads_what_the_formula_says(i):
    """(6.7) and (6.8) of query i, written out: the two pages of largest b before those near, and these with b = 0."""
    pages = mixer()
    x = inputs(29, rows=1)
    P, W, near, K, R = 4, 3, 6, 8, 6
    r, u, _ = pages.landmark_parts(x, None, None)
    projected = pages.project(x, None, None)
    q, k, v = projected.q[0], projected.k[0, 0], projected.v[0, 0]
    count = torch.tensor([[i + 1]])
    scale, null = pages.core.scale_and_null(projected.q[:, :, i : i + 1], count)
    opening = max(0, i + 1 - near) // P * P  # of the first page near
    S, L = torch.zeros(2, K, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for h in range(2):
        b = []
        for g in range(opening // P):
            some = slice(max(0, g * P - W), g * P + P)
            mark = (u[0, some, 0, R].softmax(0)[:, None] * u[0, some, 0, :R]).sum(0)
            b.append(float(pages.landmark_gain[h] * (r[0, h, i] @ mark)) / math.sqrt(R))
        best = sorted(range(len(b)), key=lambda g: -b[g])[:2]
        beside = torch.full((i + 1,), -math.inf, dtype=torch.float64)
        beside[opening:] = 0
        for g in best:
            beside[g * P : (g + 1) * P] = b[g]
        e = (scale[0, h, 0] * (k[: i + 1] @ q[h, i] + math.sqrt(K) * beside)).exp()
        S[h], L[h] = e @ v[: i + 1], e.sum()
    sums, got_null = pages.from_beginning((projected.q, projected.k, projected.v), r, u, None, None)
    torch.testing.assert_close((sums.S[0, :, i] * sums.M[0, :, i, None].exp()), S, **CLOSE)
    torch.testing.assert_close(sums.L[0, :, i] * sums.M[0, :, i].exp(), L, **CLOSE)
    torch.testing.assert_close(got_null[0, :, i], null[0, :, 0], **CLOSE)


@torch.no_grad()
def test_what_pages_weigh_by_their_landmarks_alone_is_drawn_in_training_only():
    x = inputs(40)

    def output(pages, noise):
        return pages(x, call=Call(x, noise=noise))[0]

    never, always = mixer(blind_share=0.0), mixer(blind_share=1.0)
    always.load_state_dict(never.state_dict())
    torch.testing.assert_close(output(never, 5), never(x)[0], rtol=0, atol=0)
    torch.testing.assert_close(output(always, None), never(x)[0], rtol=0, atol=0)
    assert not torch.allclose(output(always, 5)[:, 20:], never(x)[0][:, 20:])
    # Of pages of one token nothing is left of their keys, which may then be any; of the token itself, alone near, all.
    one = mixer(page=1, near=1, chosen=3, blind_share=1.0)
    r, u, _ = one.landmark_parts(x, None, None)
    q, k, v = one.project(x, None, None)[:3]
    other = torch.cat([torch.randn_like(k[:, :, :39]), k[:, :, 39:]], 2)
    for noise, same in ((1, True), (None, False)):
        sums = [one.from_beginning((q, keys, v), r, u, None, noise)[0] for keys in (k, other)]
        weights = [each.L[:, :, 39] * each.M[:, :, 39].exp() for each in sums]
        assert torch.allclose(*weights, rtol=1e-9) == same


def test_landmarks_learn_of_the_loss_though_the_choice_has_no_gradient():
    pages = mixer()
    pages(inputs(40))[0].square().sum().backward()
    for name in ("r_proj.weight", "u_proj.weight", "salience.weight", "r_taps", "landmark_gain"):
        assert pages.get_parameter(name).grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("option", "value"),
    [("page", 0), ("chosen", 0), ("near", 0), ("landmark_width", 0), ("landmark_taps", 0), ("blind_share", 1.5),
     ("window", 8), ("core", "nope")],
)  # fmt: skip
def test_what_it_cannot_take_is_refused_by_name(option, value):
    with pytest.raises(ValueError, match=f"'{option}'"):
        ModelConfig(16, width=16, depth=1, pattern=("polar_pages",), **{option: value})
