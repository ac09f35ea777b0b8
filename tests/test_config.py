"""Recipes: strict reading, exact round trips, one identity per configuration."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atma.config import (
    EvaluationConfig,
    ModelConfig,
    Recipe,
    TrainConfig,
    canonical_json,
    dump_toml,
    from_dict,
    identity,
    load_recipe,
    preset,
    to_dict,
)
from atma.strict import read_value


def write(path, text):
    path.write_text(text)
    return path


@given(
    width=st.integers(1, 4096),
    half_life=st.floats(1, 1e9) | st.just(math.inf),
    window=st.none() | st.integers(1, 99),
)
def test_a_recipe_survives_toml_and_json(tmp_path_factory, width, half_life, window):
    recipe = Recipe("round trip", ModelConfig(width=width, max_half_life=half_life, window=window))
    path = write(tmp_path_factory.mktemp("recipe") / "recipe.toml", dump_toml(recipe))
    assert load_recipe(path) == recipe
    assert from_dict(Recipe, to_dict(recipe)) == recipe


def test_identity_is_equal_exactly_for_equal_configurations():
    assert identity(Recipe()) == identity(Recipe())
    assert identity(Recipe()) != identity(Recipe(train=TrainConfig(seed=1)))
    assert "Infinity" not in canonical_json(Recipe())


def test_a_setting_that_came_later_changes_no_identity_at_its_default():
    """Runs, sweep cells and saved states are known by these texts."""
    assert identity(ModelConfig()) == "d762ab01f90be095"
    assert identity(Recipe()) == "a59ed531d0a6352f"
    assert identity(ModelConfig(rope_canon=True)) != identity(ModelConfig())
    assert "rope_canon" in to_dict(ModelConfig())


@pytest.mark.parametrize(
    ("recipe", "known"),
    [
        ("nano-constant", "6652d846d22e74b5"),
        ("stacks/atma-kda-nano", "b74d84dec200694a"),
        ("stacks/gated-deltanet-3to1-nano", "43298cbfd7359c8a"),
        ("stacks/samba-nano", "74c5bfb501bf9df3"),
        ("stacks/transformer-nano", "32715b0c925920b7"),
    ],
)
def test_an_option_of_a_mixer_that_came_later_changes_no_identity_at_its_default(recipe, known):
    assert identity(load_recipe(Path(__file__).parents[1] / f"recipes/{recipe}.toml")) == known


def test_a_recipe_starts_from_a_preset_and_changes_it(tmp_path):
    recipe = load_recipe(write(tmp_path / "mine.toml", '[model]\npreset = "nano"\ncore = "rope"\n'))
    assert recipe.name == "mine"
    assert recipe.model.width == preset("nano").width
    assert recipe.model.core == "rope"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[train]\nlenght = 256", r"unknown key 'train.lenght'; did you mean 'train.length'"),
        ("[trian]\nlength = 256", r"unknown key 'trian'; did you mean 'train'"),
        ('[model]\ncore = "alibi"', r"'model.core': no core 'alibi'; did you mean"),
        ('[model]\npreset = "huge"', r"no preset 'huge'; known: nano-test"),
        ('[model]\npreset = ["nano"]', r"no preset \['nano'\]; known: nano-test"),
        ("[model]\nwidth = 0", r"'width' must be at least 1, not 0"),
        ("[model]\nwidth = 1.5", r"'model.width' must be of type int, not 1.5"),
        ("[model]\nkey_value_heads = 3", r"a divisor of query_heads"),
        ("[train]\nbatch_tokens = 100", r"a multiple of length × accumulation = 256"),
        ("[data]\nrecall_share = 2.0", r"'recall_share' must be between 0 and 1"),
        ("[evaluation]\nlengths = [512, 256]", r"strictly increasing"),
        ("[evaluation]\nlengths = 256", r"must be a list"),
        ("[train]\nseed = -1", r"'seed' must be 0 or more"),
        ("[train]\nmuon_rate = inf", r"'muon_rate' must be 0 or more, and finite"),
        ("[train]\nevaluation_tokens = 0", r"'evaluation_tokens' must be at least 1"),
        ("[train]\ndistractor_weight = -1.0", r"'distractor_weight' must be 0 or more"),
        ("[model]\ndecay_bias = nan", r"'decay_bias' must be finite"),
        ('name = "../other"', r"'name' must be the name of a folder"),
        ("train = 3", r"'train' must be a table"),
        ("not toml at all", r"not a TOML recipe"),
    ],
)
def test_what_a_recipe_cannot_say_is_one_line_with_the_file(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe(write(tmp_path / "bad.toml", text))
    assert "bad.toml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match="no such recipe"):
        load_recipe(tmp_path / "absent.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a TOML recipe"):
        load_recipe(tmp_path / "binary.toml")


def test_a_token_budget_leaves_long_lengths_fewer_needles_and_one_at_least():
    evaluation = EvaluationConfig(lengths=(100, 1000, 10_000), needle_trials=8, needle_tokens=4000)
    assert [evaluation.trials(length) for length in evaluation.lengths] == [8, 2, 1]
    assert EvaluationConfig(needle_trials=0, needle_tokens=4000).trials(100) == 0
    assert EvaluationConfig().trials(1_000_000) == 32


@pytest.mark.parametrize(
    "text",
    [
        "[train]\ntokens = " + "[" * 2000 + "]" * 2000,
        "[train]\ntokens = " + "[" * 100 + "]" * 100,
        "[train" + ".a" * 5000 + "]\nx = 1",
        "train = " + "{a = " * 2000 + "1" + "}" * 2000,
        "[train]\ntokens = " + "1" * 5000,
    ],
    ids=["lists", "a-hundred-lists", "tables", "inline-tables", "digits"],
)
def test_a_recipe_without_end_is_one_line(tmp_path, text):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=r"r.toml: not a TOML recipe: "):
        load_recipe(tmp_path / "r.toml")
    if "\ntokens = " in text:
        with pytest.raises(ValueError, match=r"not a value|nested more than 64 deep"):
            read_value(text.partition("= ")[2])


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf[train]\ntokens = 5\n")
    assert load_recipe(tmp_path / "r.toml").train.tokens == 5


def test_one_canon_tap_needs_the_start_that_it_can_have():
    with pytest.raises(ValueError, match=r"'canon_taps' must be at least 2 for canon_init = .previous. .*, not 1"):
        ModelConfig(canon_taps=1)
    assert ModelConfig(canon_taps=1, canon_init="uniform").canon_taps == 1
    assert ModelConfig(canon_taps=1, core="rope").canon_taps == 1


@pytest.mark.parametrize("name", ["nano", "small", "base"])
def test_what_a_preset_bounds_by_its_length_follows_the_length_of_the_recipe(tmp_path, name):
    text = f'[model]\npreset = "{name}"\n[train]\nlength = 1024\n'
    model = load_recipe(write(tmp_path / "a.toml", text)).model
    assert (model.count_limit, model.max_half_life) == (1024, 1024.0) and isinstance(model.max_half_life, float)


def test_a_bound_that_is_said_and_a_preset_without_one_stay(tmp_path):
    said = '[model]\npreset = "nano"\ncount_limit = 300\n[train]\nlength = 1024\n'
    model = load_recipe(write(tmp_path / "a.toml", said)).model
    assert (model.count_limit, model.max_half_life) == (300, 1024.0)
    for name in ("nano-test", "base-published"):
        text = f'[model]\npreset = "{name}"\n[train]\nlength = 1024\n'
        assert load_recipe(write(tmp_path / "b.toml", text)).model == preset(name)
    assert load_recipe(write(tmp_path / "c.toml", '[model]\npreset = "nano"\n')).model == preset("nano")


def test_settings_of_the_command_line_are_said_before_the_preset_is_filled_in(tmp_path):
    path = write(tmp_path / "a.toml", '[model]\npreset = "nano"\n')
    recipe = load_recipe(path, ("train.length=1024", "model.preset=small"))
    assert recipe.model.width == preset("small").width and recipe.model.count_limit == 1024
    assert load_recipe(path, ("train.length=1024", "model.count_limit=256")).model.count_limit == 256


def test_a_stored_recipe_says_its_bounds_and_keeps_them(tmp_path):
    old = Recipe("old", preset("nano"), train=TrainConfig(length=1024))
    assert load_recipe(write(tmp_path / "recipe.toml", dump_toml(old))) == old
