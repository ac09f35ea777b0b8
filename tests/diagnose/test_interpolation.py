"""Moved heads read what their materialised maps, moved to the identity, read; all else stays, and all is undone."""

import pytest
import torch
import torch.nn.functional as F

from atma.diagnose.interpolation import interpolated, movable_heads
from atma.diagnose.parts import Head, attending
from tests.diagnose.conftest import made

TOKENS = torch.randint(0, 257, (1, 40), generator=torch.Generator().manual_seed(0))
X = torch.randn(1, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def given_to_channels(mixer, x):
    """What the read's and the count's projection are given."""
    found = {}
    handles = [
        projection.register_forward_pre_hook(lambda _, given, name=name: found.update({name: given[0]}))
        for name, projection in mixer.channels().items()
    ]
    with torch.no_grad():
        mixer(x)
    for handle in handles:
        handle.remove()
    return found


def by_the_map(mixer, x, strengths):
    """The same from a map (H, T, T + 1), the null's column last, that is materialised and moved."""
    projected = mixer.project(x)
    q, k = mixer.core.turn(projected.q, projected.k, None, None)
    q, k, v = q[0], *(z[0].repeat_interleave(mixer.heads // mixer.groups, 0) for z in (k, projected.v))
    t = torch.arange(x.shape[1])
    reach = mixer.core.window or x.shape[1]
    seen = (t <= t[:, None]) & (t > t[:, None] - reach)
    scale, null = mixer.core.scale_and_null(q[None], seen.sum(-1)[None].double())
    logits = (q @ k.mT * scale[0, ..., None]).masked_fill(~seen, -torch.inf)
    null = torch.full_like(logits[..., :1], -torch.inf) if null is None else null[0, ..., None]
    whole = torch.cat([logits, null], -1).softmax(-1)
    s = torch.tensor(strengths, dtype=torch.float64)[:, None, None]
    whole = (1 - s) * whole + s * torch.eye(len(t), len(t) + 1, dtype=torch.float64)
    w, w_null = whole[..., :-1], whole[..., -1]
    read, found = w @ v, {}
    if hasattr(mixer.core, "null_value"):
        d = read + w_null[..., None] * mixer.core.null_value[:, None]
        read = mixer.core.radius * d / d.norm(dim=-1, keepdim=True)
        effective = w.sum(-1) ** 2 / w.square().sum(-1) * (1 - w_null)
        slope = F.softplus(mixer.core.magnitude_slope)[:, None]
        found["count"] = torch.tanh(slope * effective.log1p()).mT[None]
    gated = read * torch.sigmoid(projected.gate[0])
    return found | {"read": gated.transpose(0, 1).flatten(1)[None]}


@torch.no_grad()
@pytest.mark.parametrize("strengths", [(0.0, 0.3), (0.7, 0.7), (1.0, 0.0)])
def test_a_moved_head_reads_by_its_moved_map(any_model, strengths):
    mixer = attending(any_model)[3]
    plain = given_to_channels(mixer, X)
    moved = [head for head in range(2) if strengths[head]]
    with interpolated(any_model, [Head(3, head) for head in moved], max(strengths)):
        found = given_to_channels(mixer, X)
    wanted = by_the_map(mixer, X, strengths)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12)
    for name in set(plain) - set(wanted):
        assert torch.equal(found[name], plain[name])
    assert not torch.equal(found["read"], plain["read"])


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(40,), (17, 23), (30, *[1] * 10)])
def test_moved_heads_do_not_see_how_a_text_is_cut(any_model, sizes):
    with interpolated(any_model, movable_heads(any_model), 0.4):
        whole, _ = any_model(TOKENS)
        state, pieces = any_model.init_state(1, 40), []
        for piece in TOKENS.split(sizes, 1):
            hidden, state = any_model(piece, state)
            pieces.append(hidden)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_nothing_moved_is_nothing_changed_and_all_is_undone(any_model):
    before, _ = any_model(TOKENS)
    with interpolated(any_model, movable_heads(any_model), 0.0):
        assert torch.equal(any_model(TOKENS)[0], before)
    with pytest.raises(RuntimeError, match="inside"), interpolated(any_model, movable_heads(any_model), 1.0):
        any_model(TOKENS)
        raise RuntimeError("inside")
    assert torch.equal(any_model(TOKENS)[0], before)
    for mixer in attending(any_model).values():
        assert not {"attended", "forward"} & {*vars(mixer), *vars(mixer.core)}


def test_what_has_no_map_is_refused():
    model = made()
    assert movable_heads(model) == [Head(1, 0), Head(1, 1), Head(3, 0), Head(3, 1)]
    with (
        pytest.raises(ValueError, match=r"head 0\.0 has no map of weights .* heads that have: 1\.0, 1\.1, 3\.0, 3\.1"),
        interpolated(model, [Head(0, 0)], 0.5),
    ):
        pass
    with pytest.raises(ValueError, match=r"a strength must be from 0 to 1, not 1\.5"), interpolated(model, [], 1.5):
        pass
