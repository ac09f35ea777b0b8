"""A comparison: entrants of one size, pieces that keep their identity, one table and page, and going on."""

import dataclasses
import re

import pytest

from atma.cli import main
from atma.commands.compare import _page
from atma.compare.board import Column, board
from atma.compare.entrants import entrants, one_of_each, parameters
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


def test_a_task_is_learned_by_one_layer_of_each_mixer():
    copy, mad, chosen = (Recall(task).tasks()[0] for task in ("copy", "mad-recall", "selective-copy"))
    hybrid = BASE.changed({"pattern": ["nope", "nope", "rope"]})
    assert one_of_each(BASE, copy).layers == ("local", "global")
    assert one_of_each(BASE, mad).layers == ("global", "global")
    assert one_of_each(BASE, chosen).layers == ("local", "global", "local", "global")
    assert one_of_each(hybrid, copy).layers == one_of_each(hybrid, mad).layers == ("nope", "rope")
    assert one_of_each(hybrid, chosen).layers == ("nope", "rope")
    assert one_of_each(ModelConfig(pattern=("local",)), mad).layers == ("local", "local")
    assert one_of_each(BASE, copy).vocab_size == copy.ids


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
        ({"tasks": ("chess",)}, "no task 'chess'; there are mqar, copy"),
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
