"""What each change to the model is worth, in pairs: every document is read with and without it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atma.diagnose.reading import Reading
from atma.diagnose.texts import VALUE_TOKENS
from atma.statistics import mean_interval, says, student, wilson

Row = dict[str, Any]
UNCHANGED = "as it is"


class Estimate(NamedTuple):
    """A mean over documents with its Student interval; None where one document leaves nothing to estimate it from."""

    value: float
    low: float | None
    high: float | None

    @property
    def sure(self) -> bool:
        """Whether the interval excludes zero."""
        return says(self.low, self.high) != says(None, None)


def estimate(values: Sequence[float], of: int = 1) -> Estimate:
    """The mean of one value a document. All of `of` such intervals hold together with 95% (Bonferroni)."""
    x = np.asarray(values, dtype=np.float64)
    if x.size < 2:
        return Estimate(float(x.mean()), None, None)
    half = student(x.size - 1, 1 - 0.05 / of) * float(x.std(ddof=1)) / x.size**0.5
    return Estimate(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half)


def reading_rows(change: str, readings: Sequence[Reading], lengths: Sequence[int]) -> list[Row]:
    """Loss and recall of the records at each length, over documents."""
    rows: list[Row] = []
    for i, length in enumerate(lengths):
        losses = [reading.losses[i] for reading in readings]
        found = mean_interval(losses)
        row: Row = {"kind": "loss", "change": change, "length": length, "loss": found.value}
        row |= {"loss_low": found.t_low, "loss_high": found.t_high, "document_losses": losses}
        rows.append(row | {"documents": len(losses)})
    return rows + [_recall(change, readings, i, length) for i, length in enumerate(lengths)]


def far_rows(readings: Sequence[Reading], recent: Sequence[list[float]], lengths: Sequence[int]) -> list[Row]:
    """What far context is worth: of each length's last tokens, their loss where all before them is read, and where only
    the last tokens are, as many as the first length (`recent`, by document). Above zero, far context does harm.
    """
    rows: list[Row] = []
    for i, length in enumerate(lengths[1:], 1):
        ends = {"whole": [one.endings[i] for one in readings], "recent": [one[i] for one in recent]}
        value, low, high = estimate(
            differences := np.subtract(ends["whole"], ends["recent"]).tolist(), len(lengths) - 1
        )
        row: Row = {"kind": "far", "length": length, "window": lengths[0], "harm": value}
        row |= {"harm_low": low, "harm_high": high, "harm_values": differences, "documents": len(differences)}
        rows.append(row | {name: float(np.mean(values)) for name, values in ends.items()})
    return rows


def _recall(change: str, readings: Sequence[Reading], i: int, length: int) -> Row:
    right = [reading.right[i] for reading in readings]
    tokens, asked = sum(map(sum, right)), sum(map(len, right))
    outcomes = [int(count == VALUE_TOKENS) for document in right for count in document]
    row: Row = {"kind": "recall", "change": change, "length": length, "trials": asked, "outcomes": outcomes}
    for name, hits, of in (("token", tokens, asked * VALUE_TOKENS), ("exact", sum(outcomes), asked)):
        low, high = wilson(hits, of)
        row |= {f"{name}_accuracy": hits / of, f"{name}_low": low, f"{name}_high": high}
    row["document_accuracies"] = [sum(document) / len(document) / VALUE_TOKENS for document in right]
    row["document_nats"] = [float(np.mean(reading.nats[i])) for reading in readings]
    return row | {"cross_entropy": float(np.mean(row["document_nats"])), "documents": len(readings)}


def effect_rows(rows: Sequence[Row]) -> list[Row]:
    """Of every change and length, the differences from the unchanged model, with intervals.

    loss and recall_nats: nats with the change less nats without, so that below zero it helps; accuracy: share of the
    records' tokens with it less without. `family` counts changes and what each may do, to the loss and to accuracy: the
    intervals hold together for all of these.
    """
    found = {(row["kind"], row["change"], row["length"]): row for row in rows if row["kind"] in ("loss", "recall")}
    changes = list(dict.fromkeys(change for _, change, _ in found if change != UNCHANGED))
    lengths = list(dict.fromkeys(length for _, _, length in found))
    family = 2 * len(changes)
    made: list[Row] = []
    for change in changes:
        for length in lengths:
            row: Row = {"kind": "effect", "change": change, "length": length, "family": family}
            row |= {key: value for key, value in found["loss", change, length].items() if key in ABOUT}
            for name, kind, key in COMPARED:
                base, other = (found[kind, one, length][key] for one in (UNCHANGED, change))
                differences = np.subtract(other, base).tolist()
                value, low, high = estimate(differences, family)
                row |= {name: value, f"{name}_low": low, f"{name}_high": high, f"{name}_values": differences}
            made.append(row | {"documents": len(row["loss_values"])})
    return made


ABOUT = ("heads", "parts", "cap", "subject", "strength", "factor")
"""What the rows of a change tell of it."""
COMPARED = (
    ("loss", "loss", "document_losses"),
    ("recall_nats", "recall", "document_nats"),
    ("accuracy", "recall", "document_accuracies"),
)
