"""Tables hold what the files hold, in a useful order, and say what is wrong with those that cannot be read."""

import json
from pathlib import Path

import numpy as np
import pytest

from atma.sweep.table import Cell, holds, label, order, table
from atma.sweep.table_metrics import digits_of, number_text, rises
from atma.sweep.table_reading import load_table
from tests.sweep.synthetic_sweep import LENGTHS, write_cell, write_sweep

HEADER = "attention,memory,needle_token_acc_64,needle_token_acc_2048,train_seconds"


@pytest.fixture
def sweep(tmp_path: Path):
    return load_table(write_sweep(tmp_path / "s"))


def csv_file(folder: Path, *lines: str) -> Path:
    path = folder / "table.csv"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_sweep_folder_gives_every_cell_with_its_factors_seed_metrics_and_recipe(sweep):
    assert len(sweep.cells) == 24
    assert sweep.levels == {"attention": ("nope", "polar", "rope"), "memory": (False, True), "window": ("none", 64)}
    assert {cell.seed for cell in sweep.cells} == {0, 1}
    assert all(len(cell.metrics) == 3 + 2 * len(LENGTHS) for cell in sweep.cells)
    assert sweep.cells[0].config["train"]["length"] == sweep.trained_length == 256


def test_cells_without_a_result_are_named_and_left_out(tmp_path):
    write_sweep(tmp_path)
    (tmp_path / "cells" / "waiting").mkdir()
    found = load_table(tmp_path)
    assert found.unfinished == ("waiting",)
    assert len(found.cells) == 24


def test_a_csv_has_the_columns_before_the_first_metric_as_factors(tmp_path):
    found = load_table(csv_file(tmp_path, HEADER, "polar,1,97.5,92.5,10", "polar,0,90,,11.5"))
    assert found.levels == {"attention": ("polar",), "memory": (0, 1)}
    assert [cell.name for cell in found.cells] == ["polar +memory", "polar"]
    assert found.cells[1].metrics == {"needle_token_acc_64": 90.0, "train_seconds": 11.5}
    np.testing.assert_array_equal(found.values("needle_token_acc_2048"), [92.5, np.nan])


def test_a_csv_may_declare_its_factors_and_name_its_cells_and_seeds(tmp_path):
    path = csv_file(tmp_path, "score,cell,width,seed", "1.5,a,8,0", "2.5,b,8,1", "3.5,c,16,0")
    found = load_table(path, ["width"])
    assert [(cell.name, cell.factors, cell.seed) for cell in found.cells][1] == ("b", {"width": 8}, 1)
    assert found.metrics == ("score",)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["score,width", "1,8"], "which columns are factors"),
        ([HEADER, "polar,1,97.5,92.5,fast"], "line 2: 'fast' in column 'train_seconds' is not a number"),
        ([HEADER, "polar,1,97.5"], "line 2: it has another number of columns"),
        ([HEADER, "polar,1,97.5,9,9,9"], "line 2: it has another number of columns"),
        ([HEADER, "polar,1,97.5,9,9", "polar,1,97.5,9,9"], "equal factors and seed"),
        (["seed,core,params", "inf,rope,9"], "line 2: 'inf' in column 'seed' is not a whole number"),
        (["memory,memory,train_seconds", "1,1,1"], "column 'memory' stands twice"),
        ([HEADER], "no cell has a result"),
    ],
)
def test_a_csv_that_cannot_be_a_table_is_an_error_that_says_why(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        load_table(csv_file(tmp_path, *lines))


def test_a_declared_factor_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no column 'depth'"):
        load_table(csv_file(tmp_path, HEADER, "polar,1,97.5,9,9"), ["depth"])


def test_what_is_no_sweep_or_not_there_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no sweep"):
        load_table(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such sweep"):
        load_table(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"factors": {"attention": ["polar"]}}, "a level is one text"),
        ({"metrics": {"needle": "high"}}, "a metric is a number"),
        ({"metrics": None}, "not the result of a cell"),
    ],
)
def test_a_bad_result_is_an_error_that_names_it(tmp_path, change, words):
    write_cell(tmp_path, {"attention": "polar", "memory": True, "window": 64}, 0)
    path = write_cell(tmp_path, {"attention": "rope", "memory": True, "window": 64}, 0) / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=words):
        load_table(tmp_path)


def test_a_plan_says_which_cells_belong_to_the_sweep(tmp_path):
    write_sweep(tmp_path)
    plan = {"cells": [{"cell": "polar-True-64-0"}, {"cell": "later"}]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    found = load_table(tmp_path)
    assert [cell.name for cell in found.cells] == ["polar-True-64-0"]
    assert found.unfinished == ("later",)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="not the plan of a sweep"):
        load_table(tmp_path)


