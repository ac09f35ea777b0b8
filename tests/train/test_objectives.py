import math

import pytest
import torch
from tiny_run import rows, tiny_model

from atma.config import ModelConfig
from atma.model import Model
from atma.train.distractor import alignment, core_calls, noise
from atma.train.objectives import discrete, regularise, residual_stream, strong, weak, zipfian

COUNT, WIDTH = 2048, 96
ALL = {"weak": weak, "strong": strong, "discrete": discrete, "zipfian": zipfian}


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def white() -> torch.Tensor:
    return torch.randn(COUNT, WIDTH, generator=seeded(1))


def collapsed() -> torch.Tensor:
    return torch.randn(COUNT, 1, generator=seeded(2)) * torch.ones(WIDTH) + 0.01 * white()


def zipf_lengths() -> torch.Tensor:
    directions = torch.nn.functional.normalize(white(), dim=-1)
    return directions / torch.arange(1, COUNT + 1)[:, None]


@pytest.mark.parametrize("name", ALL)
def test_what_a_regulariser_asks_for_costs_less_than_a_collapsed_stream(name):
    wanted = zipf_lengths() if name == "zipfian" else white()
    assert ALL[name](wanted, seeded()) < 0.5 * ALL[name](collapsed(), seeded())


@pytest.mark.parametrize("name", ALL)
def test_the_gradient_is_finite_and_not_zero_even_for_a_zero_row(name):
    samples = collapsed()
    samples[0] = 0
    samples.requires_grad_()
    ALL[name](samples, seeded()).backward()
    assert samples.grad is not None and samples.grad.isfinite().all() and samples.grad.norm() > 0


def test_weak_is_the_distance_of_the_sketched_covariance_from_the_identity():
    samples = torch.randn(50, 5, generator=seeded(), dtype=torch.float64)
    sketch = torch.randn((5, 64), generator=seeded(3), dtype=torch.float64) / math.sqrt(5)
    expected = torch.linalg.matrix_norm(torch.cov((samples @ sketch).mT) - torch.eye(64))
    torch.testing.assert_close(weak(samples, seeded(3)), expected, rtol=1e-12, atol=0)


def test_strong_is_the_17_point_trapezoid_of_the_characteristic_functions():
    samples = torch.randn(20, 5, generator=seeded(), dtype=torch.float64)
    directions = torch.randn((5, 64), generator=seeded(3), dtype=torch.float64)
    t = torch.linspace(-5, 5, 17, dtype=torch.float64)
    angle = (samples @ (directions / directions.norm(dim=0))).unsqueeze(-1) * t
    target = torch.exp(-(t**2) / 2)
    gap = (torch.complex(angle.cos(), angle.sin()).mean(0) - target).abs() ** 2
    expected = 20 * torch.trapezoid(gap * target, t).mean()
    torch.testing.assert_close(strong(samples, seeded(3)), expected, rtol=1e-12, atol=0)


def test_discrete_does_not_see_lengths():
    lengths = torch.rand(COUNT, 1, generator=seeded(5)) + 0.5
    torch.testing.assert_close(discrete(white() * lengths, seeded()), discrete(white(), seeded()), rtol=1e-4, atol=0)


def test_zipfian_counts_the_cosines_of_pairs_and_the_distance_from_zipf():
    samples = torch.randn(9, 4, generator=seeded(), dtype=torch.float64)
    unit = torch.nn.functional.normalize(samples, dim=-1)
    off = unit @ unit.mT - torch.eye(9)
    norms = samples.norm(dim=-1).sort(descending=True).values
    zipf = 1 / torch.arange(1, 10, dtype=torch.float64)
    expected = off.norm() / math.sqrt(72) + (norms / norms.sum() - zipf / zipf.sum()).norm()
    torch.testing.assert_close(zipfian(samples, seeded()), expected, rtol=1e-7, atol=0)


def test_zipfian_of_orthogonal_directions_with_zipf_lengths_is_zero():
    assert zipfian(torch.diag(1 / torch.arange(1.0, 17)), seeded()) < 1e-6


def test_listening_to_the_residual_stream_gives_each_block_and_stops_afterwards():
    model, batch = Model(tiny_model()), rows(0)
    with residual_stream(model) as stream:
        model(batch.tokens)
    assert [tuple(value.shape) for value in stream] == [(4, 16, 24)] * 4
    model(batch.tokens)
    assert len(stream) == 4


