"""Neural memories as mixers: sizes and refusals, what each starts from, its gates, and what it is a case of."""

import math
import tomllib
from types import SimpleNamespace

import pytest
import torch

from atma.config import ModelConfig, Recipe, dump_toml, recipe_of
from atma.decoding import RECORDED
from atma.mixers import MEMORIES, MIXERS, Place, find, small
from atma.mixers.linear_recurrence import LinearRecurrence
from atma.mixers.neural_channel import NeuralChannel
from atma.mixers.neural_config import NeuralConfig, stable
from atma.mixers.neural_memory import NeuralMemory
from atma.mixers.neural_systems import SYSTEMS
from atma.mixers.recurrent_systems import RecurrenceConfig
from atma.model import Model
from atma.ops import native
from atma.ops.fast_weights import Kernel
from atma.serve.exact import Served
from atma.train.optim import parameter_groups
from tests.harness.greedy import outputs
from tests.laws.conftest import randomise
from tests.test_recurrent_systems import decoded

NAMES = [name for name, (place, _) in MIXERS.items() if place.startswith("neural_memory")]
MEMORY_NAMES = [name for name, (place, _) in MEMORIES.items() if place.startswith("neural_channel")]
NETWORKS = [name for name in NAMES if SYSTEMS[name].network != "kernel"]
EXACT = {"rtol": 1e-10, "atol": 1e-10}
AT_16 = Place(16, 1e-6)
TINY = {"core": "nope", "query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory_chunk": 4}


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(name, random=False, width=16, **options) -> NeuralMemory:
    """A mixer in float64, as it starts or with every parameter random."""
    mixer = NeuralMemory(NeuralConfig(name, **{"query_heads": 2} | options), Place(width, 1e-6))
    mixer.init_weights(torch.Generator().manual_seed(1))
    return randomise(mixer) if random else mixer.double()


def shapes(mixer):
    return [tuple(w.shape) for w in mixer.memory.initial()]


# Sizes


def test_every_system_has_a_line_and_those_with_fast_weights_are_third_channels():
    assert list(SYSTEMS) == NAMES and MEMORY_NAMES == NETWORKS


@pytest.mark.parametrize(
    ("name", "chunk", "window", "expected"),
    [
        ("atma_memory", 16, 1, [(8, 128, 512), (8, 512, 128)]),
        ("titans", 64, 1, [(8, 128, 512), (8, 512, 128)]),
        ("ttt_linear", 16, 1, [(8, 128, 128)]),
        ("swla", 64, 16, [(8, 128, 153)]),
        ("atlas", 64, 16, [(8, 128, 512), (8, 512, 153)]),
        ("atlas_pp", 64, 16, [(8, 128, 512), (8, 512, 153), (8, 512, 153)]),
        ("lact", 256, 1, [(8, 128, 512), (8, 512, 128), (8, 512, 128)]),
    ],
)
def test_widths_chunks_and_windows_are_those_of_the_table(name, chunk, window, expected):
    with torch.device("meta"):
        mixer = NeuralMemory(NeuralConfig(name), Place(1024, 1e-6))
    assert shapes(mixer) == expected
    assert (mixer.config.memory_chunk, mixer.config.memory_window) == (chunk, window)


def test_keys_wider_than_values_after_the_feature_map_reach_the_output_by_a_matrix():
    lifted, plain, bare = made("dla", key_width=3), made("titans"), made("swla", key_width=3)
    assert lifted.memory.skip.shape == (2, 8, 10)
    gram = lifted.memory.skip @ lifted.memory.skip.mT
    torch.testing.assert_close(gram, torch.eye(8).double().expand(2, 8, 8), rtol=0, atol=1e-6)
    assert plain.memory.skip is None and plain.memory.rule.residual == "identity"
    assert bare.memory.skip is None and bare.memory.rule.residual == "none"


