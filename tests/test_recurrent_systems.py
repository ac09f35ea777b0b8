"""Options, bounds and shared tables of linear recurrences, and their use: diagnosis, decoding, global mixers."""

import math

import pytest
import torch

from atma.checkpoint import load_model, save_model
from atma.config import ModelConfig, TrainConfig, recipe_of
from atma.decoding import RECORDED, Decoder
from atma.diagnose.interventions import capped
from atma.diagnose.parts import Head, memory_of
from atma.mixers import MEMORIES, Place, small
from atma.mixers.linear_recurrence import LinearRecurrence
from atma.mixers.recurrent_systems import SYSTEMS, RecurrenceConfig, sizes
from atma.model import Model
from atma.ops import native
from atma.serve.exact import Served
from atma.train.optim import Optimisers
from tests.laws.conftest import randomise
from tests.test_linear_recurrence import EXACT, NAMES, inputs, made

MEMORY_NAMES = [name for name, (place, _) in MEMORIES.items() if place.startswith("recurrent_memory")]


# Sizes, and what is refused


@pytest.mark.parametrize(
    ("name", "width", "expected"),
    [
        ("linear", 1024, (8, 128, 128)),
        ("based", 1024, (8, 16, 128)),
        ("hedgehog", 1024, (8, 128, 128)),
        ("lightning", 1024, (8, 128, 128)),
        ("retnet", 1024, (8, 128, 256)),
        ("gla", 1024, (4, 128, 256)),
        ("hgrn2", 1024, (8, 128, 128)),
        ("mamba2", 1024, (32, 128, 64)),
        ("deltanet", 1024, (4, 256, 256)),
        ("gated_deltanet", 1024, (3, 256, 512)),
        ("gated_deltanet", 128, (1, 256, 512)),
        ("kda", 1024, (8, 128, 128)),
        ("delta_memory", 1024, (8, 128, 128)),
    ],
)
def test_heads_and_widths_are_those_of_the_papers(name, width, expected):
    assert sizes(RecurrenceConfig(name), Place(width, 1e-6))[1:] == expected


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"system": "linear", "feature": "unit"}, "'normaliser' must be false for feature = 'unit'"),
        ({"system": "gla", "normaliser": True}, "'normaliser' must be false for feature = 'identity'"),
        ({"system": "kda", "normaliser": True, "feature": "elu1"}, "'normaliser' must be false for rule = \"delta\""),
        ({"system": "gla", "rule": "delta"}, "'feature' must be one of unit, poly"),
        ({"system": "gla", "write": "step"}, "'write' must be another for a decay without"),
        ({"system": "mamba2", "rule": "delta", "feature": "unit"}, "'write' must be \"sigmoid\""),
        ({"system": "gla", "negative": True}, "'negative' must be false"),
        ({"system": "hgrn2", "feature": "unit"}, "'feature' must be \"identity\" for decay"),
        ({"system": "gla", "conv": "wide"}, "'conv' must be one of canon, silu, none"),
        ({"system": "gla", "max_half_life": 0.0}, "'max_half_life' must be positive"),
        ({"system": "gla", "heads": 0}, "'heads' must be at least 1"),
        (
            {"system": "gla", "feature": "taylor"},
            "'feature' must be one of identity, unit, elu1 for decay = 'low_rank'",
        ),
        ({"system": "based", "decay": "channel_step"}, "'feature' must be one of identity, unit, elu1 for decay"),
        ({"system": "retnet", "decay": "floor"}, "'decay' must be another for retnet"),
        ({"system": "gla", "start": "recall"}, "'start' must be \"published\" without a convolution of keys"),
        ({"system": "hgrn2", "start": "recall", "conv": "silu"}, "'start' must be \"published\" without"),
    ],
)
def test_options_that_make_no_recurrence_are_refused(options, told):
    with pytest.raises(ValueError, match=told):
        RecurrenceConfig(**options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"system": "linear", "query_heads": 3}, "'query_heads' = 3 must divide 16"),
        ({"system": "gla"}, None),
        ({"system": "gla", "heads": 3}, "'heads' = 3 must divide 16"),
        ({"system": "hgrn2"}, "'key_width' = 128 must divide 16.* set heads, key_width and value_width"),
        ({"system": "mamba2"}, "'value_width' = 64 must divide 32"),
        ({"system": "retnet", "heads": 16}, "'key_width' must be even for rotary positions, not 1"),
        ({"system": "based", "query_heads": 1, "key_width": 17}, "'key_width' must be at most 16"),
        ({"system": "based", "heads": 3, "value_width": 8}, None),
        ({"system": "retnet", "heads": 3, "key_width": 8}, None),
    ],
)
def test_what_must_divide_the_width_and_does_not_is_told_with_the_mend(options, told):
    if told is None:
        LinearRecurrence(RecurrenceConfig(**options), Place(16, 1e-6))
        return
    with pytest.raises(ValueError, match=told):
        LinearRecurrence(RecurrenceConfig(**options), Place(16, 1e-6))