@pytest.mark.parametrize("name", ALL)
def test_a_regulariser_reaches_the_embedding_through_every_block(name):
    model = Model(tiny_model(), seeded())
    with residual_stream(model) as stream:
        model(rows(0).tokens)
    regularise(name, stream, seeded()).backward()
    assert model.embed.weight.grad is not None and model.embed.weight.grad.norm() > 0


def test_an_unknown_regulariser_names_the_known_ones():
    with pytest.raises(ValueError, match="no regulariser 'weird'; known: none, weak, strong, discrete, zipfian"):
        regularise("weird", [torch.ones(1, 1)], seeded())


def calls_of(core: str, **changes):
    model = Model(tiny_model(core=core, **changes), seeded())
    batch = rows(0)
    with core_calls(model) as calls:
        model(batch.tokens, segment_ids=batch.segment_ids)
    return model, calls


@pytest.mark.parametrize("core", ["polar", "nope", "rope"])
def test_the_distractor_term_trains_queries_but_not_the_noise_keys(core):
    model, calls = calls_of(core)
    term = alignment(calls, 16, seeded())
    assert term.isfinite() and term > 0
    term.backward()
    mixer = calls[0].mixer
    assert mixer.q_proj.weight.grad is not None and mixer.q_proj.weight.grad.norm() > 0
    assert model.embed.weight.grad is not None and model.embed.weight.grad.isfinite().all()
    if core == "polar":
        assert mixer.k_proj.weight.grad is None
        assert mixer.core.null_base.grad is not None and (mixer.core.null_base.grad < 0).all()


def test_a_higher_null_leaves_less_mass_to_random_keys():
    low, high = (alignment(calls_of("polar", null_base=base)[1], 16, seeded()) for base in (0.0, 6.0))
    assert high < 0.1 * low


@pytest.mark.parametrize(("core", "canon"), [("nope", False), ("rope", False), ("rope", True)])
def test_the_softmax_term_is_the_change_when_noise_is_put_before_the_real_keys(core, canon):
    _, calls = calls_of(core, rope_canon=canon)
    call = calls[0]
    keys, values = noise(call.mixer, 16, seeded(7))
    scale = call.mixer.core.scale
    q, k, v = (z.detach() for z in (call.q, call.k.expand_as(call.q), call.v.expand_as(call.q)))
    apart = call.segment_ids[:, None, :, None] != call.segment_ids[:, None, None, :]
    real = (q @ k.mT * scale).masked_fill(torch.ones(16, 16).triu(1).bool() | apart, -math.inf)
    both = torch.cat([q @ keys.mT * scale, real], -1).softmax(-1)
    change = both @ torch.cat([values.expand(4, -1, -1, -1), v], 2) - real.softmax(-1) @ v
    expected = change.square().mean()
    torch.testing.assert_close(alignment([call], 16, seeded(7)), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("count_limit", "sharpening"), [(None, 2.0), (3, 2.0), (3, 0.5)])
def test_the_polar_term_is_the_mass_taken_from_the_null_alone(count_limit, sharpening):
    _, calls = calls_of("polar", count_limit=count_limit, sharpening=sharpening)
    call = calls[0]
    keys, _ = noise(call.mixer, 16, seeded(7))
    core, softplus = call.mixer.core, torch.nn.functional.softplus
    visible = torch.arange(16).remainder(8) + 1.0  # documents of 8
    limited = visible.clamp(max=count_limit or math.inf)
    log_count = limited.log() + sharpening * (visible / limited).log()
    t = 1 + softplus(core.length_gain)[:, None] * log_count
    floor = core.null_base[:, None] + softplus(core.null_slope)[:, None] * (limited + 1).log().sqrt()
    scores = call.q @ keys.mT / math.sqrt(8)
    logits = t[..., None] * torch.cat([scores, floor[..., None].expand(4, -1, -1, 1)], -1)
    expected = 1 - logits.softmax(-1)[..., -1].mean()
    torch.testing.assert_close(alignment([call], 16, seeded(7)), expected, rtol=1e-4, atol=0)


def test_a_model_in_which_no_layer_attends_has_no_distractor_term():
    with core_calls(Model(ModelConfig(257, 16, depth=2, pattern=("local",)))) as calls:
        pass
    with pytest.raises(ValueError, match="'distractor_weight' needs a layer that attends, and the model has none"):
        alignment(calls, 4, seeded())
