"""A setting that no recipe has: the one that was meant is named, whichever table it is in."""

import pytest

from atma.config import load_recipe
from atma.recipe_keys import WORDS, near, recipe_keys

KEYS = recipe_keys()


def test_every_word_of_others_leads_to_keys_that_exist():
    assert {target for targets in WORDS.values() for target in targets} <= set(KEYS)
    assert not {word for word in WORDS if any(key.rpartition(".")[2] == word for key in KEYS)}
    assert all(word == word.lower() and "-" not in word for word in WORDS)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.lr=1", "'train.muon_rate', 'train.embedding_rate', .* or 'train.lora_rate'?"),
        ("learning-rate=1", "did you mean 'train.muon_rate', "),
        ("train.batch_size=4", "did you mean 'train.batch_tokens'?"),
        ("model.n_layers=4", "did you mean 'model.depth'?"),
        ("model.hidden_size=4", "did you mean 'model.width'?"),
        ("train.seq_len=4", "did you mean 'train.length'?"),
        ("train.tokns=4", "unknown key 'train.tokns'; did you mean 'train.tokens'?"),
        ("tokens=4", "did you mean 'train.tokens'?"),
        ("train.dpeth=4", "did you mean 'model.depth'?"),
        ("model.windw=4", "did you mean 'model.window'?"),
        ("evaluation.length=4", "did you mean 'evaluation.lengths'?"),
        ("lora.ranks=4", "did you mean 'lora.rank'?"),
        ("lora.qqqq=4", "unknown key 'lora.qqqq'; there are alpha, rank, targets, train"),
        ("train.tokens=five", "'train.tokens' must be of type int, not 'five': a whole number, such as 1000"),
        ("train.muon_rate=fast", "must be of type float, not 'fast': a number, such as 0.01"),
        ("train.keep_best=1", "must be of type bool, not 1: true or false"),
        ("evaluation.lengths=5", r"must be a list, not 5: such as \[1, 2\]"),
    ],
)
def test_a_mistake_names_what_was_meant(setting, said, tmp_path):
    (tmp_path / "r.toml").write_text("")
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        load_recipe(tmp_path / "r.toml", [setting])


def test_a_key_in_its_own_table_is_nearer_than_one_like_it_in_another():
    assert near("evaluation.sed", KEYS) == "evaluation.seed"
    assert near("train.sed", KEYS) == "train.seed"
    assert near("train.zzzzzz", KEYS) is None


def test_the_keys_are_those_that_a_recipe_takes(tmp_path):
    (tmp_path / "r.toml").write_text("")
    assert {"name", "train.tokens", "model.width", "model.window", "lora.rank", "data.path"} <= set(KEYS)
    for key in ("train.tokens", "model.depth", "evaluation.documents", "lora.rank"):
        load_recipe(tmp_path / "r.toml", [f"{key}={'131072' if key == 'train.tokens' else KEYS[key]}"])