# What is refused


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"system": "titan"}, "'system' must be one of .* did you mean 'titans'"),
        ({"system": "titans", "memory_chunk": 0}, "'memory_chunk' must be at least 1, not 0"),
        ({"system": "titans", "max_half_life": 0.0}, "'max_half_life' must be positive"),
        ({"system": "titans", "step_most": -1.0}, "'step_most' must be positive and finite, not -1.0"),
        ({"system": "yaad", "memory_window": 3}, "'memory_window' must be 1 for bias = 'huber'"),
        ({"system": "memora", "gate_axis": "channel"}, '\'gate_axis\' must be "head" for retention = "kl"'),
        ({"system": "moneta", "loss_power": 0.5}, "'loss_power' must be at least 1 and finite, not 0.5"),
        ({"system": "dla", "gate_axis": "channel"}, '\'feature\' must be "unit" for gate_axis = "channel"'),
        ({"system": "ttt_mlp", "forgets": True}, "'forgets' must be false for average = true"),
        ({"system": "titans", "step_form": "softplus"}, "'step_form' must be \"bounded\" without renormalised"),
        ({"system": "lact", "step_most": 0.5}, "'step_most' must be left out for step_form = \"softplus\""),
        ({"system": "lact", "max_half_life": 64.0}, "'max_half_life' must be left out where nothing is forgotten"),
        ({"system": "titans", "normalise": True}, "'normalise' must be False without network = \"kernel\""),
        ({"system": "dot", "optimiser": "muon"}, "'optimiser' must be 'gd' for network = \"kernel\""),
        ({"system": "dot", "feature": "poly"}, '\'feature\' must be "unit" for network = "kernel"'),
        ({"system": "dot", "hidden_width": 8}, "'hidden_width' must be left out for network = \"kernel\""),
        ({"system": "swla", "hidden_width": 8}, "'hidden_width' must be left out for network = \"matrix\""),
    ],
)
def test_options_that_make_no_memory_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        NeuralConfig(**options)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"system": "titans"}, 0.25),
        ({"system": "titans", "memory_chunk": 16}, 0.5),
        ({"system": "atma_memory"}, 1.0),
        ({"system": "atma_memory", "network": "matrix"}, 2.0),
        ({"system": "titans", "network": "matrix"}, 2 / 64),
        ({"system": "omeganet"}, 0.125),
    ],
)
def test_steps_that_diverge_are_refused_with_their_bound(options, most):
    assert NeuralConfig(**options).most <= most
    NeuralConfig(**options, step_most=most)
    with pytest.raises(ValueError, match=rf"'step_most' must be at most {most:g} for .*diverges"):
        NeuralConfig(**options, step_most=1.01 * most)


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{}, {"anchor": "hidden"}, {"memory_window": 3}, {"memory_window": 3, "anchor": "hidden"}],
    ids=["all", "hidden", "window", "window, hidden"],
)
def test_the_bound_of_a_matrix_is_where_repeated_keys_begin_to_diverge(options):
    plain = {"optimiser": "gd", "memory_chunk": 4, "forgets": False, "residual": False, "conv": "none"}
    plain["network"] = "matrix"
    mixer = made("titans", heads=1, **plain | options)
    mixer.q_proj.weight.copy_(mixer.k_proj.weight)
    torch.nn.init.zeros_(mixer.memory.gates.step.proj.weight)
    torch.nn.init.constant_(mixer.memory.gates.step.proj.bias, 40.0)  # θ = θ_max
    if mixer.memory.gates.omega is not None:  # open, so that Σ ω = c
        torch.nn.init.zeros_(mixer.memory.gates.omega.proj.weight)
        torch.nn.init.constant_(mixer.memory.gates.omega.proj.bias, 40.0)
    x = inputs(1, 1, 16).expand(1, 240, 16)
    (q, k, v), _ = mixer._project(x, None, None)

    def error(part):
        """Of what is read after 60 chunks of one key and value, θ being a part of the bound."""
        mixer.memory.gates.most = part * stable(mixer.config)
        read, _ = mixer.memory(x, (q, k, v), None, None, None)
        return float((read - v / 4)[0, 0, -1].norm())

    assert error(0.9) < 1e-3 and error(1.1) > 10


@torch.no_grad()
@pytest.mark.parametrize("options", [{"system": "omeganet"}, {"system": "yaad", "bias": "l2", "memory_window": 4}])
def test_the_tokens_of_an_open_window_share_one_step(options):
    mixer = made(options["system"], **{key: value for key, value in options.items() if key != "system"})
    gates, x = mixer.memory.gates, inputs(2, 5, 16)
    for gate in (gates.omega, gates.step):
        torch.nn.init.constant_(gate.proj.bias, 40.0)
    found = gates(x, mixer.memory.log_keep(x))
    window = mixer.config.memory_window
    torch.testing.assert_close(found.omega, torch.ones_like(found.omega), **EXACT)
    torch.testing.assert_close(found.step, torch.full_like(found.step, mixer.config.most / window), **EXACT)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"system": "titans", "query_heads": 3}, "'query_heads' = 3 must divide 16"),
        ({"system": "titans", "heads": 3}, "'heads' = 3 must divide 16.*set heads, key_width and value_width"),
        ({"system": "titans", "heads": 3, "key_width": 4, "value_width": 4}, None),
        ({"system": "dla", "key_width": 64}, "at most 16 .* 64 of degree 2 make 2,145 features, not 64"),
        ({"system": "yaad", "key_width": 4}, "'key_width' must be the value_width 2 for gate_axis"),
    ],
)
def test_sizes_that_do_not_fit_are_told_with_the_mend(options, told):
    if told is None:
        NeuralMemory(NeuralConfig(**options), AT_16)
        return
    with pytest.raises(ValueError, match=told):
        NeuralMemory(NeuralConfig(**options), AT_16)


