"""What objects show of themselves at a prompt and in a notebook."""

import pytest
import torch

import atma
from atma import state as states
from atma.config import ModelConfig, preset
from atma.display import bytes_text, count_text, table_html, table_text
from atma.model import Model
from atma.presets import PRESETS
from tests.conftest import tiny


def lines(text):
    return text.splitlines()


@pytest.fixture(scope="module")
def loaded():
    return atma.load("nano")


def test_a_model_is_told_in_a_few_lines(loaded) -> None:
    told = repr(loaded.model)
    assert len(lines(told)) < 8
    assert "2 × local, global, local, repeated" in told
    assert "2,448,280" in told and "float32 on cpu" in told


def test_what_was_loaded_says_its_trained_length_and_folder(loaded) -> None:
    assert "256 tokens" in repr(loaded)
    assert str(loaded.path) in repr(loaded)
    assert "<table" in loaded._repr_html_()
    assert "not told" in repr(loaded._replace(info={}))
    assert "none" in repr(loaded._replace(tokenizer=None))


@pytest.mark.parametrize("config", [*map(preset, PRESETS), tiny(), tiny("rope"), tiny(window=8)])
def test_a_configuration_shows_as_python_that_makes_it(config) -> None:
    assert eval(repr(config), {"ModelConfig": ModelConfig}) == config
    assert len(repr(config)) < 500


def test_a_configuration_with_tables_of_mixers_shows_as_python() -> None:
    tables = {"far": {"kind": "global", "window": 8}}
    config = ModelConfig(vocab_size=23, width=16, depth=2, head_width=8, pattern=("gated_conv", "far"), mixers=tables)
    assert eval(repr(config), {"ModelConfig": ModelConfig}) == config


def test_a_state_tells_what_it_keeps_by_kind() -> None:
    model = Model(tiny())
    state = model.init_state(2, 64)
    with torch.inference_mode():
        _, state = model(torch.ones(2, 5, dtype=torch.long), state)
    told = repr(state)
    assert "5 tokens in each of 2 rows" in told
    assert bytes_text(states.nbytes(state)) in told
    assert "room for 64 tokens" in told and "keys" in told and "carried" in told
    assert len(lines(told)) < 8
    assert "<table" in state._repr_html_()


def test_a_tokenizer_says_its_size(loaded) -> None:
    assert repr(loaded.tokenizer) == "Tokenizer('bpe-1024': 1,024 tokens, end of text 1023)"


def test_counts_and_bytes_are_for_people() -> None:
    assert [count_text(n) for n in (950, 12_300, 2_448_280, 7_200_000_000)] == [
        "950",
        "12.3 thousand",
        "2.45 million",
        "7.2 billion",
    ]
    assert [bytes_text(n) for n in (512, 2048, 3 << 20, 5 << 30)] == ["512 B", "2 KiB", "3 MiB", "5 GiB"]


def test_tables_are_aligned_and_escaped() -> None:
    assert table_text(["a", "b"], [["long", "1"]]) == "a     b\nlong  1"
    assert "&lt;script&gt;" in table_html(["<script>"], [["<script>", "<script>"]], "<script>")
    assert "<script>" not in table_html(["<script>"], [["<script>", "<script>"]], "<script>")


def test_a_recipe_shows_what_differs_from_the_defaults() -> None:
    from atma.config import DataConfig, Recipe, TrainConfig

    recipe = Recipe("mine", preset("nano-test"), DataConfig("data/own"), TrainConfig(length=64))
    assert eval(repr(recipe), vars(atma.config) | {"atma": atma}) == recipe
    assert len(lines(repr(recipe))) == 4
    assert repr(Recipe()) == "Recipe()"
