"""From a recipe to cells: what is written in `[sweep]`, what it means, and what a cell's identity rests on."""

import csv
import math
import re
from pathlib import Path

import pytest

from atma.config import dump_toml, load_recipe
from atma.sweep.cells import expand, load_sweep
from atma.sweep.estimate import estimate
from atma.sweep.ledger import Ledger
from atma.sweep.task import Watch

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT.parent / "shared" / "published" / "stage1_120_cells.csv"
ATTENTION = {"field": "model.core", "values": ["polar", "rope"]}
WINDOW = {"off": {}, "on": {"model.window": 64}}


def sweep(table, **tables):
    return expand({"name": "s", "model": {"preset": "nano-test"}} | tables | {"sweep": table})


def chosen(table, **tables):
    return [cell.factors for cell in sweep(table, **tables).cells]


def test_cells_are_the_product_of_the_levels_with_seeds_outermost():
    found = sweep({"seeds": [3, 4], "factors": {"attention": ATTENTION, "window": WINDOW}}).cells
    assert [cell.label for cell in found] == [
        f"attention={core} window={window} seed={seed}"
        for seed in (3, 4)
        for core in ("polar", "rope")
        for window in ("off", "on")
    ]
    assert [cell.recipe.model.core for cell in found[:4]] == ["polar", "polar", "rope", "rope"]
    assert [cell.recipe.model.window for cell in found[:4]] == [None, 64, None, 64]
    assert [cell.recipe.train.seed for cell in found] == [3] * 4 + [4] * 4
    assert len({cell.id for cell in found}) == 8


def test_the_three_forms_of_a_factor_make_the_same_cells():
    plain = sweep({"factors": {"model.core": ["polar", "rope"]}})
    named = sweep({"factors": {"attention": ATTENTION}})
    levels = sweep({"factors": {"a": {"p": {"model.core": "polar"}, "r": {"model.core": "rope"}}}})
    ids = [cell.id for cell in plain.cells]
    assert ids == [cell.id for cell in named.cells] == [cell.id for cell in levels.cells]
    assert plain.cells[0].factors == {"model.core": "polar"}
    assert levels.cells[0].factors == {"a": "p"}


def test_a_level_may_set_several_fields_and_the_preset():
    table = {
        "factors": {"size": {"s": {"model.preset": "nano-test"}, "m": {"model.preset": "nano", "train.clip": 0.5}}}
    }
    small, middle = sweep(table, model={"window": 8}).cells
    assert (small.recipe.model.width, middle.recipe.model.width) == (64, 128)
    assert (small.recipe.model.window, middle.recipe.model.window) == (8, 8)
    assert (small.recipe.train.clip, middle.recipe.train.clip) == (1.0, 0.5)


def test_cells_can_be_left_out_and_written_out():
    table = {
        "factors": {"attention": ATTENTION, "window": WINDOW},
        "exclude": [{"attention": "rope", "window": ["off", "on"]}],
        "cells": [{"attention": "rope", "window": "off", "train.tokens": 9_000_000}],
    }
    assert chosen(table) == [
        {"attention": "polar", "window": "off"},
        {"attention": "polar", "window": "on"},
        {"attention": "rope", "window": "off", "train.tokens": 9_000_000},
    ]
    assert sweep(table).cells[-1].recipe.train.tokens == 9_000_000


def test_an_identity_depends_on_what_a_cell_is_and_on_nothing_else():
    base = {cell.label: cell.id for cell in sweep({"factors": {"attention": ATTENTION}}).cells}
    longer = {"field": "model.core", "values": ["rope", "nope", "polar"]}
    table = {"seeds": [1, 0], "attempts": 7, "factors": {"attention": longer, "window": WINDOW}}
    grown = {cell.label: cell.id for cell in sweep(table, name="another").cells}
    assert base["attention=polar seed=0"] == grown["attention=polar window=off seed=0"]
    assert base["attention=rope seed=0"] == grown["attention=rope window=off seed=0"]
    assert len(set(grown.values())) == 12
    changed = sweep({"factors": {"attention": ATTENTION}}, train={"clip": 2.0}).cells
    assert not {cell.id for cell in changed} & set(base.values())


