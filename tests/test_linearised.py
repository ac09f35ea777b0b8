"""Softmax attention made linear: formula (7.3) token by token, and what it refuses."""

import pytest
import torch

from atma.config import ModelConfig
from atma.ops.segments import document_start
from tests.laws.conftest import randomise

TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory": False, "core": "rope"}


def made(**options):
    table = {"kind": "linearised", **TINY, "window": 3, **options}
    mixer = ModelConfig(16, width=16, depth=1, pattern=("it",), mixers={"it": table}).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer).double()


def by_hand(mixer, x, segment_ids=None):
    """Formula (7.3), every row of weights made in full."""
    projected = mixer.project(x, None, segment_ids)
    q, k = mixer.core.turn(projected.q, projected.k, None, segment_ids)
    phi_q, phi_k = mixer.feature(q), mixer.feature(k)
    k, v = (z.repeat_interleave(2, 1) for z in (k, projected.v))
    index = torch.arange(x.shape[1])
    begin = torch.zeros(x.shape[:2]) if segment_ids is None else document_start(segment_ids)
    seen = (index <= index[:, None]) & (index >= begin[..., None])
    near = seen & (index > index[:, None] - 3)
    inside = mixer.window_gain[:, None, None] + mixer.core.scale * q @ k.mT
    weights = torch.where(near[:, None], inside.exp(), (phi_q @ phi_k.mT)) * seen[:, None]
    read = (weights / weights.sum(-1, keepdim=True)) @ v
    return mixer.out_proj(mixer.gated(read, projected.gate))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 11, 70])
def test_it_is_the_formula(length, packed):
    mixer, x = made(), torch.randn(2, length, 16, dtype=torch.float64)
    segments = (torch.arange(length) >= length // 2).int().expand(2, -1) if packed else None
    torch.testing.assert_close(mixer(x, segment_ids=segments)[0], by_hand(mixer, x, segments), rtol=1e-9, atol=1e-9)


def test_its_alignment_is_the_entropy_of_softmax_where_the_window_holds_everything():
    mixer, x = made(window=20), torch.randn(2, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        mixer.window_gain.zero_()
    projected = mixer.project(x)
    q, k = mixer.core.turn(projected.q, projected.k, None, None)
    scores = mixer.core.scale * q @ k.repeat_interleave(2, 1).mT
    p = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)
    entropy = -torch.where(p > 0, p * p.clamp(min=1e-300).log(), 0).sum(-1).mean()
    torch.testing.assert_close(mixer.alignment(x), entropy)


def test_aligned_features_come_nearer():
    mixer, x = made(), torch.randn(2, 40, 16, dtype=torch.float64)
    mixer.init_weights(torch.Generator().manual_seed(0))
    randomise(mixer.out_proj)
    optimiser = torch.optim.Adam([*mixer.feature.parameters(), mixer.window_gain], 0.02)
    losses = []
    for _ in range(20):
        losses.append(mixer.alignment(x))
        optimiser.zero_grad()
        losses[-1].backward()
        optimiser.step()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"window": None}, "'window'"),
        ({"memory": True}, "'memory'"),
        ({"window_sinks": 2}, "'window_sinks'"),
        ({"core": "persistent"}, "'core'"),
    ],
)
def test_what_has_no_linear_form_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        made(**options)
