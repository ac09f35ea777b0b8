"""Raven, against (3.6) and (3.7) token by token; its noise is of the step alone, and is not there but in training."""

import math

import pytest
import torch

from atma.config import ModelConfig
from atma.mixers import Call
from atma.mixers.raven import largest
from atma.model import Model
from atma.ops import native
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.step import Stepper
from tests.laws.conftest import randomise
from tests.test_decoding import both, started
from tests.train.tiny_run import rows, tiny_recipe

OPTIONS = {"query_heads": 2, "slots": 5, "chosen_slots": 3}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


@pytest.fixture
def raven():
    mixer = ModelConfig(16, width=8, depth=1, pattern=("raven",), **OPTIONS).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    return randomise(mixer)


def normed(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def silu(x):
    return x / (1 + torch.exp(-x))


def plain(mixer, x, noise=0.0):
    """y (T, D) of x (T, D), and N and P of every head, from the formulas alone. noise (H, T, M) is added to ρ."""
    weights, (heads, slots, width) = dict(mixer.named_parameters()), (2, 5, 4)
    outputs, kept = [], []
    scores = (x @ weights["slot_proj.weight"].T).unflatten(1, (heads, slots)).transpose(0, 1) + noise
    ranking = scores.tolist()
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        q, k, v = (silu(x @ weights[f"{name}_proj.weight"][own].T) for name in "qkv")
        q, k = normed(q, weights["q_norm.weight"]), normed(k, weights["k_norm.weight"])
        rate = torch.log1p(torch.exp(x @ weights["decay_proj.weight"][h] + weights["decay_bias"][h]))
        a = -torch.exp(weights["decay_scale"][h]) * rate
        n, p, reads = x.new_zeros(width, slots), x.new_zeros(slots, width), []
        for t in range(len(x)):
            ranked = sorted(range(slots), key=lambda m: (-ranking[h][t][m], m))[:3]
            chosen = torch.tensor([m in ranked for m in range(slots)])
            sigma = torch.where(chosen, 1 / (1 + torch.exp(-scores[h, t])), 0)
            f = a[t] * sigma / (sigma.sum() + 1e-9)
            s = 1 - torch.exp(f)
            n = n * torch.exp(f) + torch.outer(k[t], s)
            p = torch.exp(f)[:, None] * p + torch.outer(s, v[t])
            reads.append(p.T @ torch.softmax(n.T @ q[t], 0))
        outputs.append(torch.stack(reads))
        kept.append((n, p))
    y = normed(silu(torch.cat(outputs, 1)), weights["norm.weight"])
    return y @ weights["out_proj.weight"].T, kept


def test_outputs_state_and_gradients_are_those_of_the_formulas(raven):
    x = torch.randn(1, 17, 8, dtype=torch.float64, requires_grad=True)
    expected, kept = plain(raven, x[0])
    y, state = raven(x, raven.init_state(1, 17))
    torch.testing.assert_close(y[0], expected, **CLOSE)
    for h, (n, p) in enumerate(kept):
        torch.testing.assert_close(state.keys[0, h].T, n, **CLOSE)
        torch.testing.assert_close(state.values[0, h].T, p, **CLOSE)
    weights, out = [x, *raven.parameters()], torch.randn_like(expected)
    found, wanted = (torch.autograd.grad((z * out).sum(), weights) for z in (y[0], expected))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)


def test_of_equal_scores_the_first_slots_are_chosen_in_one_token_as_in_many():
    scores = torch.randint(0, 3, (2, 3, 40, 9)).double()
    together = largest(scores, 4)
    assert (together.sum(-1) == 4).all()
    assert together[0, 0, 0].nonzero()[:, 0].tolist() == sorted(
        sorted(range(9), key=lambda m: (-float(scores[0, 0, 0, m]), m))[:4]
    )
    one_by_one = torch.cat([largest(part, 4) for part in scores.split(1, 2)], 2)
    assert torch.equal(one_by_one, together)
    assert largest(scores, 9).all() and largest(scores, 20).all()


