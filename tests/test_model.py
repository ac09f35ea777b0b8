"""The whole model: learning reaches every parameter, compilation, capacity, precision, presets."""

import dataclasses
import math

import pytest
import torch

from atma.config import PRESETS, Recipe, identity, preset
from atma.model import Model
from atma.ops import use_backend
from atma.state import tensors
from tests.conftest import tiny
from tests.ops.backends import NATIVE

VARIANTS = [(core, memory) for core in ("polar", "nope", "rope", "rope+canon") for memory in (True, False)]


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
    log_decay = memory.log_decay(torch.randn(1, 5, 16))
    half_life = torch.log(torch.tensor(0.5)) / log_decay
    torch.testing.assert_close(half_life, torch.full_like(half_life, 32.0))


def test_a_learned_bound_begins_at_the_configured_one_and_moves_by_head():
    config = dataclasses.replace(tiny(), max_half_life=32, learned_half_life=True)
    memory = Model(config).blocks[2].mixer.memory
    with torch.no_grad():
        memory.decay_proj.bias.fill_(100.0)
        x = torch.randn(1, 5, 16)
        torch.testing.assert_close(math.log(0.5) / memory.log_decay(x), torch.full((1, 2, 5), 32.0), rtol=1e-4, atol=0)
        memory.retention[1] += 3
        half_life = math.log(0.5) / memory.log_decay(x)
    assert (half_life[:, 1] > 10 * half_life[:, 0]).all()
    assert memory.bound(0) == pytest.approx(32) and memory.bound(1) == pytest.approx(
        float(half_life[0, 1, 0]), rel=1e-3
    )


@pytest.mark.parametrize("longest", [1.0, 256.0, 1e17])
def test_a_learned_bound_begins_exactly_however_long_it_is(longest: float):
    memory = Model(dataclasses.replace(tiny(), max_half_life=longest, learned_half_life=True)).blocks[2].mixer.memory
    assert memory.bound(0) == pytest.approx(longest, rel=1e-5)


def test_a_learned_bound_needs_one_to_begin_at():
    with pytest.raises(ValueError, match="finite and at least 1 for learned_half_life"):
        dataclasses.replace(tiny(), max_half_life=math.inf, learned_half_life=True)


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


def fed(calls, model, parts):
    """Hidden states and state after each call took its part, and the gradients of a sum where there are any."""
    state = model.init_state(parts[0].shape[0], 16)
    pieces = []
    for call, part in zip(calls, parts, strict=True):
        y, state = call(part, state)
        pieces.append(y)
    y, gradients = torch.cat(pieces, 1), ()
    if torch.is_grad_enabled():
        gradients = torch.autograd.grad(y.square().sum(), list(model.parameters()), allow_unused=True)
    return [y, *tensors(state), *(g for g in gradients if g is not None)]


def assert_the_same(left, right):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def nano_test(core="polar", **changes):
    core, _, canon = core.partition("+")
    changes |= {"core": core, "rope_canon": bool(canon)}
    return learned(dataclasses.replace(preset("nano-test"), depth=2, pattern=("local", "global"), **changes))


TOKENS = torch.arange(18).view(2, 9) * 7 % 23
PARTS = [7, 1, 1]


def compiles(function):
    """The mark of a test that compiles: the compiler itself warns, and remembers what it compiled before."""
    for warning in (
        "ignore::DeprecationWarning",
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
    ):
        function = pytest.mark.filterwarnings(warning)(function)
    return pytest.mark.usefixtures("_fresh_compiler")(function)


@pytest.fixture
def _fresh_compiler():
    torch.compiler.reset()


