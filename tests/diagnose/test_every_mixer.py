"""Every mixer and memory of the table has the rows of what it tells of itself: half-lives, caps, masks by channel."""

import math

import numpy as np
import pytest
import torch

from atma.config import ModelConfig
from atma.diagnose.diagnosis import diagnose
from atma.diagnose.interventions import can_be_capped, capped, masked
from atma.diagnose.parts import Part, channel_masks, forgetting, head_masks, memory_heads, zero_input
from atma.diagnose.plan import Plan
from atma.eval.likelihood.prefixes import Documents
from atma.mixers.table import MEMORIES, MIXERS, small
from atma.model import Model
from atma.tokenizer import byte_tokenizer
from tests.diagnose.conftest import Loaded

TOKENS = torch.randint(0, 257, (1, 40), generator=torch.Generator().manual_seed(0))
ATTENDING = {"kind": "attention", "core": "nope", "query_heads": 2, "key_value_heads": 1, "head_width": 8}
CASES = [(name, {"kind": name, **next(iter(small(name)), {})}) for name in MIXERS]
CASES += [(f"memory {name}", ATTENDING | {"memory": name}) for name in MEMORIES]


@pytest.fixture(params=[case for _, case in CASES], ids=[name for name, _ in CASES])
def model(request) -> Model:
    """The mixer twice, every parameter random."""
    generator = torch.Generator().manual_seed(5)
    config = ModelConfig(257, 16, depth=2, pattern=("it",), mlp_multiple=2, mixers={"it": request.param})
    model = Model(config, generator).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


@torch.no_grad()
def hidden(model):
    return model(TOKENS)[0]


def test_its_half_lives_are_those_of_its_own_decays_on_the_text(model):
    documents = Documents(np.random.default_rng(1).integers(97, 123, (1, 200)), 256)
    plan = Plan(lengths=(128, 192), records=1, stress=0, mask="none", heads="worst1", cap_half_life=1e-3)
    rows = diagnose(Loaded(model, byte_tokenizer()), documents, plan).rows
    found = {(row["layer"], row["head"]): row for row in rows if row["kind"] == "retention"}
    assert list(found) == [tuple(head) for head in memory_heads(model)]
    for head, log_decay in zero_input(model).items():
        assert found[head]["gamma"] == pytest.approx(math.exp(log_decay))
        assert found[head]["tokens"] == 192 and found[head]["half_life_p10"] != 0
    changed = {row["change"] for row in rows if row["kind"] == "effect"}
    assert len(changed) == bool(found), "every head that forgets can be capped"


@torch.no_grad()
def test_a_cap_reaches_every_head_that_forgets(model):
    before, heads = hidden(model), memory_heads(model)
    assert can_be_capped(model) == heads
    for head in heads[:2]:
        with capped(model, [head], 1e-2):
            x = torch.randn(1, 5, 16, dtype=torch.float64)
            assert float(forgetting(model)[head.layer].log_decay(x)[:, head.head].max()) <= -math.log(2) / 1e-2
            assert (hidden(model) - before).abs().max() > 1e-9
    assert torch.equal(hidden(model), before)


@torch.no_grad()
def test_a_mask_is_of_its_channel_or_head_alone(model):
    before, mixer = hidden(model), model.blocks[1].mixer
    for name, projection in mixer.channels().items():
        last, found = mixer.heads - 1, []
        for head, kept in ((None, 0), (last, last * (projection.in_features // mixer.heads))):
            with masked(model, Part((1,), (name,), head)):
                found.append(hidden(model))
            without = torch.arange(projection.in_features) < kept
            projection.forward = lambda x, projection=projection, without=without: type(projection).forward(
                projection, x * without
            )
            torch.testing.assert_close(found[-1], hidden(model), rtol=1e-10, atol=1e-10)
            del projection.forward
        assert (found[0] - before).abs().max() > 1e-9
    assert bool(channel_masks(model)) == bool(head_masks(model)) == bool(mixer.channels())
