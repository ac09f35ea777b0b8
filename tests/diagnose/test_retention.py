"""Half-lives from parameters and on a text are those of the formulas of maths.md, section 5."""

import math

import numpy as np
import pytest
import torch

from atma.config import ModelConfig
from atma.diagnose.interventions import noted_decays
from atma.diagnose.parts import Head, forgetting
from atma.diagnose.retention import KEPT, half_life, longest_held, retention_rows, thinned, zero_input
from atma.model import Model
from tests.diagnose.conftest import made


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@torch.no_grad()
def test_zero_input_is_the_sigmoid_of_the_biases_within_the_bound(model):
    for (layer, head), log_decay in zero_input(model).items():
        memory = forgetting(model)[layer]
        gamma = sigmoid(float(memory.decay_proj.bias[head]) + 3.9)
        assert math.exp(log_decay) == pytest.approx(gamma, rel=1e-12)
        memory.max_half_life = 2.0
        assert gamma > 2**-0.5 and zero_input(model)[Head(layer, head)] == pytest.approx(-math.log(2) / 2)
        memory.max_half_life = math.inf
    assert zero_input(made("nope", False)) == {}


def test_a_learned_bound_is_a_further_factor():
    config = ModelConfig(
        23, 16, depth=1, pattern=("global",), query_heads=2, key_value_heads=1, head_width=8, max_half_life=64,
        learned_half_life=True,
    )  # fmt: skip
    [first, _] = zero_input(Model(config).double()).values()
    assert first == pytest.approx(math.log(sigmoid(3.9)) - math.log(2) / 64, rel=1e-6)


def test_half_lives_of_published_heads():
    assert half_life(-math.log(2) / 3.07e6) == pytest.approx(3.07e6)
    assert half_life(0.0) is None


def test_quantiles_are_over_the_tokens_read(model):
    tokens, notes = torch.randint(0, 257, (1, 200), generator=torch.Generator().manual_seed(2)), {}
    with torch.no_grad(), noted_decays(model, notes):
        model(tokens[:, :90], model.init_state(1, 200))
        model(tokens[:, 90:])
    [row] = [row for row in retention_rows(model, {k: thinned(x) for k, x in notes.items()}) if row["layer"] == 3][:1]
    used = np.sort(torch.cat(notes[3], 2)[0, 0].double().numpy())
    assert row["tokens"] == 200 and row["bound"] == 300
    assert row["half_life_p50"] in [pytest.approx(-math.log(2) / used[i]) for i in (99, 100)]
    values = [row[f"half_life_{name}"] for name in ("p01", "p10", "p50", "p90", "p99")]
    assert values == sorted(values) and values[0] < values[-1] <= 300 * (1 + 1e-6)


def test_a_long_text_is_sampled_at_equal_distances():
    note = torch.arange(KEPT + 10.0)[None, None]
    assert thinned([note[..., :7], note[..., 7:]])[0, :4].tolist() == [0, 2, 4, 6]
    assert thinned([note[..., :50]]).shape == (1, 50)


def retention(head, median, high, zero=None):
    return {"layer": 2, "head": head, "half_life": zero, "half_life_p50": median, "half_life_p90": high}


def test_the_heads_that_hold_longest_come_first():
    rows = [retention(0, 40, 90), retention(1, 40, 300), retention(2, 3e6, 3e6), retention(3, None, None)]
    assert longest_held(rows, 256) == [Head(2, 3), Head(2, 2), Head(2, 1)]
    assert longest_held(rows, 256, 2) == [Head(2, 3), Head(2, 2)]
    assert longest_held(rows[:1], 256) == []


def test_a_head_at_the_cap_itself_is_not_beyond_it():
    rounded = math.log(2) / float(np.float32(math.log(2) / 200))
    assert rounded > 200 and longest_held([retention(0, rounded, rounded)], 200) == []