def test_a_query_without_weight_on_any_key_is_refused():
    mixer = made("linear")
    with torch.no_grad():
        mixer.q_proj.weight.copy_(-1e6 * torch.ones(16, 16))
    with pytest.raises(ValueError, match="features are all zero"):
        mixer(torch.ones(1, 3, 16, dtype=torch.float64))


# The bound of half-lives


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in NAMES if SYSTEMS[name].decay not in ("none", "lightning", "retnet")])
def test_no_learned_decay_is_slower_than_its_bound(name):
    x = 30 * inputs(2, 6, 16)
    table = {key: value for key, value in small(name)[0].items() if key != "system"} | {"kind": name}
    free, bounded = (
        ModelConfig(16, width=16, depth=2, pattern=("a",), mixers={"a": table | {"max_half_life": most}}).mixer(1)
        for most in (math.inf, 4.0)
    )
    free.init_weights(None)
    bounded.load_state_dict(randomise(free).state_dict())
    bounded.double()
    own, found = free.gates(x)[0], bounded.gates(x)[0]
    torch.testing.assert_close(found, own.clamp(max=-math.log(2) / 4), rtol=0, atol=0)
    assert not torch.equal(found, own) and (bounded.bound(0), free.bound(0)) == (4.0, math.inf)


@torch.no_grad()
@pytest.mark.parametrize("name", ["lightning", "retnet"])
def test_a_fixed_decay_tells_its_half_life(name):
    mixer = made(name, 1, 4)
    for head, rate in enumerate(mixer.log_decay(inputs(1, 1, 16))[0, :, 0]):
        assert mixer.bound(head) == pytest.approx(-math.log(2) / float(rate))


def test_a_presets_bound_is_never_that_of_another_system():
    recipe = recipe_of({"model": {"preset": "nano", "pattern": ["atma", "gla"]}, "train": {"length": 512}})
    named = recipe.model.named()
    assert named["atma"].options["max_half_life"] == 512 and named["gla"].options["max_half_life"] == math.inf
    table = {"gla": {"kind": "gla", "max_half_life": 64}}
    recipe = recipe_of({"model": {"preset": "nano", "pattern": ["atma", "gla"], "mixers": table}})
    assert recipe.model.named()["gla"].options["max_half_life"] == 64
    assert ModelConfig.from_table(recipe.model.to_table()) == recipe.model
    with pytest.raises(ValueError, match=r"'max_half_life' is not shared: set mixers\.NAME\.max_half_life"):
        ModelConfig(pattern=("gla",), max_half_life=64)


# Initial values