# What each starts from


@pytest.mark.parametrize("name", NAMES)
def test_at_the_start_a_mixer_adds_nothing_and_a_seed_is_all_it_depends_on(name):
    (options,) = small(name)
    one, other = (made(**{"name" if key == "system" else key: value for key, value in options.items()}) for _ in "ab")
    assert not one(inputs(2, 9, 16))[0].any()
    for key, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]) and torch.isfinite(value).all()


@torch.no_grad()
@pytest.mark.parametrize("name", NETWORKS)
def test_fast_weights_start_as_the_table_of_deviations_says(name):
    mixer = made(name, width=128)
    first, *others = mixer.memory.initial()
    rows, columns = {"memora": (1, 1)}.get(name, (first.shape[-1] ** -0.5, (others or [first])[0].shape[-1] ** -0.5))
    wanted = {"ttt_linear": 0.02, "swla": 0.0}.get(name, rows)
    assert float(first.std()) == pytest.approx(wanted, rel=0.05) and float(first.mean().abs()) <= 0.05 * wanted
    assert all(float(w.std()) == pytest.approx(columns, rel=0.05) for w in others)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "theta"),
    [
        ("atma_memory", 0.25),
        ("titans", 0.25 / 4),
        ("ttt_linear", 0.5 / 8),
        ("ttt_mlp", 0.05 / 8),
        ("moneta", 1 / 64),
        ("yaad", 0.25),
        ("memora", 1.0),
        ("atlas", 0.015),
        ("lact", 1e-3),
        ("allmem", 1e-3),
    ],
)
def test_gates_start_where_the_specification_has_them(name, theta):
    mixer = made(name)
    gates = mixer.memory.gates(torch.zeros(2, 5, 16).double(), mixer.memory.log_keep(torch.zeros(2, 5, 16).double()))
    tail = {"channel": (8,), "matrix": (3,)}.get(SYSTEMS[name].gate_axis, ())
    assert gates.step.shape == (2, 2, 5, *tail)
    torch.testing.assert_close(gates.step, torch.full_like(gates.step, theta), **EXACT)
    if SYSTEMS[name].forgets:
        assert float(gates.keep.min()) == pytest.approx(1 / (1 + math.exp(-3.9)))
    else:
        assert gates.keep is None
    assert gates.momentum is None or bool((gates.momentum == 0.5).all())
    if name == "yaad":
        torch.testing.assert_close(gates.delta, torch.full((2, 2, 5), math.sqrt(8)).double(), rtol=1e-6, atol=0)
    if gates.omega is not None:
        torch.testing.assert_close(gates.omega, torch.full((2, 2, 5, 16), 1 / 16).double(), rtol=1e-6, atol=0)


@torch.no_grad()
def test_a_kernel_starts_as_sharp_as_softmax_and_writes_half_or_one_part_of_each():
    x = torch.zeros(1, 3, 16).double()
    one, many = made("dot"), made("swdt", memory_window=4)
    assert isinstance(one.memory.memory(), Kernel)
    assert one.memory.memory().sharpness.tolist() == pytest.approx([math.sqrt(8)] * 2)
    assert bool((one.memory.omega(x) == 0.5).all())
    torch.testing.assert_close(many.memory.omega(x), torch.full((1, 2, 3, 4), 0.25).double(), rtol=1e-6, atol=0)


def test_everything_learned_learns_and_what_is_written_to_is_kept_from_muon():
    for name in (*NAMES, "memory_beside_window", "mag", "mac"):
        model = Model(ModelConfig(23, width=16, depth=2, pattern=(name,), **small(name)[0])).double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * inputs(*parameter.shape))
        tokens = torch.randint(0, 23, (2, 9), generator=torch.Generator().manual_seed(0))
        model.loss(model(tokens)[0], tokens.roll(-1, 1)).mean().backward()
        silent = {key for key, value in model.named_parameters() if value.grad is None or not value.grad.any()}
        assert silent == set(), name
        matrices = {key.rpartition(".")[2] for key in parameter_groups(model)["matrix"]}
        assert not {"initial_1", "initial_2", "initial_3", "gain", "shift", "taps"} & matrices


