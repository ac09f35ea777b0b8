"""Two results side by side: what changed, by more than chance or not, and what explains it."""

import pytest

from atma.cli import main
from atma.eval.compare import compare, differences
from atma.eval.results import write_rows
from atma.statistics import mcnemar, sign_test

STAMP = {"weights_sha256": "a" * 64, "dtype": "float32", "threads": 1, "seed": 0}


def row(accuracy, outcomes=None, trials=4, key="k", **stamp):
    own = {"kind": "needle", "length": 64, "trials": trials, "accuracy": accuracy, "trials_sha256": "t" * 64}
    own |= {"outcomes": outcomes} if outcomes else {}
    about = {"suite": "retrieval", "measurement": {"length": 64, "trials": trials}, "key": key}
    return own | about | {"provenance": STAMP | stamp}


def test_equal_rows_are_counted_and_nothing_else_is_said():
    found = compare([row(0.5)], [row(0.5, threads=2)])
    assert found == ([], 1, [], [])


def test_a_change_is_explained_by_what_differs():
    [change] = compare([row(0.5)], [row(0.25, dtype="bfloat16")]).changes
    assert (change.metric, change.first, change.second) == ("accuracy", 0.5, 0.25)
    assert change.explained == ("dtype: float32 → bfloat16",)


def test_bounds_of_intervals_are_no_figures_of_their_own():
    first, second = (row(value) | {"accuracy_low": value - 0.1} for value in (0.5, 0.25))
    assert [change.metric for change in compare([first], [second]).changes] == ["accuracy"]


def test_rows_of_one_measurement_are_matched_by_their_place_and_not_by_their_order():
    positions = [row(0.1 * start, key="k") | {"kind": "position", "start": start} for start in (1, 2, 3)]
    assert compare(positions, positions[1:]) == ([], 2, ["retrieval position 64 1"], [])


def test_rows_that_are_no_rows_are_refused():
    with pytest.raises(ValueError, match="not a results file"):
        compare([row(0.5) | {"measurement": 3}], [row(0.5)])


def test_the_number_of_trials_is_no_other_measurement_but_an_explanation():
    [change] = compare([row(0.5)], [row(0.25, trials=8)]).changes
    assert change.explained == ("trials: 4 → 8",)


def test_hashes_are_shown_short_and_truncation_counts():
    assert differences(row(1.0), row(1.0, weights_sha256="b" * 64)) == ("weights_sha256: aaaaaaaa → bbbbbbbb",)
    truncated = row(1.0) | {"truncated_tokens": 9}
    assert differences(row(1.0) | {"truncated_tokens": 0}, truncated) == ("truncated_tokens: 0 → 9",)


def test_equal_trials_are_compared_in_pairs():
    first, second = row(0.75, [1, 1, 1, 0]), row(0.0, [0, 0, 0, 0], weights_sha256="b" * 64)
    [change] = compare([first], [second]).changes
    assert (change.chance, change.says) == ("3 : 0, p = 0.25", "undecided")


def test_what_is_said_of_a_difference_follows_its_test_and_belongs_to_the_figure_it_tests():
    first, second = row(0.0, [0] * 8) | {"cross_entropy": 2.0}, row(1.0, [1] * 8) | {"cross_entropy": 1.0}
    told = {change.metric: (change.chance, change.says) for change in compare([first], [second]).changes}
    assert told == {"accuracy": ("0 : 8, p = 0.0078", "higher"), "cross_entropy": ("", "")}
    losses = [row(0.5) | {"loss": sum(one) / 4, "document_losses": one} for one in ([1.0, 2, 3, 4], [1.1, 2, 3, 4.1])]
    assert [change.says for change in compare(losses[:1], losses[1:]).changes] == ["undecided"]
    lower = row(0.5) | {"loss": 2.25, "document_losses": [0.8, 1.7, 2.7, 3.8]}
    assert [change.says for change in compare(losses[:1], [lower]).changes] == ["lower"]


def test_other_trials_are_not():
    second = row(0.0, [0, 0, 0, 0]) | {"trials_sha256": "u" * 64}
    [change] = compare([row(0.75, [1, 1, 1, 0])], [second]).changes
    assert change.chance == "" and "trials_sha256: tttttttt → uuuuuuuu" in change.explained


def test_results_of_other_measurements_are_refused():
    other = row(0.5) | {"measurement": {"length": 128}}
    with pytest.raises(ValueError, match="no measurement in common"):
        compare([row(0.5)], [other])
    with pytest.raises(ValueError, match="a row without suite"):
        compare([{"kind": "needle"}], [row(0.5)])


def test_the_command_prints_changes_and_their_reasons(tmp_path, capsys):
    write_rows(tmp_path / "a.jsonl", [row(0.5)])
    write_rows(tmp_path / "b.jsonl", [row(0.25, dtype="bfloat16")])
    assert main(["eval", "diff", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    said = capsys.readouterr().out
    assert "1 changes: dtype: float32 → bfloat16" in said and "0 rows are equal" in said
    assert main(["eval", "diff", str(tmp_path / "a.jsonl"), str(tmp_path / "c.jsonl")]) == 2


def test_the_sign_test_and_mcnemar_are_binomial():
    assert sign_test(0, 0) == 1.0 and sign_test(5, 5) == 1.0
    assert sign_test(20, 0) == 2 / 2**20
    assert mcnemar([1, 1, 0, 0], [1, 0, 1, 1]) == (1, 2, 1.0)
    with pytest.raises(ValueError, match="equally long"):
        mcnemar([1], [1, 0])