@torch.no_grad()
@pytest.mark.parametrize("conv", ["canon", "silu"])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "hgrn2"])
def test_a_start_at_recall_keys_each_token_by_what_a_query_was_before_it(name, conv):
    options = {key: value for key, value in small(name)[0].items() if key != "system"}
    config = RecurrenceConfig(name, **options | {"conv": conv, "start": "recall"})
    mixer = LinearRecurrence(config, Place(16, 1e-6)).double()
    mixer.init_weights(torch.Generator().manual_seed(0))
    x = inputs(2, 9, 16)
    (q, k, _), _ = mixer._project(x, None, None)
    assert q.abs().mean() > 0.01
    torch.testing.assert_close(q[:, :, :-1], k[:, :, 1:], rtol=1e-12, atol=1e-12)
    still = mixer.gates(torch.zeros_like(x))[0]
    if mixer.gates.decay is not None and mixer.gates.decay.learned:
        assert -math.log(2) / still.min() > 6.5
    torch.testing.assert_close(mixer(x)[0], torch.zeros_like(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["kda", "gla", "poly_delta", "titans"])
def test_a_third_channel_that_starts_at_recall_forgets_slowly(name):
    halves = []
    for most in (math.inf, 256.0):
        for start in ("published", "recall"):
            heads = {"query_heads": 64, "key_value_heads": 64, "head_width": 8}  # many: KDA draws each one's decay
            options = {"memory": name, "start": start, **heads}
            model = Model(ModelConfig(23, width=16, depth=1, pattern=("global",), max_half_life=most, **options))
            memory = model.blocks[0].mixer.memory
            halves.append(-math.log(2) / memory.log_decay(torch.zeros(1, 1, 16)).mean())
        with torch.enable_grad():  # at its bound a decay learns nothing
            memory.log_decay(torch.zeros(1, 1, 16)).sum().backward()
        decays = [p.grad for p in memory.parameters() if p.grad is not None]
        assert any(grad.any() for grad in decays)
        assert halves[-1] > 3 * halves[-2] and halves[-1] > 20


# What the model's layers share


def hybrid() -> Model:
    config = ModelConfig(23, width=16, depth=4, pattern=("hgrn2", "hgrn2", "gated_conv"), key_width=8)
    return Model(config, torch.Generator().manual_seed(0))


def tables(model):
    return [block.mixer.gates.decay.table for block in model.blocks if isinstance(block.mixer, LinearRecurrence)]


def test_floors_are_one_table_of_the_model_that_training_saving_and_loading_keep_one(tmp_path):
    model = hybrid()
    first, *others = tables(model)
    assert first.shape == (3, 16) and all(other is first for other in others)
    assert [block.mixer.sizes.place.among for block in model.blocks if hasattr(block.mixer, "sizes")] == [0, 1, 2]
    optimisers = Optimisers(model, TrainConfig())
    tokens = torch.randint(0, 23, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        model.loss(model(tokens)[0], tokens.roll(-1, 1)).mean().backward()
        optimisers.step(1.0)
    assert first.any() and all(other is first for other in tables(model))
    assert sum("table" in key for key in optimisers.tensors() if key.endswith("/exp_avg")) == 1
    save_model(tmp_path / "model", model, None)
    again, _ = load_model(tmp_path / "model")
    assert torch.equal(again(tokens)[0], model(tokens)[0])
    assert len({id(table) for table in tables(again)}) == 1 and torch.equal(tables(again)[0], first)


def test_layers_whose_floors_cannot_be_one_table_are_refused():
    mixers = {"wide": {"kind": "hgrn2", "heads": 3, "key_width": 8}, "slim": {"kind": "hgrn2", "key_width": 8}}
    with pytest.raises(ValueError, match=r"share one table, here \(2, 24\) and \(2, 16\): give them equal sizes"):
        Model(ModelConfig(23, width=16, depth=2, pattern=("slim", "wide"), mixers=mixers))
    mixers["wide"] = {"kind": "hgrn2", "key_width": 8, "decay": "low_rank"}
    with pytest.raises(ValueError, match="the first layer of their kind, here one without that decay"):
        Model(ModelConfig(23, width=16, depth=2, pattern=("wide", "slim"), mixers=mixers))


# Diagnosis, decoding, serving


@torch.no_grad()
@pytest.mark.parametrize("name", ["gla", "gated_deltanet", "mamba2", "lightning"])
def test_a_cap_on_half_lives_reaches_what_a_head_keeps_and_leaves_the_others(name):
    model = Model(ModelConfig(23, width=16, depth=1, pattern=(name,), **small(name)[0]))
    model = randomise(model).eval()
    mixer, x = model.blocks[0].mixer, inputs(1, 12, 16)
    assert memory_of(mixer, mixer.init_state(1, 1)) is not None
    _, before = mixer(x, mixer.init_state(1, 12))
    with capped(model, [Head(0, 1)], 0.01):
        _, after = mixer(x, mixer.init_state(1, 12))
    assert "log_decay" not in vars(mixer)
    torch.testing.assert_close(after.memory[:, 0], before.memory[:, 0], rtol=0, atol=0)
    last = mixer(x[:, -1:], mixer.init_state(1, 1))[1] if mixer.conv is None else None
    if last is not None:  # all that is left is what the last token wrote
        torch.testing.assert_close(after.memory[:, 1], last.memory[:, 1], rtol=1e-6, atol=1e-6)


def decoded(pattern, options):
    model = Model(ModelConfig(23, width=16, depth=2, pattern=pattern, **options))
    model = randomise(model).eval()
    tokens = torch.randint(0, 23, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.logits(model(tokens)[0])
        _, state = model(tokens[:, :3], model.init_state(2, 7))
    decoder = Decoder(model, state)
    for t in range(3, 7):
        torch.testing.assert_close(decoder.step(tokens[:, t : t + 1]), expected[:, t], **EXACT)
    return decoder.how


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_every_system_is_recorded(name):
    for options in small(name):
        assert decoded((name, "gated_conv"), options).startswith(RECORDED)


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_a_system_is_served_with_the_same_bits_whatever_stands_beside_a_text_and_however_it_is_cut(name):
    model = Model(ModelConfig(23, width=16, depth=2, pattern=(name,), **small(name)[0]))
    served = Served(randomise(model).float().eval())
    assert served.exact == (name != "hedgehog")  # whose product by head goes by the number of tokens
    if served.exact:
        tokens = torch.randint(0, 23, (3, 70), generator=torch.Generator().manual_seed(0))
        together, _ = served(tokens, model.init_state(3, 70))
        first, state = served(tokens[1:2, :41], model.init_state(1, 70))
        rest, _ = served(tokens[1:2, 41:], state)
        assert torch.equal(torch.cat([first, rest], 1), together[1:2])


# Memories of a global mixer


TINY = {"core": "nope", "query_heads": 2, "key_value_heads": 1, "head_width": 8}


@torch.no_grad()
@pytest.mark.parametrize("name", MEMORY_NAMES)
def test_a_memory_starts_as_nothing_and_obeys_the_laws_of_what_it_is_in(name):
    config = ModelConfig(23, width=16, depth=2, pattern=("global",), memory=name, **TINY)
    plain = Model(ModelConfig(23, width=16, depth=2, pattern=("global",), memory=False, **TINY))
    model = Model(config)
    model.load_state_dict(plain.state_dict(), strict=False)
    tokens = torch.randint(0, 23, (1, 66), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(tokens)[0], plain(tokens)[0])
    model = randomise(model)
    whole, _ = model(tokens)
    state, pieces = model.init_state(1, 66), []
    for part in tokens.split([1, 40, 25], 1):
        y, state = model(part, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, **EXACT)
    ids = torch.tensor([[0] * 30 + [1] * 36])
    packed, _ = model(tokens, segment_ids=ids)
    alone = torch.cat([model(part)[0] for part in tokens.split([30, 36], 1)], 1)
    torch.testing.assert_close(packed, alone, **EXACT)
    assert state.blocks[0].memory.ndim == 4 and "memory" in model.blocks[0].mixer.channels()
    assert (model.blocks[0].mixer.retention() is not None) == (SYSTEMS[MEMORIES[name][1]["system"]].decay != "none")


@pytest.mark.skipif(native.status().library is None, reason="no compiled kernels here")
@pytest.mark.parametrize("name", MEMORY_NAMES)
def test_a_step_of_every_memory_is_recorded(name):
    assert decoded(("global",), {**TINY, "memory": name}).startswith(RECORDED)


def test_a_memory_follows_the_bound_of_its_model_and_refuses_heads_too_wide_for_its_features():
    recipe = recipe_of({"model": {"preset": "nano", "memory": "kda"}, "train": {"length": 512}})
    mixer = recipe.model.mixer(2)
    assert mixer.memory.bound(0) == 512
    with pytest.raises(ValueError, match=r"'head_width' must be at most 16 for memory = .based., not 64"):
        ModelConfig(pattern=("global",), memory="based", head_width=64).mixer(0)
    with pytest.raises(ValueError, match="'negative' must be false"):
        ModelConfig(pattern=("global",), memory="gla", negative=True).mixer(0)
    flat = ModelConfig(memory="kda", negative=True)
    assert flat.to_table()["negative"] is True and ModelConfig.from_table(flat.to_table()) == flat