# What it is a case of


@torch.no_grad()
def test_a_matrix_with_a_hidden_anchor_is_the_gated_delta_rule_on_the_same_projections():
    options = {"query_heads": 2, "memory_chunk": 5}
    mixer = made("atma_memory", True, network="matrix", residual=False, decay_to="zero", **options)
    delta = LinearRecurrence(RecurrenceConfig("delta_memory", query_heads=2), AT_16).double()
    mixer.memory.initial_1.zero_()
    for name in ("q_proj", "k_proj", "v_proj", "conv", "readout"):
        getattr(delta, name).load_state_dict(getattr(mixer, name).state_dict())
    delta.v_proj.weight.mul_(8**-0.5)  # values of unit length; the convolution is linear
    delta.gates.decay.proj.load_state_dict(mixer.memory.gates.keep.proj.state_dict())
    delta.gates.beta_proj.load_state_dict(mixer.memory.gates.step.proj.state_dict())
    x = inputs(2, 40, 16)
    torch.testing.assert_close(mixer(x)[0], delta(x)[0], **EXACT)


@torch.no_grad()
def test_a_memory_alone_is_the_third_channel_on_the_same_queries_keys_and_values():
    heads = SimpleNamespace(place=AT_16, heads=2, groups=2, head_width=8, window=None)
    for name in ("atma_memory", "moneta", "lact"):
        mixer = made(name, memory_chunk=4)
        torch.nn.init.normal_(mixer.readout.out_proj.weight)
        memory = NeuralChannel(NeuralChannel.Config(name, memory_chunk=4), heads).double()
        memory.memory.load_state_dict(mixer.memory.state_dict())
        memory.readout.load_state_dict(mixer.readout.state_dict())
        x = inputs(2, 20, 16)
        qkv, _ = mixer._project(x, None, None)
        torch.testing.assert_close(memory(x, *qkv, None)[0], mixer(x)[0], **EXACT)


# Half-lives, and use in a global mixer


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if SYSTEMS[name].forgets])
def test_no_half_life_is_longer_than_its_bound(name):
    (options,) = small(name)
    free, bounded = (NeuralMemory(NeuralConfig(**options, max_half_life=most), AT_16) for most in (math.inf, 4.0))
    free.init_weights(None)
    bounded.load_state_dict(randomise(free).state_dict())
    x = 30 * inputs(2, 6, 16)
    own, found = free.memory.log_keep(x), bounded.double().memory.log_keep(x)
    torch.testing.assert_close(found, own.clamp(max=-math.log(2) / 4), rtol=0, atol=0)
    assert not torch.equal(found, own) and (bounded.bound(0), free.bound(0)) == (4.0, math.inf)
    assert free.log_decay(x).shape == (2, 2, 6) and free.retention() is free


