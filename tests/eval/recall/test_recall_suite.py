"""The suite and its command: lessons are kept and resumed, budgets shorten all alike, and the best rate is marked."""

import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from atma.cli import main
from atma.eval.recall import lessons, training
from atma.eval.recall import suite as suites
from atma.eval.recall.mixers import base, mixer
from atma.eval.recall.suite import Recall, learn, recall
from atma.eval.recall.summary import figures, groups, table
from atma.eval.results import read_rows
from atma.mixers.table import GROUPS, find
from atma.statistics import wilson

PACKAGE = Path(__file__).parents[2] / "third_party" / "package"

TINY = Recall(
    task="copy",
    sizes=("8",),
    vocabulary=6,
    mixers=("polar+memory", "rope"),
    model=("width=16", "head_width=8", "mlp_multiple=1"),
    tokens=640,
    batch_tokens=64,
    every=4,
    held_out=8,
    trials=32,
    factors=(1, 4),
)
PROBE = dataclasses.replace(
    TINY, task="capacity", sizes=("2",), vocabulary=64, mixers=("polar+memory,window=2",), most_pairs=9, threshold=0.5
)


@pytest.fixture(scope="module")
def made():
    return recall(TINY)


def of(rows, kind):
    return [row for row in rows if row["kind"] == kind]


def test_a_run_leaves_its_curve_its_accuracies_and_what_is_to_be_known(made):
    kinds = ["curve"] * 3 + ["accuracy"] * 2 + ["run"]
    assert [row["kind"] for row in made] == 2 * kinds
    assert [row["step"] for row in of(made, "curve")] == 2 * [4, 8, 10]
    assert [(row["length"], row["trials"], row["answers"]) for row in of(made, "accuracy")[:2]] == [
        (8, 32, 96),
        (32, 16, 240),
    ]
    for row in made:
        assert json.loads(json.dumps(row, allow_nan=False)) == row
        assert row["suite"] == "recall" and row["provenance"]["seed"] == 1234 and len(row["key"]) == 16
    first, second = of(made, "run")
    assert first["memory_bytes"] == 2 * 8 * 8 * 4 and second["memory_bytes"] == 0
    assert first["identity"] != second["identity"] and first["model"]["core"] == "polar"
    assert first["trained_tokens"] == 640


def test_any_configuration_is_taught_without_the_command(made):
    (task,) = TINY.tasks()
    config = mixer("rope", base(task, "", TINY.model))
    rows = learn(dataclasses.replace(config, vocab_size=99), "copy", 640, 0, TINY, "rope")
    about = {"suite", "measurement", "provenance", "key"}
    expected = [{k: v for k, v in row.items() if k not in about} for row in made if row["mixer"] == "rope"]
    for row in (*rows, *expected):
        row.pop("seconds", None)
    assert rows == expected


def test_any_mixer_is_trained_in_the_place_of_the_global_layers(monkeypatch):
    monkeypatch.syspath_prepend(PACKAGE)
    point = importlib.metadata.EntryPoint("echo", "atma_echo:Echo", GROUPS["mixer"])
    monkeypatch.setattr("atma.mixers.table._points", lambda what: (point,) if what == "mixer" else ())
    find.cache_clear()
    try:
        rows = recall(dataclasses.replace(TINY, model=("width=16",), mixers=("echo,code_width=4", "atma,head_width=8")))
    finally:
        find.cache_clear()
    echo, atma = of(rows, "run")
    assert echo["model"]["pattern"] == ["local", "echo"] and atma["model"]["pattern"] == ["local", "atma"]
    assert echo["model"]["mixers"]["echo"]["code_width"] == 4
    assert echo["memory_bytes"] == 2 * 4 * 4 and atma["memory_bytes"] == 2 * 8 * 8 * 4  # the average, and the squares
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_proportions_have_their_wilson_intervals_and_outcomes(made):
    for row in of(made, "accuracy"):
        right = round(row["accuracy"] * row["answers"])
        assert (row["low"], row["high"]) == wilson(right, row["answers"])
        assert sum(row["outcomes"]) / row["trials"] == row["exact_accuracy"] and len(row["outcomes"]) == row["trials"]