def test_identities_are_the_same_today_and_tomorrow(tmp_path: Path):
    """A cell's id is that of its recipe written to a file and read again."""
    from atma.config import identity

    cell = sweep({"factors": {"attention": ATTENTION}}).cells[0]
    (tmp_path / "cell.toml").write_text(dump_toml(cell.recipe))
    assert identity(load_recipe(tmp_path / "cell.toml")) == cell.id


def test_infinity_is_a_level_as_any_other(tmp_path: Path):
    table = {
        "factors": {"model.max_half_life": [math.inf, 256.0], "attention": ATTENTION},
        "exclude": [{"model.max_half_life": math.inf, "attention": "rope"}],
    }
    found = sweep(table)
    assert [cell.recipe.model.max_half_life for cell in found.cells] == [math.inf, 256.0, 256.0]
    Ledger.create(tmp_path / "s", found)
    assert next(iter(Ledger.open(tmp_path / "s").cells.values())) == "model.max_half_life=inf attention=polar seed=0"


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"factor": {}}, "unknown key 'sweep.factor'; did you mean 'sweep.factors'?"),
        ({"factors": {"model.cor": ["rope"]}}, "unknown key 'model.cor'; did you mean 'model.core'?"),
        (
            {"factors": {"w": {"on": {"model.windows": 4}}}},
            "unknown key 'model.windows'; did you mean 'model.window'?",
        ),
        ({"factors": {"w": {"field": "model.core", "value": []}}}, "unknown key 'sweep.factors.w.value'"),
        ({"factors": {"model.core": []}}, "at least one value"),
        ({"factors": {"model.core": ["rope", "rope"]}}, "different values"),
        ({"factors": {"model.pattern": [["local"]]}}, "name the levels"),
        (
            {"factors": {"model.core": ["rop"]}},
            "cell model.core=rop seed=0: 'model.core': no core 'rop'",
        ),
        ({"factors": {"w": {"on": 3}}}, "must be a table of settings, not 3"),
        ({"factors": {"w": 3}}, "must be a list of values or a table of levels, not 3"),
        ({"factors": {"train.seed": [1]}}, "list the seeds there"),
        ({"factors": {"model.core": ["rope"], "a": ATTENTION}}, "factors 'model.core' and 'a' both set 'model.core'"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [1, 1]}, "different seeds"),
        ({"attempts": 0}, "'attempts' must be at least 1, not 0"),
        ({"lease": 0.0}, "'lease' must be a positive number"),
        ({"lease": math.inf}, "'lease' must be a positive number of seconds, and finite, not inf"),
        (
            {"factors": {"size": {"s": {"model.preset": ["nano"]}}}},
            "size=s seed=0: no preset ['nano']; known: nano",
        ),
        ({"factors": {"w": {"off": {}, "on": {"model.core": "polar"}}}}, "are the same configuration"),
        ({"factors": {"a": ATTENTION}, "exclude": [{"b": 1}]}, "unknown factor 'b'; did you mean 'a'?"),
        (
            {"factors": {"a": ATTENTION}, "exclude": [{"a": "nope"}]},
            "factor 'a' has no level 'nope'; its levels: polar",
        ),
        ({"factors": {"a": ATTENTION}, "exclude": [{}]}, "the sweep has no cells"),
        ({"factors": {"a": ATTENTION}, "cells": [{"train.tokens": 5}]}, "gives no level of 'a'"),
        ({"factors": {"a": ATTENTION}, "cells": [{"a": "polar", "train.token": 5}]}, "did you mean 'train.tokens'?"),
        ({"prepare": {"tokenizer": "bpe"}}, "'sweep.prepare.source' must name"),
        ({"prepare": {"source": "stdlib", "vocab": 5}}, "unknown key 'sweep.prepare.vocab'"),
    ],
)
def test_what_is_wrong_with_a_sweep_is_said(table, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        sweep(table)


def test_what_is_left_is_counted_among_the_cells_of_the_recipe(tmp_path: Path):
    old, new = sweep({"seeds": [0, 1, 2]}), sweep({"seeds": [2, 3, 4, 5], "attempts": 1})
    for cell in old.cells:
        Ledger.create(tmp_path, old).task(cell.id).publish({"seconds": 10.0})
    assert "1 done in 0:10 each; 3 are left: 0:30 for one worker" in estimate(new, tmp_path)
    task = Ledger.create(tmp_path, new).task(new.cells[-1].id)
    claim = task.claim(Watch())
    claim.fail(ValueError("bad"))
    assert task.claim(Watch()) is None
    assert "1 done in 0:10 each, 1 given up; 2 are left: 0:20 for one worker" in estimate(new, tmp_path)


def test_a_recipe_without_a_sweep_is_no_sweep():
    with pytest.raises(ValueError, match="no table"):
        load_sweep(ROOT / "recipes" / "nano.toml")


def test_the_nano_sweep_has_the_120_cells_of_the_paper():
    if not PUBLISHED.is_file():
        pytest.skip("the published table (../shared/published) is not beside this checkout")
    names = {"none": "baseline", "off": "0", "on": "1"}
    for recipe in ("sweep-nano", "sweep-small"):
        cells = load_sweep(ROOT / "recipes" / f"{recipe}.toml").cells
        ours = {tuple(names.get(str(level), level) for level in cell.factors.values()) for cell in cells}
        with PUBLISHED.open() as file:
            theirs = {tuple(list(row.values())[:5]) for row in csv.DictReader(file)}
        assert len(cells) == 120
        assert ours == theirs


def test_the_short_nano_sweep_is_a_part_of_the_whole_one_with_a_second_seed():
    part = load_sweep(ROOT / "recipes" / "sweep-nano-24.toml").cells
    whole = {cell.id for cell in load_sweep(ROOT / "recipes" / "sweep-nano.toml").cells}
    assert len(part) == 48
    assert {cell.id for cell in part if cell.seed == 0} <= whole
    assert not {cell.id for cell in part if cell.seed == 1} & whole


LIKELIHOOD = {"texts": "stdlib", "lengths": [32, 64], "documents": 2}


def test_suites_are_read_strictly_and_are_a_part_of_what_a_cell_is():
    factors = {"factors": {"attention": ATTENTION}}
    plain, asked = sweep(factors).cells, sweep(factors, suites={"likelihood": LIKELIHOOD}).cells
    assert sweep(factors, suites={}).cells == plain
    assert asked[0].suites["likelihood"].lengths == (32, 64)
    assert asked[0].recipe == plain[0].recipe
    assert len({cell.id for cell in (*plain, *asked)}) == 4
    told = sweep(factors, suites={"likelihood": LIKELIHOOD | {"seed": 1234}}).cells
    assert [cell.id for cell in told] == [cell.id for cell in asked]


def test_a_factor_may_set_the_options_of_a_suite():
    levels = {core: {"model.core": core, "suites.recall.mixers": [core]} for core in ("polar", "rope")}
    cells = sweep({"factors": {"attention": levels}}, suites={"recall": {"task": "copy", "sizes": ["16"]}}).cells
    assert [cell.suites["recall"].mixers for cell in cells] == [("polar",), ("rope",)]
    assert {cell.suites["recall"].task for cell in cells} == {"copy"}


@pytest.mark.parametrize(
    ("suites", "said"),
    [
        ({"likelihoods": {}}, "unknown suite 'suites.likelihoods'; did you mean 'suites.likelihood'?"),
        ({"likelihood": {"document": 2}}, "unknown key 'suites.likelihood.document'; did you mean 'suites.likelihood."),
        ({"likelihood": {"documents": 0}}, "'documents' must be 1 or more, not 0"),
        ({"likelihood": 3}, "'suites.likelihood' must be a table, not 3"),
        (3, "'suites' must be tables such as [suites.likelihood], not 3"),
    ],
)
def test_what_is_wrong_with_the_suites_of_a_sweep_is_said(suites, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        sweep({"factors": {"attention": ATTENTION}}, suites=suites)


def test_an_unknown_option_of_a_suite_in_a_level_names_the_nearest():
    with pytest.raises(ValueError, match=re.escape("did you mean 'suites.likelihood.documents'")):
        sweep({"factors": {"suites.likelihood.document": [2, 4]}})