def test_a_presets_bound_reaches_a_third_channel_and_no_published_memory_alone():
    recipe = recipe_of({"model": {"preset": "nano", "memory": "titans"}, "train": {"length": 512}})
    assert recipe.model.mixer(2).memory.bound(0) == 512
    recipe = recipe_of({"model": {"preset": "nano", "pattern": ["atma", "titans"]}, "train": {"length": 512}})
    assert recipe.model.named()["titans"].options["max_half_life"] == math.inf


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_a_start_at_recall_keys_each_token_by_what_a_query_was_before_it(name):
    options = small(name)[0] | {"conv": "canon", "start": "recall"}
    mixer = Model(ModelConfig(23, width=16, depth=1, pattern=(name,), **options)).blocks[0].mixer
    x = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    (q, k, _), _ = mixer._project(x, None, None)
    assert q.abs().mean() > 0.01
    torch.testing.assert_close(q[:, :, :-1], k[:, :, 1:])
    if mixer.config.forgets:
        assert -math.log(2) / mixer.log_decay(torch.zeros_like(x)).min() > 500
    assert not mixer(x)[0].any()


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORY_NAMES)
def test_a_third_channel_starts_as_nothing_and_obeys_the_laws_of_what_it_is_in(name):
    torch.manual_seed(0)
    config = ModelConfig(23, width=16, depth=1, pattern=("global",), memory=name, **TINY)
    shared = {key: value for key, value in TINY.items() if key != "memory_chunk"}
    plain = Model(ModelConfig(23, width=16, depth=1, pattern=("global",), memory=False, **shared))
    model = Model(config)
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(0, 23, (1, 22), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    model = randomise(model)
    model.blocks[0].mixer.memory.memory.gates.step.proj.bias.sub_(3)  # such wide W⁰ diverge at the full step
    whole, _ = model(tokens)
    state, pieces = model.init_state(1, 22), []
    for part in tokens.split([1, 14, 7], 1):
        y, state = model(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    packed, _ = model(tokens, segment_ids=torch.tensor([[0] * 9 + [1] * 13]))
    alone = torch.cat([model(part)[0] for part in tokens.split([9, 13], 1)], 1)
    torch.testing.assert_close(packed, alone, **EXACT)
    mixer = model.blocks[0].mixer
    assert "memory" in mixer.channels() and (mixer.retention() is not None) == SYSTEMS[name].forgets


@torch.no_grad()
def test_a_memory_before_windowed_attention_is_a_pattern_whose_window_is_the_attentions_alone():
    torch.manual_seed(0)
    options = {"query_heads": 2, "key_value_heads": 1, "head_width": 8, "memory_chunk": 4}
    model = randomise(Model(ModelConfig(23, width=16, depth=2, pattern=("yaad", "nope"), window=5, **options)))
    assert (model.blocks[0].mixer.config.memory_window, model.blocks[1].mixer.config.window) == (1, 5)
    tokens = torch.randint(0, 23, (1, 22), generator=torch.Generator().manual_seed(0))
    first, state = model(tokens[:, :9], model.init_state(1, 22))
    rest, _ = model(tokens[:, 9:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), model(tokens)[0], **EXACT)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_across_a_boundary_is_recorded(name):
    assert decoded((name,), small(name)[0]).startswith(RECORDED)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_memories_are_served_with_the_same_bits_whatever_is_beside_a_text_and_however_it_is_cut(name):
    model = Model(ModelConfig(23, width=16, depth=2, pattern=(name,), **small(name)[0]))
    served = Served(randomise(model).float().eval())
    assert served.exact
    tokens = torch.randint(0, 23, (3, 14), generator=torch.Generator().manual_seed(0))
    together, _ = served(tokens, model.init_state(3, 14))
    first, state = served(tokens[1:2, :7], model.init_state(1, 14))
    rest, _ = served(tokens[1:2, 7:], state)
    assert torch.equal(torch.cat([first, rest], 1), together[1:2])
    torch.testing.assert_close(together, model(tokens)[0], rtol=1e-2, atol=1e-3)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", ["deep_transformer", "dot", pytest.param("swdt", marks=pytest.mark.slow)])
def test_a_memory_of_every_key_is_served_from_pages_with_the_same_bits_beside_any_other_text(name):
    model = randomise(Model(ModelConfig(257, width=16, depth=2, pattern=(name,), **small(name)[0]))).float()
    assert Served(model.eval()).exact
    prompts = [(torch.arange(length) * 7 % 257).tolist() for length in (9, 3, 14)]
    together = outputs(model, prompts, 3)
    for prompt, output in zip(prompts, together, strict=True):
        alone = outputs(model, [prompt], 3)[0]
        assert (alone.tokens, alone.logprobs) == (output.tokens, output.logprobs)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize(
    "name",
    [
        "atma_memory",
        "titans",
        "lact",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("omeganet", "poly_delta")),
    ],
)
def test_a_third_channel_is_served_with_the_same_bits_beside_any_other_text(name):
    options = {key: value for key, value in TINY.items() if key != "memory_chunk" or name != "poly_delta"}
    model = randomise(Model(ModelConfig(257, width=16, depth=1, pattern=("global",), memory=name, **options))).float()
    assert Served(model.eval()).exact
    prompts = [(torch.arange(length) * 7 % 257).tolist() for length in (9, 3, 14)]
    together = outputs(model, prompts, 3)
    for prompt, output in zip(prompts, together, strict=True):
        alone = outputs(model, [prompt], 3)[0]
        assert (alone.tokens, alone.logprobs) == (output.tokens, output.logprobs)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", MEMORY_NAMES)
def test_a_step_of_a_third_channel_is_recorded(name):
    assert decoded(("global",), {"memory": name, **TINY}).startswith(RECORDED)


def test_a_kernel_is_no_third_channel():
    with pytest.raises(ValueError, match="no memory 'swdt'"):
        find("swdt", "memory")
    with pytest.raises(ValueError, match="'system' must be one with fast weights in a global mixer, not 'dot'"):
        NeuralChannel.Config("dot")


@pytest.mark.parametrize("name", [*SYSTEMS, "mac", "mag", "memory_beside_window"])
def test_a_configuration_is_read_as_it_was_written(name):
    config = ModelConfig(23, width=16, depth=1, pattern=(name,), **small(name)[0])
    assert recipe_of(tomllib.loads(dump_toml(Recipe(model=config)))).model == config
