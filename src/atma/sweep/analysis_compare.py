"""Our contrasts beside the paper's: does what was found at 378M parameters and 1B tokens hold in a sweep of ours?

Both are read at the same multiple of the training length (the paper's longest needle stands at 32 times its 2,048).
Effects are in points of each sweep's own metric, so it is their signs that can agree, not their sizes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atma.sweep.contrasts import Effect
from atma.sweep.contrasts_words import read_contrasts
from atma.sweep.table import Table

PUBLISHED = (
    "memory where polar",
    "memory where nope",
    "memory where rope",
    "polar+memory - nope+memory",
    "polar+memory - rope+memory",
    "window where polar+memory",
    "distractor where polar+memory",
)
"""The contrasts that the paper reports of its stage I."""


@dataclass(frozen=True)
class Comparison:
    """One contrast in both sweeps; `reason` says why ours is None."""

    words: str
    published: Effect
    ours: Effect | None
    reason: str = ""

    @property
    def agree(self) -> bool | None:
        """Do both intervals lie on the same side of zero? None where one spans zero, or ours was not measured."""
        return self.ours.sign == self.published.sign if self.ours is not None and self.clear else None

    @property
    def clear(self) -> bool:
        """Do both intervals leave zero out?"""
        return self.ours is not None and self.ours.clear and self.published.clear

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        ours = None if self.ours is None else self.ours.as_dict()
        told = {"contrast": self.words, "signs_agree": self.agree, "both_clear": self.clear, "reason": self.reason}
        return told | {"published": self.published.as_dict(), "ours": ours}


def compare(
    ours: Table,
    published: Table,
    contrasts: Sequence[str] = PUBLISHED,
    family: str = "needle_token_acc",
    multiple: float | None = None,
) -> list[Comparison]:
    """Each contrast in both tables, at `multiple` times the training length (default: the longest both measured).

    ValueError where no multiple is in both, or where the published table itself cannot tell a contrast.
    """
    multiple = common_multiple(ours, published, family) if multiple is None else multiple
    metric, theirs = (table.metric(f"{family}@{multiple:g}x") for table in (ours, published))
    return [_compared(ours, metric, published, theirs, words) for words in contrasts]


def common_multiple(ours: Table, published: Table, family: str) -> float:
    """The longest multiple of the training length at which both tables have the metric. ValueError if there is none."""
    found = [{length / table.trained_length for length in table.family(family)} for table in (ours, published)]
    if not found[0] & found[1]:
        told = (", ".join(f"{multiple:g}x" for multiple in sorted(multiples)) or "nothing" for multiples in found)
        here, there = told
        raise ValueError(f"'{family}': {ours.name} has {here} and {published.name} {there}; measure a common multiple")
    return max(found[0] & found[1])


def _compared(ours: Table, metric: str, published: Table, theirs: str, words: str) -> Comparison:
    (known,) = read_contrasts(published, theirs, words)
    try:
        found = read_contrasts(ours, metric, words)
    except ValueError as error:
        return Comparison(words, known, None, str(error))
    if len(found) > 1:
        return Comparison(words, known, None, f"ours has {len(found) + 1} levels there; name two")
    if found[0].mean is None:
        return Comparison(words, known, None, "ours has no matched cells")
    return Comparison(words, known, found[0])