def test_a_setting_that_only_some_cells_have_is_unset_in_the_others():
    cells = [Cell("a", {"core": "polar"}, 0, {}), Cell("b", {"core": "polar", "train.clip": 2.0}, 0, {})]
    found = table("t", cells)
    assert found.levels == {"core": ("polar",), "train.clip": (None, 2.0)}
    assert [label(cell.factors, found.levels) for cell in found.cells] == ["polar", "polar train.clip=2"]


@pytest.mark.parametrize("levels", [(False, True), (0, 1), ("off", "on")])
def test_on_and_off_may_be_written_in_three_ways(levels):
    cells = [Cell(str(level), {"memory": level}, 0, {}) for level in levels]
    found = table("t", cells).levels
    assert found == {"memory": levels}
    assert [label(cell.factors, found) for cell in cells] == ["nothing on", "+memory"]


def test_a_metric_that_is_not_finite_is_absent(tmp_path):
    path = write_cell(tmp_path, {"attention": "polar", "memory": True, "window": 64}, 0) / "result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {"clean_nll_256": None, "clean_nll_1024": float("inf")}
    path.write_text(json.dumps(result))
    assert not {"clean_nll_256", "clean_nll_1024"} & set(load_table(tmp_path).cells[0].metrics)


@pytest.mark.parametrize(
    ("asked", "metric"),
    [
        (None, "needle_token_acc_16384"),
        ("clean_nll", "clean_nll_16384"),
        ("clean_nll_256", "clean_nll_256"),
        ("clean_nll@16x", "clean_nll_4096"),
        ("params", "params"),
    ],
)
def test_a_metric_is_named_with_its_length_by_its_family_or_by_a_multiple_of_the_trained_length(sweep, asked, metric):
    assert sweep.metric(asked) == metric


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("speed", "no metric 'speed'"),
        ("clean_nll@3x", r"not measured at 3x \(768 tokens\); there is 1x, 4x, 16x, 64x"),
        ("clean_nll@long", "such as @32x"),
    ],
)
def test_an_unknown_metric_is_an_error_that_names_what_there_is(sweep, asked, words):
    with pytest.raises(ValueError, match=words):
        sweep.metric(asked)


def test_a_subset_has_its_cells_and_its_levels_alone(sweep):
    kept = sweep.where({"attention": ["polar", "rope"], "memory": [True]})
    assert len(kept.cells) == 8
    assert kept.levels == {"attention": ("polar", "rope"), "memory": (True,), "window": ("none", 64)}


@pytest.mark.parametrize(("where", "words"), [({"depth": [1]}, "no factor"), ({"memory": [1]}, "no level '1'")])
def test_a_subset_of_what_is_not_there_is_an_error(sweep, where, words):
    with pytest.raises(ValueError, match=words):
        sweep.where(where)


def test_levels_stand_references_first_then_numbers_then_text():
    assert order(["weak", 8, "none", 2, None, "a", 8]) == (None, "none", 2, 8, "a", "weak")
    assert order([True, False, True]) == (False, True)


def test_true_is_not_one_and_two_is_two():
    assert not holds(True, [1])
    assert holds(2, [2.0])


def test_a_label_names_what_is_on_and_leaves_out_what_is_not():
    levels = {"core": ("polar", "rope"), "memory": (0, 1), "mask": ("none", "weak"), "taps": (2, 3)}
    assert label({"core": "polar", "memory": 1, "mask": "none", "taps": 3}, levels) == "polar +memory taps=3"
    assert label({"memory": 0}, levels) == "nothing on"


def test_two_factors_with_one_text_level_are_told_apart():
    cells = [Cell("a", {"one": "high", "two": "high"}, 0, {}), Cell("b", {"one": "low", "two": "high"}, 0, {})]
    levels = table("t", cells).levels
    assert [label(cell.factors, levels) for cell in cells] == ["one=high two=high", "low two=high"]


def test_more_accuracy_and_less_of_everything_else_is_better():
    names = ["needle_token_acc_64", "mfu_percent", "clean_nll_64", "needle_ce_64", "train_seconds", "params"]
    assert [rises(name) for name in names] == [True, True, False, False, False, False]


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(50.25, 1, "+50.3"), (-0.125, 2, "-0.13"), (-0.001, 2, "0.00"), (1234.5, 0, "+1,235"), (None, 2, "–")],
)
def test_halves_round_away_from_zero_and_zero_has_no_sign(value, digits, text):
    assert number_text(value, digits, signed=True) == text


def test_nats_have_four_decimals_and_counts_none():
    assert [digits_of(name) for name in ("clean_nll_64", "needle_token_acc_64", "params")] == [4, 2, 0]
    assert [digits_of(name) for name in ("train_seconds", "validation_loss_at_51.2_seconds")] == [1, 4]
