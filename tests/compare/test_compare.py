"""A comparison: entrants of one size, pieces that keep their identity, one table and page, and going on."""

import dataclasses
import re

import pytest

from atma.cli import main
from atma.commands.compare import _page
from atma.compare.board import Column, board
from atma.compare.entrants import entrants, learner, of_task, parameters
from atma.compare.lessons import run_piece
from atma.compare.plan import Comparison, plan
from atma.config import ModelConfig, preset
from atma.data.prepare import Preparation, prepare
from atma.eval.recall.suite import Recall
from atma.sweep.ledger import Ledger
from atma.sweep.worker import Worker

BASE = preset("nano")
TINY = Comparison(
    mixers=("polar+memory", "rope"),
    seeds=(0,),
    tokens=256,
    tasks=("copy",),
    task_tokens=8192,
    model_preset="nano-test",
    length=16,
    longest=2,
    documents=2,
    needle_trials=1,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A folder of prepared bytes."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"the cat of number {number} sat on the mat\n" * (300 + number))
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    return folder / "data"


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A tiny comparison, done, and its folder."""
    comparison = dataclasses.replace(TINY, length=256, tokens=4096, data=str(corpus))
    folder = tmp_path_factory.mktemp("whole") / "compare"
    made = plan(comparison)
    Worker(made, Ledger.create(folder, made), "cpu", None, lambda text: None, run_piece).go()
    return comparison, folder


def test_all_entrants_are_as_large_as_the_first():
    found = entrants(("polar+memory", "polar", "rope", "gated_conv"), BASE, True)
    first = found[0].parameters
    step = BASE.depth * (3 * BASE.width + 2)
    assert all(abs(one.parameters - first) <= step / 2 for one in found)
    assert [one.parameters == parameters(one.model) for one in found] == [True] * 4
    assert found[0].model == BASE.changed({"core": "polar", "memory": True})
    own = entrants(("polar+memory", "rope"), BASE, False)
    assert own[1].model.mlp_width is None and own[1].parameters < first - step


def test_an_entrant_that_cannot_be_so_small_is_told_with_the_mend():
    with pytest.raises(ValueError, match=r"memory has .* without its MLPs, .*compare it with --parameters own"):
        entrants(("gated_conv,mlp_width=1", "polar+memory"), BASE, True)
    with pytest.raises(ValueError, match=r"^gloop: a mixer is "):
        entrants(("polar", "gloop"), BASE, True)


def test_the_model_of_a_recipe_is_an_entrant(tmp_path):
    (tmp_path / "mine.toml").write_text('[model]\npreset = "nano"\npattern = ["rope", "nope"]\n')
    one = entrants((str(tmp_path / "mine.toml"),), BASE, True)[0]
    assert one.name == "mine" and one.model.pattern == ("rope", "nope")


def test_a_task_is_learned_by_each_mixer_in_as_many_layers_as_by_its_own_models():
    copy, mad, chosen = (Recall(task).tasks()[0] for task in ("copy", "mad-recall", "selective-copy"))
    assert of_task(BASE, copy).layers == ("local", "global")
    assert of_task(BASE, mad).layers == ("global", "global")
    assert of_task(BASE, chosen).layers == ("local", "global", "local", "global")
    assert of_task(BASE, copy).vocab_size == copy.ids
    rope, both = (BASE.changed({"pattern": pattern}) for pattern in (["rope"], ["nope", "nope", "rope"]))
    assert of_task(rope, copy).layers == of_task(rope, mad).layers == ("rope", "rope")
    assert of_task(both, copy).layers == of_task(both, mad).layers == ("nope", "rope")
    assert of_task(both, chosen).layers == ("nope", "rope", "nope", "rope")
    named = BASE.changed({"pattern": ["gated_conv", "nope", "rope"]})
    assert of_task(named, copy).layers == ("gated_conv", "nope", "rope")
    assert of_task(ModelConfig(pattern=("local",)), mad).layers == ("local", "local")


def test_models_that_learn_a_task_are_as_large_as_that_of_the_first():
    found, task = entrants(("polar+memory", "rope", "gla"), BASE, True), Recall("copy").tasks()[0]
    first, *others = (parameters(learner(found, one, task, True)) for one in found)
    assert all(abs(one - first) <= (3 * BASE.width + 2) for one in others)
    assert parameters(learner(found, found[1], task, False)) != parameters(learner(found, found[1], task, True))


def test_entrants_of_one_name_or_without_a_place_or_without_mlps_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.toml").write_text('[model]\npreset = "nano"\n')
    with pytest.raises(ValueError, match=r"two entrants are called 'mine'.*rename one"):
        entrants([str(tmp_path / folder / "mine.toml") for folder in ("a", "b")], BASE, True)
    for name in ("rope", "gla"):
        with pytest.raises(ValueError, match=f"{name}: the base model has no layer 'global'.*make depth larger"):
            entrants((name,), BASE.changed({"depth": 2}), True)
    with pytest.raises(ValueError, match="no MLPs that could make up for it; compare it with --parameters own"):
        entrants(("polar", "gla"), BASE.changed({"mlp_width": 0}), True)


def test_what_is_added_later_leaves_every_piece_what_it_was():
    before = {cell.id for cell in plan(TINY).cells}
    more = dataclasses.replace(TINY, mixers=(*TINY.mixers, "nope"), seeds=(0, 1), tasks=("copy", "mad-recall"))
    after = {cell.id for cell in plan(more).cells}
    assert len(before) == 4 and before < after and len(after) == 3 * 3 * 2
    longer = {cell.id for cell in plan(dataclasses.replace(TINY, task_tokens=16_384)).cells}
    assert len(before & longer) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixers": ("rope", "rope")}, "'mixers' must be one or more, none twice"),
        ({"tokens": -1}, "'tokens' must be 0 or more"),
        ({"batch_tokens": 24}, "'batch_tokens' must be a multiple of length"),
        ({"longest": 3}, "'longest' must be a power of 2"),
        ({"tasks": ("chess",)}, "no task 'chess' to compare by; there are mqar, copy"),
        ({"tasks": ("capacity",)}, "no task 'capacity' to compare by"),
        ({"seeds": (0, -1)}, "'seeds' must be 0 or more"),
        ({"copy_share": 1.0}, "'copy_share' must be from 0 to below 1"),
        ({"tasks": ("mqar",)}, "'mqar' has several sizes; choose one, or more, of mqar=64,4"),
        ({"mixers": ("nope", "nope,window=none")}, "are the same; leave one out|a mixer is|window"),
    ],
)
def test_what_cannot_be_compared_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        plan(dataclasses.replace(TINY, **change))


def test_a_comparison_ends_with_a_table_and_a_page(whole):
    comparison, folder = whole
    results = Ledger.open(folder).results()
    assert len(results) == 4 and not Ledger.open(folder).failures()
    found = board(comparison, results, [], 4)
    table = found.table()
    assert [row[0] for row in table.rows] == found.ranked()
    assert table.header[:3] == ["mixer", "loss at 2×", "loss at 1×"]
    losses = {name: found.columns[0].mean(name) for name in comparison.mixers}
    told = {
        row["factors"]["mixer"]: row["metrics"]["fixed_nll_512"] for row in results if "fixed_nll_512" in row["metrics"]
    }
    assert losses == told
    text = _page(found, comparison, folder / "page.html").read_text()
    for words in ("Loss by length", "Needles by length", "What is remembered", "Loss and state", "polar+memory"):
        assert words in text


def test_a_finished_comparison_is_shown_again_and_does_nothing_more(whole, capsys):
    comparison, folder = whole
    made = plan(comparison)
    assert Worker(made, Ledger.create(folder, made), "cpu", None, lambda text: None, run_piece).go() == 0
    arguments = ["--mixers", *comparison.mixers, "--seeds", "0", "--tokens", "4096", "--tasks", "copy"]
    arguments += ["--task-tokens", "8192", "--model-preset", "nano-test", "--longest", "2", "--documents", "2"]
    arguments += ["--needle-trials", "1", "--data", comparison.data, "--out", str(folder), "--no-speed"]
    assert main(["compare", "run", *arguments]) == 0
    said = capsys.readouterr().out
    assert "4 of 4 pieces" in said and re.search(r"polar\+memory", said) and (folder / "compare.html").is_file()
    assert main(["compare", "table", str(folder)]) == 0


def test_a_folder_without_a_comparison_is_told(tmp_path, capsys):
    assert main(["compare", "table", str(tmp_path)]) == 2
    assert "no comparison here; begin it with `atma compare run`" in capsys.readouterr().err


def test_a_column_tells_means_intervals_and_what_was_never_reached():
    column = Column("tasks", "x", "x", False, lambda value: f"{value:.1f}")
    column.values.update({"one": [1.0], "both": [1.0, 3.0], "part": [2.0, None, None], "none": [None, None]})
    half = 12.7062 * 2**0.5 / 2**0.5  # Student's t of one degree times the standard error of two values 2 apart
    assert column.text("one") == "1.0" and column.text("absent") == "–" and column.text("none") == "never"
    assert column.text("both") == f"2.0 ± {half:.1f}" and column.text("part") == "2.0 in 1 of 3"
    assert sorted(column.values, key=column.rank) == ["one", "both", "part", "none"]
    assert column.rank("none") < column.rank("absent")