def test_all_mixers_are_asked_the_same(made):
    asked = [row["trials_sha256"] for row in of(made, "accuracy")]
    assert asked[:2] == asked[2:] and asked[0] != asked[1]


def test_runs_in_the_file_are_not_made_again(tmp_path, monkeypatch):
    path, stopped = tmp_path / "rows.jsonl", []

    def stop(name, done, total):
        stopped.append(name)
        if "rope" in name:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recall(TINY, path, stop)
    assert {row["mixer"] for row in read_rows(path)} == {"polar+memory"}
    whole = recall(TINY, path)
    assert [row["mixer"] for row in of(whole, "run")] == ["polar+memory", "rope"]
    monkeypatch.setattr(training.Learner, "learn", None)
    assert recall(TINY, path) == whole == read_rows(path)


@pytest.mark.parametrize(
    "suite", [TINY, PROBE, dataclasses.replace(TINY, stop_at=0.0)], ids=["all", "probe", "stopped"]
)
def test_progress_sums_to_the_tokens_of_a_run_even_if_it_ends_early(suite):
    seen = {}
    recall(suite, progress=lambda name, done, total: seen.update({name: (done, total)}))
    assert len(seen) == len(suite.mixers)
    assert all(done == total for done, total in seen.values())


def test_the_probe_ends_with_the_first_number_of_pairs_that_is_not_held(monkeypatch):
    def four_at_most(model, batch, advance):
        pairs = int((batch.targets[0] >= 0).sum())
        return np.ma.array(np.full((len(batch.targets), pairs), pairs <= 4))

    monkeypatch.setattr(lessons, "correct", four_at_most)
    rows = recall(dataclasses.replace(PROBE, tokens=64))
    (run,), tested = of(rows, "run"), of(rows, "capacity")
    assert [(row["pairs"], row["accuracy"]) for row in tested] == [(2, 1.0), (4, 1.0), (8, 0.0)]
    assert run["pairs_held"] == 4
    assert {row["gap"] for row in tested} == {2 + 1 + 3}  # what local taps, a window of two and Canon can carry


def test_the_probe_holds_nothing_where_the_first_number_of_pairs_is_too_many():
    rows = recall(PROBE)
    assert [row["pairs"] for row in of(rows, "capacity")] == [2]
    assert of(rows, "capacity")[0]["accuracy"] < 0.5 and of(rows, "run")[0]["pairs_held"] == 0


