"""Intervals against values known from tables and by hand."""

import numpy as np
import pytest

from atma.statistics import last_minus_first, mean_interval, says, share_text, slope, student_95, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_agrees_with_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(-1, 5), (6, 5), (0, 0)])
def test_wilson_refuses_impossible_counts(successes, trials):
    with pytest.raises(ValueError, match=f"{successes} of {trials}"):
        wilson(successes, trials)


@pytest.mark.parametrize(
    ("degrees", "t"), [(1, 12.7062), (2, 4.30265), (3, 3.18245), (7, 2.36462), (8, 2.30600), (30, 2.04227)]
)
def test_student_quantiles_agree_with_the_tables(degrees, t):
    assert student_95(degrees) == pytest.approx(t, rel=5e-6)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.1, 0.2, "higher"),
        (-0.2, -0.1, "lower"),
        (-0.1, 0.2, "undecided"),
        (0.0, 0.2, "undecided"),
        (-0.2, 0.0, "undecided"),
        (None, None, "undecided"),
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_the_word_for_a_difference_follows_its_interval(low, high, word):
    assert says(low, high) == word


def test_a_mean_lies_inside_both_intervals_and_the_student_one_is_its_formula():
    found = mean_interval([1.0, 2.0, 3.0, 4.0, 10.0])
    assert found.value == 4.0
    assert found.low < 4.0 < found.high
    half = 2.776445 * np.std([1, 2, 3, 4, 10], ddof=1) / np.sqrt(5)
    assert (found.t_low, found.t_high) == pytest.approx((4 - half, 4 + half), rel=1e-6)


def test_the_bootstrap_covers_what_a_normal_interval_covers_for_many_values():
    x = np.random.default_rng(0).normal(size=300)
    found = mean_interval(x)
    half = 1.96 * x.std(ddof=1) / np.sqrt(300)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_the_bootstrap_is_the_same_every_time_and_differs_by_seed():
    x = np.random.default_rng(0).normal(size=12)
    assert mean_interval(x, 1) == mean_interval(x, 1)
    assert mean_interval(x, 1) != mean_interval(x, 2)


def test_one_value_has_no_interval():
    assert mean_interval([2.0]) == (2.0, None, None, None, None)


def test_a_slope_is_nats_per_doubling_whatever_the_height_of_each_document():
    heights = np.array([[1.0], [5.0], [2.0]])
    losses = heights + np.array([[0.0, -0.25, -0.5, -0.75]])
    found = slope(losses, [256, 512, 1024, 2048])
    assert found == pytest.approx((-0.25,) * 5, abs=1e-12)


def test_the_change_is_the_last_length_minus_the_first():
    assert last_minus_first(np.array([[1.0, 9.0, 3.0], [2.0, 9.0, 2.0]])).value == 1.0


def test_a_slope_needs_two_lengths():
    with pytest.raises(ValueError, match="two lengths"):
        slope(np.ones((3, 1)), [256])


def test_a_share_is_told_with_its_interval_and_number():
    row = {"exact_accuracy": 1.0, "exact_low": 0.342, "exact_high": 1.0}
    assert share_text(row, "exact_accuracy", "exact_", 2) == "100% [34%, 100%] of 2"
    assert share_text(row | {"exact_low": None}, "exact_accuracy", "exact_", 2, 1) == "100.0% of 2"
