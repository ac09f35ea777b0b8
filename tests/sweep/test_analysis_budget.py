"""Runs are compared where they spent the same, by what their records say."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from atma.sweep.analysis_budget import at_budget, read_curves
from atma.sweep.contrasts import contrast
from atma.sweep.table import Cell
from atma.sweep.table_reading import load_table
from tests.sweep.synthetic_sweep import write_cell, write_sweep


@pytest.fixture
def sweep(tmp_path):
    return load_table(write_sweep(tmp_path / "s"))


def cell_with(memory: bool, cells) -> Cell:
    return next(cell for cell in cells if cell.factors["memory"] is memory)


def test_the_time_of_a_run_is_the_sum_of_its_steps(sweep):
    curves = read_curves(cell_with(True, sweep.cells))
    np.testing.assert_allclose(curves["train"].tokens, np.arange(1, 11) * 1000.0)
    np.testing.assert_allclose(curves["train"].seconds, np.arange(1, 11) * 0.5)
    np.testing.assert_allclose(curves["validation"].seconds, np.arange(2, 11, 2) * 0.5)


def test_a_cell_without_a_record_has_no_curves():
    assert read_curves(Cell("csv", {"a": 1}, 0, {})) == {}


def test_the_record_of_a_cell_is_that_of_the_attempt_whose_result_it_is(tmp_path):
    cell = write_cell(tmp_path, {"attention": "polar", "memory": True, "window": 64}, 0)
    for number in (2, 3):
        shutil.copytree(cell / "run-000001", cell / f"run-{number:06}")
    assert load_table(tmp_path).cells[0].record == cell / "run-000003" / "metrics.jsonl", "no attempt is told"
    result = json.loads((cell / "result.json").read_text())
    (cell / "result.json").write_text(json.dumps(result | {"provenance": {"attempt": 2}}))
    assert load_table(tmp_path).cells[0].record == cell / "run-000002" / "metrics.jsonl"


def test_a_loss_that_was_not_finite_is_left_out_of_the_curve_and_its_time_is_not(tmp_path):
    cell = write_cell(tmp_path, {"attention": "polar", "memory": True, "window": 64}, 0)
    record = cell / "run-000001" / "metrics.jsonl"
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    rows[0]["loss"] = None
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curve = read_curves(load_table(tmp_path).cells[0])["train"]
    assert curve.loss.size == 9
    assert curve.seconds[0] == pytest.approx(1.0)


def test_at_equal_tokens_every_run_has_its_last_loss(sweep):
    found, metric = at_budget(sweep, "tokens")
    assert metric == "validation_loss_at_10000_tokens"
    expected = [cell.metrics["final_val_loss_nats"] + 0.2 + 0.1 for cell in sweep.cells]
    np.testing.assert_allclose(found.values(metric), expected)


def test_at_equal_seconds_the_fast_run_has_ended_and_the_slow_one_stands_in_between(sweep):
    found, metric = at_budget(sweep, "seconds")
    assert metric == "validation_loss_at_2.5_seconds"
    fast, slow = cell_with(False, found.cells), cell_with(True, found.cells)
    assert fast.metrics[metric] == pytest.approx(fast.metrics["final_val_loss_nats"] + 2 / 10 + 0.1)
    between = (2 / 4 + 2 / 6) / 2  # 5,000 tokens, between the validations at 4,000 and 6,000
    assert slow.metrics[metric] == pytest.approx(slow.metrics["final_val_loss_nats"] + between + 0.1)
    memory = contrast(found, metric, {"memory": True}, {"memory": False})
    assert len(memory.differences) == 12


def test_a_run_that_did_not_reach_the_budget_has_no_value_there(sweep):
    found, metric = at_budget(sweep, "seconds", 4.0)
    assert metric not in cell_with(False, found.cells).metrics
    assert metric in cell_with(True, found.cells).metrics


def test_the_training_loss_at_a_budget_is_the_mean_of_its_last_tenth(sweep):
    found, metric = at_budget(sweep, "tokens", loss="train")
    cell = found.cells[0]
    assert metric == "train_loss_at_10000_tokens"
    last_two = (2 / 9 + 2 / 10) / 2
    assert cell.metrics[metric] == pytest.approx(cell.metrics["final_val_loss_nats"] + last_two)


def test_runs_that_were_validated_too_rarely_are_judged_by_the_training_loss(sweep):
    for record in (path for cell in sweep.cells for path in cell.folder.rglob("metrics.jsonl")):
        rows = [line for line in record.read_text().splitlines(True) if "validation" not in line or "10000" in line]
        record.write_text("".join(rows))
    with pytest.raises(ValueError, match=r"12 of 24 runs have the validation_loss_at_2.5_seconds; .*train_loss"):
        at_budget(sweep, "seconds")
    found, metric = at_budget(sweep, "seconds", loss="train")
    assert np.isfinite(found.values(metric)).all()


def test_a_budget_that_nobody_reached_or_recorded_is_an_error(sweep):
    with pytest.raises(ValueError, match="0 of 24 runs have the train_loss_at_20000_tokens; choose another budget"):
        at_budget(sweep, "tokens", 20_000, "train")
    bare = dataclasses.replace(sweep, cells=tuple(dataclasses.replace(cell, record=None) for cell in sweep.cells))
    with pytest.raises(ValueError, match="no cell has a training record"):
        at_budget(bare, "tokens")
