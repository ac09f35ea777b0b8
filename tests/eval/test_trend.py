"""Trends against enumeration, against tables, and on losses made to fall, rise, stay, and turn."""

import itertools

import numpy as np
import pytest

from atma.eval.likelihood.trend import randomised, ranks, rejected, signed_ranks, trend

LENGTHS = [256, 512, 1024, 2048, 4096]


def made(curve, documents=12, noise=0.02, seed=0):
    """Losses (documents, lengths) about a curve, each document at a level of its own."""
    rng = np.random.default_rng(seed)
    return np.asarray(curve) + rng.normal(1, 0.3, (documents, 1)) + noise * rng.normal(size=(documents, len(curve)))


@pytest.mark.parametrize("values", [[3], [1, -2, 4], [5, 5, -5, 1, 0], [2, -4, 6, 6, -10, 2]])
def test_chances_are_those_of_every_choice_of_signs(values):
    sums = [np.dot(signs, np.abs(values)) for signs in itertools.product([-1, 1], repeat=len(values))]
    found = randomised(np.array(values))
    assert found.low == pytest.approx(np.mean([s <= sum(values) for s in sums]))
    assert found.high == pytest.approx(np.mean([s >= sum(values) for s in sums]))


def test_nothing_but_zeros_says_nothing():
    assert randomised(np.zeros(5, dtype=int)) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("documents", "rank_sum", "p"), [(5, 0, 0.0312), (8, 3, 0.0195), (10, 8, 0.0244), (15, 25, 0.0240)]
)
def test_signed_ranks_agree_with_the_tables_of_wilcoxon(documents, rank_sum, p):
    """P(rank sum <= T) of the published tables."""
    signs, left = np.ones(documents), rank_sum
    for rank in range(documents, 0, -1):
        if rank <= left:
            signs[rank - 1], left = -1, left - rank
    assert left == 0
    found = randomised(signed_ranks(signs * np.arange(1, documents + 1) / 7))
    assert found.high == pytest.approx(p, abs=1e-4)


def test_equal_sizes_share_their_ranks_and_zeros_are_dropped():
    assert signed_ranks(np.array([0.5, -0.5, 0.0, 2.0])).tolist() == [3, -3, 6]


def test_ranks_are_spearmans_correlation_and_pages_statistic():
    y = np.random.default_rng(1).normal(size=(6, 5))
    order = y.argsort(1).argsort(1) + 1
    k = 5
    page = (order * np.arange(1, k + 1)).sum()
    assert ranks(y).sum() == 4 * page - 6 * k * (k + 1) ** 2
    for row, own in zip(order, ranks(y), strict=True):
        assert own / (k * (k * k - 1) / 3) == pytest.approx(np.corrcoef(row, np.arange(k))[0, 1])


def test_equal_losses_share_ranks():
    assert ranks(np.array([[1.0, 1.0, 1.0]])).tolist() == [0]
    assert ranks(np.array([[3.0, 1.0, 1.0]])).tolist() == [-2 * 2 - 1 * 2]


def test_holm_rejects_in_order_until_one_fails():
    assert rejected([0.04, 0.01, 0.03, 0.005]) == [False, True, False, True]
    assert rejected([]) == []


@pytest.mark.parametrize(
    ("curve", "verdict"),
    [
        ([0.4, 0.3, 0.2, 0.1, 0.0], "falls"),
        ([0.0, 0.1, 0.2, 0.3, 0.4], "rises"),
        ([0.4, 0.2, 0.0, 0.0, 0.0], "falls"),
        ([0.4, 0.1, 0.0, 0.0, 0.3], "undecided"),
    ],
)
def test_the_verdict_is_that_of_the_curve(curve, verdict):
    assert trend(made(curve), LENGTHS, 0.01).verdict == verdict


def test_a_turn_is_told_with_its_length():
    found = trend(made([0.4, 0.3, 0.0, 0.0, 0.2]), LENGTHS, 0.01)
    assert found.verdict == "undecided" and found.rises_at == (4096,) and found.p_falls < 0.025


def test_flat_needs_intervals_within_the_margin_and_noise_is_undecided():
    assert trend(made([0.0] * 5, noise=0.001), LENGTHS, 0.01).verdict == "flat"
    assert trend(made([0.0] * 5, noise=0.1), LENGTHS, 0.01).verdict == "undecided"


@pytest.mark.parametrize("documents", [1, 2, 5])
def test_few_documents_decide_nothing_however_clear(documents):
    assert trend(made([0.4, 0.3, 0.2, 0.1, 0.0], documents), LENGTHS, 0.01).verdict == "undecided"


def test_ranks_alone_are_no_trend_where_the_slope_may_be_the_other_way():
    """One document of thirteen rises by far more than the others fall."""
    losses = made([0.4, 0.3, 0.2, 0.1, 0.0], 13, noise=0.0)
    losses[0] += np.arange(5)
    found = trend(losses, LENGTHS, 0.01)
    assert found.p_falls < 0.025 and found.slope.t_low < 0 < found.slope.t_high
    assert found.verdict == "undecided"


def test_slopes_and_changes_are_those_of_the_curve():
    found = trend(made([0.4, 0.3, 0.2, 0.1, 0.0], noise=0), LENGTHS, 0.01)
    assert found.slope.value == pytest.approx(-0.1) and found.change.value == pytest.approx(-0.4)
    assert found.spearman == pytest.approx(-1) and found.p_falls == pytest.approx(2.0**-12)


def test_wandering_losses_are_called_falling_no_oftener_than_the_level():
    """Random walks, whose steps are anything but exchangeable: 400 draws, one-sided 2.5%, three standard deviations."""
    rng = np.random.default_rng(5)
    falls = [trend(rng.normal(size=(8, 5)).cumsum(1), LENGTHS, 0.01).verdict == "falls" for _ in range(400)]
    assert sum(falls) <= 400 * 0.025 + 3 * np.sqrt(400 * 0.025 * 0.975)


def test_a_loss_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        trend(np.array([[1.0, np.nan]]), [1, 2], 0.01)