@torch.no_grad()
def test_it_starts_with_the_initial_values_of_the_specification():
    mixer = ModelConfig(16, width=512, depth=1, pattern=("raven",), query_heads=512).mixer(0)
    mixer.init_weights(torch.Generator().manual_seed(0))
    assert (mixer.config.slots, mixer.config.chosen_slots) == (64, 32)
    scale, step = mixer.decay_scale.exp(), torch.nn.functional.softplus(mixer.decay_bias)
    error = 16 / math.sqrt(12 * 512)  # of the mean of so many numbers uniform up to 16
    assert scale.min() >= 1e-4 and 15 < scale.max() <= 16 * (1 + 1e-6) and abs(scale.mean() - 8) < 5 * error
    assert 1e-3 * (1 - 1e-4) <= step.min() < 1.2e-3 and 0.08 < step.max() <= 0.1 * (1 + 1e-4)
    assert not mixer.out_proj.weight.any()
    assert all(layer.bias is None for layer in mixer.modules() if isinstance(layer, torch.nn.Linear))


def test_its_decay_is_the_mean_over_the_slots(raven):
    x = torch.randn(1, 6, 8, dtype=torch.float64)
    rate = torch.nn.functional.softplus(raven.decay_proj(x) + raven.decay_bias)
    f = (-raven.decay_scale.exp() * rate).mT[..., None] * raven.slot_weights(x)
    torch.testing.assert_close(raven.log_decay(x), f.mean(-1), rtol=1e-8, atol=0)


@pytest.mark.parametrize("wrong", [{"query_heads": 3}, {"slots": 0}, {"chosen_slots": 0}])
def test_what_does_not_fit_is_told(wrong):
    with pytest.raises(ValueError, match=f"'{next(iter(wrong))}' must be"):
        ModelConfig(16, width=8, depth=1, pattern=("raven",), **(OPTIONS | wrong)).mixer(0)


def test_noise_is_of_its_seed_and_layer_and_only_in_training(raven):
    x = torch.randn(1, 9, 8, dtype=torch.float64)
    quiet = raven(x)[0]
    assert torch.equal(raven(x, call=Call(x))[0], quiet)
    noisy = raven(x, call=Call(x, noise=5))[0]
    assert torch.equal(raven(x, call=Call(x, noise=5))[0], noisy)
    assert not torch.allclose(noisy, quiet) and not torch.allclose(raven(x, call=Call(x, noise=6))[0], noisy)
    drawn = torch.empty(1, 2, 9, 5, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(noisy[0], plain(raven, x[0], -drawn[0].log())[0], **CLOSE)
    raven.layer = 1
    assert torch.equal(raven(x, call=Call(x, noise=4))[0], noisy)
    assert torch.equal(raven.eval()(x, call=Call(x, noise=5))[0], quiet)


def test_a_training_step_draws_from_its_seed_and_number_alone():
    """So a resumed run makes the same steps; the tests of resuming hold for what is drawn so."""
    model = ModelConfig(32, width=8, depth=1, pattern=("raven",), mlp_multiple=1, **OPTIONS)
    batch = rows(0)

    def loss(seed: int, step: int, before: int = 0) -> float:
        made = randomise(Model(model, torch.Generator().manual_seed(0))).float()
        recipe = tiny_recipe(model, seed=seed)
        stepper = Stepper(made, Optimisers(made, recipe.train), recipe.train, torch.float32, Ranks())
        for earlier in range(before):
            stepper(earlier, batch, 0.0)
        return stepper(step, batch, 0.0).loss

    assert loss(0, 3) == loss(0, 3) == loss(0, 3, before=2)
    assert loss(0, 3) != loss(0, 4) and loss(0, 3) != loss(1, 3)


@pytest.mark.skipif(not native.available(), reason="the compiled kernels are not available here")
def test_decoding_steps_are_recorded_and_are_the_model_s():
    model = randomise(Model(ModelConfig(23, width=16, depth=2, pattern=("raven",), mlp_multiple=1, **OPTIONS)))
    for decoder, found, expected, _ in both(model, started(model)):
        assert decoder.how.startswith("recorded"), decoder.how
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