@compiles
@pytest.mark.parametrize(
    ("core", "backend", "mode", "batch"),
    [
        ("polar", "cpu", torch.no_grad, 2),
        pytest.param("rope+canon", "native", torch.inference_mode, 1, marks=NATIVE.marks),
        pytest.param("rope+canon", "cpu", torch.no_grad, 2, marks=pytest.mark.slow),
        pytest.param("polar", "native", torch.inference_mode, 1, marks=[*NATIVE.marks, pytest.mark.slow]),
        pytest.param("nope", "cpu", torch.no_grad, 2, marks=pytest.mark.slow),
        pytest.param("rope", "native", torch.inference_mode, 1, marks=[*NATIVE.marks, pytest.mark.slow]),
    ],
)
def test_prompt_and_decoding_compile_without_a_break(core, backend, mode, batch):
    model, parts = nano_test(core, window=5), TOKENS[:batch].split(PARTS, 1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with use_backend(backend), mode():
        assert_the_same(fed([compiled] * 3, model, parts), fed([model] * 3, model, parts))


@compiles
@pytest.mark.parametrize(
    ("backend", "batch"), [("cpu", 1), pytest.param("native", 2, marks=[*NATIVE.marks, pytest.mark.slow])]
)
def test_a_compiled_graph_carries_gradients_through_a_state(backend, batch):
    model, parts = nano_test(), TOKENS[:batch].split(PARTS, 1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with use_backend(backend):
        assert_the_same(fed([compiled] * 3, model, parts), fed([model] * 3, model, parts))


@compiles
@pytest.mark.parametrize(("backend", "core"), [("cpu", "polar"), pytest.param("native", "rope", marks=NATIVE.marks)])
def test_a_compiled_graph_of_training_gives_the_same_gradients(backend, core):
    model, ids = nano_test(core), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2]] * 2)
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        with use_backend(backend):
            loss = model.loss(call(TOKENS, segment_ids=ids)[0], TOKENS).mean()
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert_the_same(*gradients)


@compiles
@pytest.mark.slow
@torch.no_grad()
def test_a_step_of_decoding_compiled_to_code_gives_the_same():
    model, parts = nano_test(), TOKENS[:1].split(PARTS, 1)
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    assert_the_same(fed([model, compiled, compiled], model, parts), fed([model] * 3, model, parts))


def test_a_rope_layer_with_canon_starts_from_the_values_of_canon_and_one_without_is_as_it_was():
    plain, canon = (Model(tiny(core)).blocks[2].mixer for core in ("rope", "rope+canon"))
    assert {name for name, _ in canon.named_parameters()} - {name for name, _ in plain.named_parameters()} == {
        "canon_q",
        "canon_k",
        "canon_v",
    }
    assert torch.equal(canon.q_proj.weight.view(2, 2, 8, 16)[0, 0], canon.k_proj.weight)
    assert not torch.equal(plain.q_proj.weight.view(2, 2, 8, 16)[0, 0], plain.k_proj.weight)
    assert canon.canon_k[-1].tolist() == [0.0, 0.0, 1.0, -1.0]


def test_presets_have_the_sizes_they_promise():
    def count(name):
        with torch.device("meta"):
            return sum(p.numel() for p in Model(preset(name)).parameters())

    assert count("nano-test") <= 200_000
    assert count("nano") < 3_000_000
    assert abs(count("base-published") - 378_179_776) < 1_000_000
    assert set(PRESETS) == {"nano-test", "nano", "small", "base", "base-published"}


def test_a_model_has_the_mlp_that_its_configuration_says_or_none():
    plain, narrow, none = (tiny().changed({"mlp_width": width}) for width in (None, 9, 0))
    assert identity(Recipe(model=plain)) == identity(Recipe(model=tiny()))
    sizes = [sum(p.numel() for p in Model(config).parameters()) for config in (plain, narrow, none)]
    inner = plain.mlp_multiple * plain.width
    each = 3 * plain.width + 2
    assert sizes[0] - sizes[1] == plain.depth * each * (inner - 9)
    assert sizes[1] - sizes[2] == plain.depth * (each * 9 + 2 * plain.width)
    with torch.no_grad():
        hidden, _ = Model(none, torch.Generator().manual_seed(0))(torch.zeros(1, 3, dtype=torch.long))
    assert torch.isfinite(hidden).all()
    with pytest.raises(ValueError, match="'mlp_width' must be 0 or more"):
        tiny().changed({"mlp_width": -1})
