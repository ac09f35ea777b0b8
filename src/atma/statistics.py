"""Intervals for results: Wilson for proportions, paired bootstrap and Student for means and slopes over documents.

Documents are the unit of sampling: the tokens of one document are not independent, so no interval here counts tokens.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

NORMAL_95 = 1.959963984540054
RESAMPLES = 10_000
DRAWS = 1 << 20
"""Of these, documents drawn at once."""


class Interval(NamedTuple):
    """A mean with two 95% intervals; the bounds are None where one value leaves nothing to estimate them from."""

    value: float
    low: float | None
    high: float | None
    t_low: float | None
    t_high: float | None


def says(
    low: float | None, high: float | None, below: str = "lower", above: str = "higher", within: str = "undecided"
) -> str:
    """What the interval of a difference says, in a word: `above` where all of it is above zero, `below` where all of it
    is below, else `within`, and so without an interval. The sign of a difference alone says nothing.
    """
    if low is None or high is None or not (low > 0 or high < 0):
        return within
    return above if low > 0 else below


def wilson(successes: float, trials: int, z: float = NORMAL_95) -> tuple[float, float]:
    """Wilson score interval (low, high) of a proportion, by default 95%. Source: Wilson 1927."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"wilson needs 0 <= successes <= trials and a trial, not {successes} of {trials}")
    p, scale = successes / trials, 1 + z * z / trials
    centre = (p + z * z / (2 * trials)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    low = 0.0 if successes == 0 else centre - half
    return low, 1.0 if successes == trials else centre + half


def proportion(name: str, prefix: str, successes: float, trials: int) -> dict[str, float]:
    """The share of successes as `name` of a row, with its Wilson 95% interval as `low` and `high` after the prefix."""
    low, high = wilson(successes, trials)
    return {name: successes / trials, f"{prefix}low": low, f"{prefix}high": high}


def share_text(row: Mapping[str, Any], name: str, prefix: str, of: int, digits: int = 0) -> str:
    """A share of a row (`proportion`) as every table has it, with interval and number: "88% [53%, 98%] of 8"."""
    value, low, high = (row[key] for key in (name, f"{prefix}low", f"{prefix}high"))
    interval = "" if low is None or high is None else f" [{low:.{digits}%}, {high:.{digits}%}]"
    return f"{value:.{digits}%}{interval} of {of:,}"


def mean_interval(values: Sequence[float] | np.ndarray, seed: int = 0) -> Interval:
    """Mean of one value a document, with its percentile bootstrap (seeded) and its Student interval, both 95%.

    The bootstrap is a little narrow for fewer than about ten documents; the Student interval is then the safer one.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or x.size == 0:
        raise ValueError(f"an interval needs one value a document and a document, not shape {x.shape}")
    mean = float(x.mean())
    if x.size == 1:
        return Interval(mean, None, None, None, None)
    low, high = np.percentile(_resampled_means(x, seed), [2.5, 97.5])
    half = student_95(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(mean, float(low), float(high), mean - half, mean + half)


def _resampled_means(x: np.ndarray, seed: int) -> np.ndarray:
    """Means (RESAMPLES,) of documents drawn with replacement, a bounded number of draws in memory."""
    rng, rows = np.random.default_rng(seed), max(1, DRAWS // x.size)
    blocks = [min(rows, RESAMPLES - start) for start in range(0, RESAMPLES, rows)]
    return np.concatenate([x[rng.integers(0, x.size, (count, x.size))].mean(1) for count in blocks])


def slope(losses: np.ndarray, lengths: Sequence[int], seed: int = 0) -> Interval:
    """Nats per doubling of length: the mean over documents of each one's least-squares slope on log2(length).

    losses (documents, lengths). A resampled document keeps all its lengths, so the bootstrap is paired.
    """
    y, x = np.asarray(losses, dtype=np.float64), np.log2(np.asarray(lengths, dtype=np.float64))
    if y.ndim != 2 or y.shape[1] != x.size or x.size < 2:
        raise ValueError(f"a slope needs losses (documents, lengths) at two lengths or more, not {y.shape} at {x.size}")
    centred = x - x.mean()
    return mean_interval(y @ centred / (centred @ centred), seed)


def last_minus_first(losses: np.ndarray, seed: int = 0) -> Interval:
    """Change of loss from the first length to the last, paired by document. losses (documents, lengths)."""
    y = np.asarray(losses, dtype=np.float64)
    return mean_interval(y[:, -1] - y[:, 0], seed)


def interval_row(name: str, found: Interval) -> dict[str, float | None]:
    """An interval as the fields of a row."""
    row = {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return row | {f"{name}_t_low": found.t_low, f"{name}_t_high": found.t_high}


def mean_row(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """The mean of one value a document, with its intervals, as the fields of a row."""
    return interval_row(name, mean_interval(values))


def student_95(degrees: int) -> float:
    """The t with P(|T| <= t) = 0.95."""
    return student(degrees, 0.95)


def student(degrees: int, level: float) -> float:
    """The t with P(|T| <= t) = level. Source: closed form for whole degrees, Abramowitz and Stegun 26.7.3, 26.7.4."""
    if degrees < 1:
        raise ValueError(f"Student's t needs at least 1 degree of freedom, not {degrees}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        angle = (low + high) / 2
        low, high = (angle, high) if _student_within(angle, degrees) < level else (low, angle)
    return math.sqrt(degrees) * math.tan(low)


def _student_within(angle: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) · tan(angle))."""
    odd = degrees % 2
    term, total = math.cos(angle) if odd else 1.0, 0.0
    for k in range(2 + odd, degrees + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (k - 1) / k
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


class Paired(NamedTuple):
    """Two models on the same trials: trials that only the first and only the second got right, and McNemar's p."""

    only_first: int
    only_second: int
    p: float


def mcnemar(first: Sequence[bool | int], second: Sequence[bool | int]) -> Paired:
    """Exact two-sided test that two models are right equally often, on the trials where they differ. McNemar 1947."""
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired trials need two equally long lists, not shapes {a.shape} and {b.shape}")
    only_first, only_second = int((a & ~b).sum()), int((b & ~a).sum())
    return Paired(only_first, only_second, sign_test(only_first, only_second))


def sign_test(positive: int, negative: int) -> float:
    """Exact two-sided p of so many against so many under equal chances, ties left out; 1 where there is nothing."""
    n, fewer = positive + negative, min(positive, negative)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