def test_a_budget_halves_the_tokens_of_all_runs_alike(monkeypatch):
    monkeypatch.setattr(
        suites, "seconds_a_step", lambda config, task, practice, device: 1e-3 * practice.train.batch_tokens
    )
    wanted = dataclasses.replace(TINY, tokens=64 * 160)
    fitted = wanted.within(11.0)
    seconds = [
        sum(
            1e-3 * (lesson.practice.train.tokens + (lesson.tokens() - lesson.practice.train.tokens) / 3)
            for lesson in one.lessons()
        )
        for one in (fitted, dataclasses.replace(fitted, tokens=2 * fitted.tokens))
    ]
    assert seconds[0] <= 11.0 < seconds[1]
    assert wanted.tokens % fitted.tokens == 0 and fitted.tokens < wanted.tokens
    assert wanted.within(1e6) == wanted
    with pytest.raises(ValueError, match="a budget of 1 s is too short: 20 steps of every run, and their tests"):
        wanted.within(1.0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sizes": ("8,2",)}, "a size of copy is LENGTH, such as 64, not '8,2'"),
        ({"task": "mqar", "sizes": ("64",)}, "a size of mqar is LENGTH,PAIRS, such as 64,4, not '64'"),
        ({"sizes": ("7",)}, "an even length"),
        ({"mixers": ("rope", "rope")}, "'mixers' must be one or more, none twice"),
        ({"sizes": ("8", "8")}, "'sizes' must be one or more, none twice, not "),
        ({"factors": (2, 1)}, "'factors' must be whole numbers of 1 or more, increasing"),
        ({"rates": (0.0,)}, "'rates' must be positive"),
        ({"threshold": 0.0}, "'threshold' must be above 0"),
        ({"trials": 0}, "'trials' must be 1 or more, not 0"),
        ({"batch_tokens": 4}, "a batch of 4 tokens has no room for a row of 8"),
        ({"seeds": (-1,)}, "'seed' must be 0 or more"),
        ({"model": ("width",)}, "KEY=VALUE"),
        ({"model_preset": "huge"}, "no preset 'huge'"),
        (
            {"task": "capacity", "sizes": ("16",), "vocabulary": 64, "most_pairs": 8},
            "begins with 16 pairs and ends at 8",
        ),
        ({"task": "capacity", "sizes": ("4",), "vocabulary": 64, "most_pairs": 32}, "make it 66"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(changes, said, monkeypatch):
    monkeypatch.setattr(training.Learner, "__init__", None)
    with pytest.raises(ValueError, match=said):
        recall(dataclasses.replace(TINY, **changes))


def synthetic(mixer, rate, seed, held_out, test, tokens=None):
    about = {"task": "mqar", "size": "64,4", "mixer": mixer, "rate": rate, "run_seed": seed}
    spread = {"low": max(0.0, test - 0.1), "high": min(1.0, test + 0.1), "exact_accuracy": test}
    spread |= {"exact_low": spread["low"], "exact_high": spread["high"], "answers": 40, "trials": 10}
    curve = {"kind": "curve", "length": 64, "step": 5, "tokens": 500, "loss": None, "accuracy": held_out}
    tested = {"kind": "accuracy", "length": 128, "factor": 2, "accuracy": test} | spread
    run = {"kind": "run", "trained_tokens": 900, "tokens_to_99": tokens, "validation_accuracy": held_out}
    return [about | curve, about | tested, about | run | {"memory_bytes": 0}]


def test_the_best_rate_is_that_of_the_held_out_examples_and_all_are_told():
    rows = synthetic("rope", 1.0, 0, 0.5, 0.9) + synthetic("rope", 3.0, 0, 0.99, 0.7, tokens=500)
    assert [(group.rate, group.best) for group in groups(rows)] == [(1.0, False), (3.0, True)]
    shown = table(rows)
    assert shown.header == ["size, mixer", "tokens to 99%", "2×"]
    assert shown.rows == [
        ["64,4 rope × 1", "not in 900", "90.0% [80.0%, 100.0%] of 40"],
        ["64,4 rope × 3 *", "500", "70.0% [60.0%, 80.0%] of 40"],
    ]
    learning, length = figures(rows)
    assert [trace["y"] for trace in learning.data] == [[0.99]] and [trace["y"] for trace in length.data] == [[0.7]]
    assert learning.table.rows == [["rope", "500", "not finite", "99.0%"]]


def test_several_seeds_are_told_by_mean_and_range():
    rows = synthetic("rope", 1.0, 0, 0.9, 0.25, 300) + synthetic("rope", 1.0, 1, 0.9, 0.75)
    assert table(rows).rows == [["64,4 rope", "not in 900", "50.0% of 80 (25.0% to 75.0%, 2 seeds)"]]
    assert [trace["name"] for trace in figures(rows)[1].data] == ["rope, seed 0", "rope, seed 1"]


def test_the_command_prints_a_table_and_writes_rows_and_page(tmp_path, capsys, monkeypatch):
    out, page = tmp_path / "rows.jsonl", tmp_path / "recall.html"
    options = ["--task", "copy", "--sizes", "8", "--vocabulary", "6", "--mixers", "nope", "--model", "width=16"]
    options += ["--tokens", "128", "--batch-tokens", "64", "--factors", "1", "2", "--trials", "16"]
    command = ["eval", "recall", *options, "--out", str(out), "--page", str(page)]
    monkeypatch.setattr(sys, "argv", ["atma", *command])
    assert main(command) == 0
    told = capsys.readouterr().out
    assert "8 nope" in told and f"rows: {out}" in told and f"page: {page}" in told
    assert [row["kind"] for row in read_rows(out)] == ["curve", "accuracy", "accuracy", "run"]
    text = page.read_text()
    assert "Learning: copy 8" in text and "default-src 'none'" in text
    assert "atma eval recall --task copy --sizes 8 --vocabulary 6 --mixers nope --model width=16 --tokens 128" in text


def test_a_mistake_on_the_command_line_is_one_line(capsys):
    assert main(["eval", "recall", "--mixers", "spiral"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
