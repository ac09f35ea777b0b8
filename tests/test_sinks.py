"""The first tokens of a text beside a window: one softmax over both, and what is refused."""

import pytest
import torch

from atma.config import ModelConfig
from tests.laws.conftest import randomise

TINY = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory": False}


def made(**options):
    config = ModelConfig(
        16, width=16, depth=1, pattern=("it",), mixers={"it": {"kind": "attention", **TINY, **options}}
    )
    mixer = config.mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer).double()


def by_hand(mixer, x, window, sinks):
    projected = mixer.project(x)
    q, k = mixer.core.turn(projected.q, projected.k, None, None)
    k, v = (z.repeat_interleave(2, 1) for z in (k, projected.v))
    index = torch.arange(x.shape[1])
    seen = (index <= index[:, None]) & ((index > index[:, None] - window) | (index < sinks))
    weights = (mixer.core.scale * q @ k.mT).masked_fill(~seen, -torch.inf).softmax(-1)
    return mixer.out_proj(mixer.gated(weights @ v, projected.gate))


@pytest.mark.parametrize("core", ["rope", "nope"])
@pytest.mark.parametrize(("window", "sinks"), [(3, 2), (1, 4), (5, 1), (4, 30)])
@pytest.mark.parametrize("length", [1, 4, 9, 20])
def test_one_softmax_is_over_the_window_and_the_first_tokens(core, window, sinks, length):
    mixer, x = made(core=core, window=window, window_sinks=sinks), torch.randn(2, length, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], by_hand(mixer, x, window, sinks), rtol=1e-10, atol=1e-10)


def test_a_window_of_the_whole_text_is_full_attention_to_the_bit():
    mixer, x = made(core="rope", window=20, window_sinks=4), torch.randn(2, 20, 16, dtype=torch.float64)
    whole = made(core="rope")
    whole.load_state_dict(mixer.state_dict())
    assert torch.equal(mixer(x)[0], whole(x)[0])


def test_a_state_holds_the_window_and_the_first_tokens_and_no_more():
    state = made(core="rope", window=5, window_sinks=3).init_state(2, 1000)
    assert state.keys.shape[2] == 5 and state.sink_keys.shape[2] == 3


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"core": "rope", "window_sinks": 2}, "'window_sinks' must be 0, or more with a window"),
        ({"core": "polar", "window": 4, "window_sinks": 2}, "'.*window_sinks' must be 0 with core = \"polar\""),
        ({"core": "rope", "memory_scale": True}, "'.*memory_scale' must be false without a memory"),
    ],
)
def test_what_has_no_first_tokens_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
        made(**options)
