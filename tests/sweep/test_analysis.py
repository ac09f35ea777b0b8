"""Contrasts find what was planted, count what cannot be matched, and their intervals treat seeds as what they are."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atma.commands.sweep_analysis import analyse as analyse_command
from atma.sweep.analysis import analyse
from atma.sweep.contrasts import bootstrap, contrast, hashed, interactions, main_effects, sign_test
from atma.sweep.contrasts_words import read_contrasts
from atma.sweep.pareto import front, over_seeds, pareto, ranked
from atma.sweep.table import Cell, Table, table
from atma.sweep.table_reading import load_table
from tests.sweep.synthetic_sweep import write_sweep

M = "clean_nll_64"


def factorial(value: Callable[[str, bool, int, int], float], seeds: int = 1) -> Table:
    """Core × memory × taps × seed, with the metric a function of them."""
    cells = []
    for core, memory, taps, seed in itertools.product(
        ("nope", "polar", "rope"), (False, True), (2, 3, 4, 5), range(seeds)
    ):
        factors = {"core": core, "memory": memory, "taps": taps}
        cells.append(Cell(f"{core}{memory}{taps}{seed}", factors, seed, {M: value(core, memory, taps, seed)}))
    return table("factorial", cells)


def planted(core: str, memory: bool, taps: int, seed: int) -> float:
    """Memory gives 3, and 4 more on polar; taps and seeds only add."""
    return 0.1 * taps + 0.01 * seed + 3 * memory + 4 * (memory and core == "polar")


def rough(core: str, memory: bool, taps: int, seed: int) -> float:
    """The same with noise of each cell's own."""
    place = [("nope", "polar", "rope").index(core), int(memory), taps, seed]
    return planted(core, memory, taps, seed) + float(np.random.default_rng(place).normal())


def test_a_contrast_is_the_planted_difference_in_every_matched_pair():
    found = contrast(factorial(planted), M, {"memory": True}, {"memory": False}, {"core": ["polar"]})
    assert found.differences == pytest.approx([7.0] * 4, abs=1e-12)
    assert (found.positive, found.zero, found.negative, found.settings, found.unmatched) == (4, 0, 0, 4, 0)
    assert (found.mean, found.median, found.p) == (pytest.approx(7), pytest.approx(7), 0.125)


def test_a_contrast_across_cells_changes_several_factors_at_once():
    found = contrast(factorial(planted), M, {"core": "polar", "memory": True}, {"core": "rope", "memory": False})
    assert found.mean == pytest.approx(7)
    assert found.label == "polar +memory − rope no memory"


def test_a_pair_of_equal_values_is_a_tie_even_after_rounding():
    found = contrast(factorial(lambda c, m, t, s: 0.1 + 0.2 if m else 0.3), M, {"memory": True}, {"memory": False})
    assert (found.zero, found.p, found.mean) == (12, 1.0, 0.0)


def test_pairs_have_the_same_seed():
    found = contrast(factorial(planted, seeds=3), M, {"memory": True}, {"memory": False})
    assert len(found.differences) == 36
    assert found.settings == 12


def test_cells_without_partner_or_metric_are_counted_and_left_out():
    _, second, *others = factorial(planted).cells
    broken = table("broken", [dataclasses.replace(second, metrics={}), *others])
    found = contrast(broken, M, {"memory": True}, {"memory": False})
    assert len(found.differences) == 10
    assert found.unmatched == 3


def test_without_a_matched_pair_there_is_nothing_but_the_counts():
    lonely = table("lonely", [Cell("a", {"a": 0, "b": 0}, 0, {M: 1.0}), Cell("b", {"a": 1, "b": 1}, 0, {M: 2.0})])
    found = contrast(lonely, M, {"a": 1}, {"a": 0})
    assert (found.mean, found.low, found.p, found.unmatched) == (None, None, None, 2)
    assert json.dumps(found.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="no sign"):
        _ = found.sign


@pytest.mark.parametrize(
    ("more", "less", "words"),
    [
        ({"memory": True}, {"core": "rope"}, "the same factors"),
        ({"memory": True}, {"memory": True}, "change a level"),
        ({"memory": 2}, {"memory": False}, "no level '2'"),
        ({"depth": 2}, {"depth": 3}, "no factor 'depth'"),
    ],
)
def test_a_contrast_that_cannot_be_is_an_error(more, less, words):
    with pytest.raises(ValueError, match=words):
        contrast(factorial(planted), M, more, less)


