"""Does the loss fall with length? Tests over documents, exact for any number of them, and a verdict in one word.

Nothing is assumed of the losses within a document: its lengths share text, so they are not independent, and not
exchangeable either. Each document gives one number, and under the hypothesis that length changes nothing its sign is
as likely plus as minus. So every test here is a randomisation of signs (Fisher 1935, Pitman 1937), computed exactly.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from atma.statistics import Interval, last_minus_first, says, slope, student_95

LEVEL = 0.05


class Signs(NamedTuple):
    """How likely random signs make a sum as low as the one found, or as high."""

    low: float
    high: float


class Trend(NamedTuple):
    """Of losses (documents, lengths): how they go with length, and the verdict with what it rests on."""

    slope: Interval
    """Per doubling of length."""
    change: Interval
    """From the first length to the last."""
    spearman: float
    """Mean over documents of the rank correlation of loss and length: -1 where every step of every document falls."""
    p_falls: float
    p_rises: float
    rises_at: tuple[int, ...]
    """Lengths at which the loss is higher than at the length before, by more than chance."""
    verdict: str


def trend(losses: np.ndarray, lengths: Sequence[int], margin: float) -> Trend:
    """The verdict is one of four words, at 5%.

    "falls": the ranks fall with length (`ranks`), the 95% Student interval of the slope lies below zero, and no single
    step rises. "rises": the same upwards. "flat": every step's 95% Student interval lies within ±`margin` per doubling.
    "undecided": anything else, such as too few documents, or a loss that falls first and rises then. Steps are
    Wilcoxon's signed-rank tests (1945), together at 5% by Holm's method (1979). ValueError: fewer than two lengths, or
    a loss that is not finite.
    """
    y = np.asarray(losses, dtype=np.float64)
    slopes = slope(y, lengths)
    if not np.isfinite(y).all():
        raise ValueError("a trend needs finite losses; check the model's weights")
    own = ranks(y)
    signs = randomised(own)
    steps = [signed_ranks(step) for step in np.diff(y, axis=1).T]
    up, down = ([randomised(step)[side] for step in steps] for side in (1, 0))
    rises, falls = rejected(up), rejected(down)
    slopes_say = says(slopes.t_low, slopes.t_high, "falls", "rises")
    if slopes_say == "falls" and signs.low < LEVEL / 2 and not any(rises):
        verdict = "falls"
    elif slopes_say == "rises" and signs.high < LEVEL / 2 and not any(falls):
        verdict = "rises"
    else:
        verdict = "flat" if _flat(y, lengths, margin) else "undecided"
    k = y.shape[1]
    spearman = float(own.mean()) / (k * (k * k - 1) / 3)
    where = tuple(length for length, rise in zip(lengths[1:], rises, strict=True) if rise)
    return Trend(slopes, last_minus_first(y), spearman, signs.low, signs.high, where, verdict)


def ranks(losses: np.ndarray) -> np.ndarray:
    """Of losses (documents, lengths), each document's Σ (2j - k - 1)·(2·rank - k - 1), int64; ties share ranks.

    Without equal losses that is Spearman's rank correlation with the length times k·(k² - 1)/3. Their sum is the
    statistic of Page's trend test (1963), less its mean, times four.
    """
    k = losses.shape[1]
    below = (losses[:, :, None] > losses[:, None, :]).sum(2)
    equal = (losses[:, :, None] == losses[:, None, :]).sum(2)
    doubled = 2 * below + equal + 1
    return (doubled - k - 1) @ (2 * np.arange(1, k + 1) - k - 1)


def signed_ranks(differences: np.ndarray) -> np.ndarray:
    """Twice the rank of each difference's size, with its sign; ties share ranks, differences of 0 are dropped."""
    x = differences[differences != 0]
    size = np.abs(x)
    doubled = 2 * (size[:, None] > size[None, :]).sum(1) + (size[:, None] == size[None, :]).sum(1) + 1
    return np.sign(x).astype(np.int64) * doubled


def randomised(values: np.ndarray) -> Signs:
    """P(sum <= found) and P(sum >= found) if the sign of each of these integers were a fair coin's, exactly."""
    sizes = np.abs(np.asarray(values, dtype=np.int64))
    sizes = sizes[sizes > 0]
    shared = math.gcd(*sizes.tolist()) if sizes.size else 1
    sizes, found = sizes // shared, int(np.sum(values)) // shared
    total = int(sizes.sum())
    chances = np.ones(1)
    for size in sizes.tolist():  # of the sum of those with a plus
        wider = np.zeros(len(chances) + size)
        wider[: len(chances)] += chances / 2
        wider[size:] += chances / 2
        chances = wider
    plus = (found + total) // 2
    return Signs(float(min(1.0, chances[: plus + 1].sum())), float(min(1.0, chances[plus:].sum())))


def rejected(p_values: Sequence[float], level: float = LEVEL) -> list[bool]:
    """Which of several hypotheses Holm's method rejects, so that any false rejection has at most this chance."""
    verdicts = [False] * len(p_values)
    for done, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > level / (len(p_values) - done):
            break
        verdicts[i] = True
    return verdicts


def _flat(losses: np.ndarray, lengths: Sequence[int], margin: float) -> bool:
    """Whether every step's interval lies within the margin."""
    if len(losses) < 2:
        return False
    quantile = student_95(len(losses) - 1)
    for j, (before, after) in enumerate(itertools.pairwise(lengths)):
        step = (losses[:, j + 1] - losses[:, j]) / math.log2(after / before)
        half = quantile * float(step.std(ddof=1)) / math.sqrt(len(step))
        if abs(float(step.mean())) + half > margin:
            return False
    return True
