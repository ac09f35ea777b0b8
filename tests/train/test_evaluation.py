"""What `atma train` tells before the first step, and the evaluation of a recipe after the last."""

import dataclasses
import json
import shlex

import pytest

from atma.cli import main
from atma.commands.trained import command, short_bounds
from atma.config import EvaluationConfig, Recipe
from atma.data.prepare import Preparation, prepare

RECIPE = """
[model]
preset = "nano-test"
width = 16
head_width = 8
[train]
length = 32
batch_tokens = 64
tokens = 128
evaluate_every = 0
"""
SMALL = "lengths = [100, 200]\ndocuments = 1\ntarget_tokens = 16\nneedle_trials = 1\n"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"the cat of number {number} sat on the mat\n" * 30)
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    return folder / "data"


@pytest.fixture
def train(corpus, tmp_path, capsys):
    """Run `atma train` with some tables; status, what was said, and whether a run was begun."""

    def go(evaluation: str = "", data: str = "", *options: str):
        recipe = tmp_path / "r.toml"
        tables = f'[data]\npath = "{corpus}"\n{data}' + (f"[evaluation]\n{evaluation}" if evaluation else "")
        recipe.write_text(RECIPE + tables)
        status = main(["train", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu", *options])
        said = capsys.readouterr()
        return status, said.out + said.err, (tmp_path / "run").exists()

    return go


@pytest.mark.parametrize(
    ("evaluation", "told"),
    [
        ("lengths = [64, 128]\ntarget_tokens = 16\n", "length 64 has no room for a needle"),
        ("lengths = [64, 128]\nneedle_trials = 0\n", "128 target tokens do not fit length 64"),
        ("lengths = [1_000_000]\nneedle_trials = 0\n", "less than the first length 1000000"),
    ],
)
def test_an_evaluation_that_can_never_work_is_told_before_anything_is_trained(train, evaluation, told):
    status, said, begun = train(evaluation)
    assert (status, begun) == (2, False)
    assert "[evaluation] cannot work" in said and told in said and said.count("\n") == 1


def test_lengths_without_text_are_told_and_the_rest_is_trained(train):
    status, said, begun = train("lengths = [100, 1_000_000]\ntarget_tokens = 16\nneedle_trials = 0\n")
    assert (status, begun) == (0, True)
    assert "for losses at 1,000,000 tokens" in said


def test_the_evaluation_of_a_recipe_is_made_when_asked_for(train, tmp_path):
    status, said, _ = train(SMALL, "", "--evaluate")
    assert status == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["length"] for row in rows if row["kind"] == "needle"] == [100, 200]
    assert "needle tokens" in said and "measure it" not in said


def test_else_the_command_is_told_that_makes_it(train, tmp_path, capsys):
    _, said, _ = train(SMALL)
    line = next(line for line in said.splitlines() if line.startswith("measure it: "))
    assert main(shlex.split(line.removeprefix("measure it: atma "))) == 0
    assert "│     200 │" in capsys.readouterr().out


def test_the_command_says_every_setting_that_is_not_the_default(tmp_path):
    assert len(shlex.split(command(Recipe(), tmp_path))) == 7
    chosen = dataclasses.replace(Recipe(), evaluation=EvaluationConfig((8, 16), junk=False, needle_tokens=9, seed=3))
    assert command(chosen, tmp_path).endswith("--lengths 8 16 --needle-tokens 9 --no-junk --seed 3")


def test_a_recipe_that_says_nothing_of_evaluation_trains_on_any_data(train):
    status, said, _ = train()
    assert status == 0 and "[evaluation]" not in said and "synthetic" not in said


def test_synthetic_rows_are_told_with_what_leaves_them_out(train):
    _, said, _ = train("", "recall_share = 0.4\ncopy_warmup_tokens = 64\n")
    assert "40% of the rows are synthetic recall" in said and "--set data.recall_share=0" in said
    assert "the first 64 tokens are synthetic copies" in said


def test_one_process_of_several_speaks(train, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    from atma.commands.trained import announce

    said = []
    monkeypatch.setattr("builtins.print", lambda *words: said.append(words))
    announce(dataclasses.replace(Recipe(), data=dataclasses.replace(Recipe().data, recall_share=0.4)), False)
    assert said == []


def test_bounds_shorter_than_the_rows_are_told(corpus):
    def lines(**changes):
        model = dataclasses.replace(Recipe().model, **changes)
        return short_bounds(dataclasses.replace(Recipe(), model=model))  # of rows of 256

    assert lines() == lines(count_limit=256, max_half_life=256) == []
    assert lines(count_limit=128, core="rope", memory=False) == []
    [one] = lines(count_limit=128)
    assert one.startswith("count_limit = 128 is below train.length = 256;")
    assert len(lines(count_limit=128, max_half_life=64)) == 2