def test_main_effects_compare_each_level_with_the_first():
    found = {effect.label: effect.mean for effect in main_effects(factorial(planted), M)}
    assert found == pytest.approx(
        {
            "core polar − nope": 2.0,
            "core rope − nope": 0.0,
            "memory on − off": 3 + 4 / 3,
            "taps 3 − 2": 0.1,
            "taps 4 − 2": 0.2,
            "taps 5 − 2": 0.3,
        }
    )


def test_interactions_are_differences_of_differences_and_exact_ties_where_effects_add():
    found = {effect.label: effect for effect in interactions(factorial(planted), M)}
    assert len(found) == 2 * 1 + 2 * 3 + 1 * 3
    planted_one = found.pop("(core polar − nope) × (memory on − off)")
    assert planted_one.differences == pytest.approx([4.0] * 4)
    assert all(effect.zero == len(effect.differences) > 0 for effect in found.values())


def test_seeds_that_repeat_a_setting_exactly_do_not_narrow_its_interval():
    one = contrast(factorial(lambda c, m, t, s: rough(c, m, t, 0)), M, {"memory": True}, {"memory": False})
    five = contrast(factorial(lambda c, m, t, s: rough(c, m, t, 0), 5), M, {"memory": True}, {"memory": False})
    assert len(five.differences) == 5 * len(one.differences)
    assert (five.low, five.high, five.p) == pytest.approx((one.low, one.high, one.p))


def test_a_lone_setting_takes_its_seeds_as_the_sample():
    where = {"core": ["polar"], "taps": [3]}
    found = contrast(factorial(rough, seeds=6), M, {"memory": True}, {"memory": False}, where)
    assert (found.settings, len(found.differences)) == (1, 6)
    assert found.low < found.mean < found.high


def test_one_pair_has_no_interval():
    where = {"core": ["polar"], "taps": [3]}
    found = contrast(factorial(rough), M, {"memory": True}, {"memory": False}, where)
    assert (found.low, found.high, found.clear) == (None, None, False)


def test_the_interval_is_that_of_the_normal_law_for_many_settings():
    x = np.random.default_rng(0).normal(size=400)
    low, high = bootstrap([[value] for value in x])
    assert low is not None and high is not None
    assert (high - low) / 2 == pytest.approx(1.96 * x.std() / 20, rel=0.05)
    assert (high + low) / 2 == pytest.approx(x.mean(), abs=0.01)


def test_the_hash_of_a_counter_is_even():
    counts = np.bincount(hashed(np.arange(1 << 16, dtype=np.uint32)) >> np.uint32(24), minlength=256)
    chi_squared = float(((counts - 256.0) ** 2 / 256).sum())
    assert 181 < chi_squared < 341  # 255 degrees of freedom: one in a thousand lies outside on either side


@pytest.mark.parametrize(
    ("positive", "zero", "negative", "p"),
    [(20, 0, 0, 2 / 2**20), (19, 1, 0, 2 / 2**19), (0, 5, 0, 1.0), (8, 0, 2, 112 / 1024), (3, 0, 3, 1.0)],
)
def test_the_sign_test_is_exact(positive, zero, negative, p):
    assert sign_test([1.0] * positive + [0.0] * zero + [-1.0] * negative) == p


@pytest.mark.parametrize(
    ("words", "labels"),
    [
        ("memory", ["memory on − off"]),
        ("core", ["core polar − nope", "core rope − nope"]),
        ("memory where core=polar", ["memory on − off where polar"]),
        ("memory where core=nope|rope + taps=3", ["memory on − off where taps=3 core=nope|rope"]),
        ("polar+memory - nope+memory", ["polar +memory − nope +memory"]),
        ("polar + memory − rope + no memory", ["polar +memory − rope no memory"]),
        ("taps=4 - taps=2 where memory", ["taps 4 − 2 where +memory"]),
        ("memory=on - memory=off", ["memory on − off"]),
    ],
)
def test_contrasts_are_read_from_words(words, labels):
    assert [effect.label for effect in read_contrasts(factorial(rough), M, words)] == labels


@pytest.mark.parametrize("levels", [(False, True), (0, 1), ("off", "on")])
@pytest.mark.parametrize("words", ["memory", "memory - no memory", "memory=on - memory=off"])
def test_on_and_off_are_read_however_a_table_writes_them(levels, words):
    switch = table("t", [Cell(str(level), {"memory": level}, 0, {M: i}) for i, level in enumerate(levels)])
    (found,) = read_contrasts(switch, M, words)
    assert (found.label, found.mean) == ("memory on − off", 1.0)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("speed", "write a factor"),
        ("polar+memory - linear+memory", "no factor has that level"),
        ("memory where core=linear", "no level 'linear'"),
        ("polar+core=rope - nope+memory", "names factor 'core' twice"),
        ("polar - ", "a side of a contrast is empty"),
    ],
)
def test_words_that_mean_nothing_are_an_error(words, error):
    with pytest.raises(ValueError, match=error):
        read_contrasts(factorial(rough), M, words)


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), min_size=1, max_size=12))
def test_the_front_is_what_no_other_dominates(points):
    on = front(np.array(points, dtype=float), [True, False])
    for i, (gain, cost) in enumerate(points):
        dominated = any(g >= gain and c <= cost and (g, c) != (gain, cost) for g, c in points)
        assert on[i] == (not dominated)


