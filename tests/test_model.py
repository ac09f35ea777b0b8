"""The whole model: learning reaches every parameter, compilation, capacity, precision, presets."""

import dataclasses

import pytest
import torch

from atma.config import PRESETS, preset
from atma.model import Model
from tests.conftest import tiny

VARIANTS = [(core, memory) for core in ("polar", "nope", "rope") for memory in (True, False)]


def step(model, tokens, rate=0.1):
    hidden, _ = model(tokens[:, :-1])
    model.loss(hidden, tokens[:, 1:]).mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad.sign()
                parameter.grad = None
    return gradients


@pytest.mark.parametrize(("core", "memory"), VARIANTS)
def test_after_three_steps_every_parameter_has_had_a_gradient(core, memory):
    """Zero at both ends of a branch opens in turn: the head on the first step, output projections, then the inputs."""
    model = Model(tiny(core, memory), torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 23, (4, 40), generator=torch.Generator().manual_seed(1))
    alive = set()
    for _ in range(3):
        alive |= {name for name, gradient in step(model, tokens).items() if gradient.any()}
    assert {name for name, _ in model.named_parameters()} - alive == set()


def test_zeroed_input_projections_never_learn():
    """The published training script's initialisation, kept as an option to measure what it costs."""
    config = dataclasses.replace(tiny(), zero_input_projections=True)
    model = Model(config, torch.Generator().manual_seed(0))
    tokens = torch.randint(0, 23, (4, 40), generator=torch.Generator().manual_seed(1))
    for _ in range(4):
        gradients = step(model, tokens)
    assert not gradients["blocks.0.mixer.in_proj.weight"].any()
    assert gradients["blocks.0.mlp.in_proj.weight"].any()


def test_retention_is_bounded_by_the_configuration():
    config = dataclasses.replace(tiny(), max_half_life=32)
    memory = Model(config).blocks[2].mixer.memory
    with torch.no_grad():
        memory.decay_proj.bias.fill_(100.0)
    log_decay, _ = memory.gates(torch.randn(1, 5, 16))
    half_life = torch.log(torch.tensor(0.5)) / log_decay
    torch.testing.assert_close(half_life, torch.full_like(half_life, 32.0))


def test_tokens_beyond_the_capacity_are_refused():
    model = Model(tiny())
    _, state = model(torch.zeros(1, 6, dtype=torch.long), model.init_state(1, 8))
    with pytest.raises(ValueError, match="3 tokens after 6 pass the state's capacity of 8"):
        model(torch.zeros(1, 3, dtype=torch.long), state)


@pytest.mark.parametrize("shape", [(1, 0), (5,)])
def test_no_tokens_are_refused(shape):
    with pytest.raises(ValueError, match="tokens must be"):
        Model(tiny())(torch.zeros(shape, dtype=torch.long))


def test_a_state_and_packed_documents_exclude_each_other():
    model, tokens = Model(tiny()), torch.zeros(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="segment_ids"):
        model(tokens, model.init_state(1, 8), segment_ids=torch.zeros(1, 4, dtype=torch.int32))


def learned(config):
    """A model whose every parameter is away from its initial value: zero output projections would hide the mixers."""
    model, generator = Model(config, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def test_autocast_is_within_twice_the_error_of_a_model_wholly_in_bfloat16():
    model = learned(tiny())
    tokens = torch.randint(0, 23, (2, 70), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        exact = model(tokens)[0]
        with torch.autocast("cpu", torch.bfloat16):
            low = model(tokens)[0]
        plain = model.bfloat16()(tokens)[0]
    error = (low.float() - exact).abs().max()
    assert 0 < error <= 2 * (plain.float() - exact).abs().max()


@pytest.mark.parametrize("core", ["polar", "rope"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_whole_model_compiles_without_a_break(core):
    model, tokens = learned(tiny(core)), torch.arange(60).view(2, 30) % 23
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens)[0], model(tokens)[0])


def test_presets_have_the_sizes_they_promise():
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in Model(preset(name)).parameters())

    assert count("nano-test") <= 200_000
    assert count("nano") < 3_000_000
    assert abs(count("base-published") - 378_179_776) < 1_000_000
    assert set(PRESETS) == {"nano-test", "nano", "small", "base", "base-published"}