def test_a_cell_that_was_not_measured_is_not_on_the_front():
    assert front(np.array([[np.nan, 0.0], [1.0, 1.0]]), [True, False]).tolist() == [False, True]


@pytest.fixture
def sweep(tmp_path: Path):
    return load_table(write_sweep(tmp_path / "s"))


def test_leaders_are_settings_averaged_over_seeds_best_first(sweep):
    found = analyse(sweep, "clean_nll")
    values = [cell.metrics["clean_nll_16384"] for cell in found.leaders]
    assert len(values) == 12
    assert values == sorted(values)
    best = [cell for cell in sweep.cells if cell.factors == found.leaders[0].factors]
    assert values[0] == pytest.approx(sum(cell.metrics["clean_nll_16384"] for cell in best) / 2)
    assert found.leaders[0].name.endswith(", 2 seeds")


def test_the_front_of_a_sweep_holds_its_best_and_its_cheapest(sweep):
    settings = over_seeds(sweep)
    names = [cell.name for cell in pareto(settings, ["needle_token_acc", "train_seconds"])]
    assert ranked(settings.cells, "needle_token_acc_16384")[0].name == names[0]
    assert ranked(settings.cells, "train_seconds")[0].name == names[-1]


def test_an_analysis_of_a_subset_has_the_effects_that_vary_in_it(sweep):
    found = analyse(sweep, where="attention=polar|rope", contrasts=["memory where polar"])
    labels = [effect.label for effect in found.effects]
    assert labels == ["attention rope − polar", "memory on − off", "window 64 − none"]
    assert found.contrasts[0].label == "memory on − off where polar"
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["cells"] == 16


def test_a_subset_where_the_metric_was_not_measured_is_an_error(sweep):
    for cell in sweep.cells:
        if cell.factors["attention"] == "rope":
            del cell.metrics["clean_nll_256"]
    with pytest.raises(ValueError, match="no cell where rope has the metric clean_nll_256"):
        analyse(sweep, "clean_nll_256", "rope")


def test_the_command_prints_tables_and_writes_the_same_figures(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder, out = write_sweep(tmp_path / "s"), tmp_path / "new" / "analysis.json"
    analyse_command(folder, contrast=("polar+memory - nope+memory",), json=out)
    told = capsys.readouterr().out
    written = json.loads(out.read_text())
    assert f"{written['contrasts'][0]['mean']:+.2f}" in told
    assert len(written["effects"]) == 4
    for title in ("Leaders of 12", "Main effects", "Interactions", "Front of", "8 in 4"):
        assert title in told


def test_the_command_judges_by_either_loss_at_an_equal_budget(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = write_sweep(tmp_path)
    analyse_command(folder, budget="seconds")
    assert "judged by validation_loss_at_2.5_seconds" in capsys.readouterr().out
    analyse_command(folder, budget="tokens", metric="train_loss")
    assert "judged by train_loss_at_10000_tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--metric params: at an equal --budget"):
        analyse_command(folder, budget="tokens", metric="params")


def test_the_command_puts_the_contrasts_of_another_table_beside_ours(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    folder = write_sweep(tmp_path / "s")
    paper = tmp_path / "paper.csv"
    points = itertools.product(("polar", "nope", "rope"), (0, 1), (0, 1), (0, 1))
    rows = [f"{c},{m},{d},{w},{1 + 9 * m * (c == 'polar') - d - w},{5 * m - d - w}" for c, m, d, w in points]
    head = "attention,memory,distractor,window,needle_token_acc_100,needle_token_acc_400"
    paper.write_text("\n".join([head, *rows]) + "\n")
    analyse_command(folder, published=paper, json=tmp_path / "out.json")
    told = json.loads((tmp_path / "out.json").read_text())["published"]
    assert "Beside the paper" in capsys.readouterr().out
    assert [row["signs_agree"] for row in told if row["contrast"] == "memory where polar"] == [True]
    assert [row["ours"] for row in told if row["contrast"].startswith("distractor")] == [None]
