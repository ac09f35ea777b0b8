"""Two results files side by side: what changed, whether by more than chance, and what recorded difference explains it.

Rows are matched by what was measured, whatever it was measured with. A change is explained by the things that differ
between two rows among all that is recorded: weights, tokenizer, prompts, data, code, dtype, device, backend, threads,
batch, seed, truncation. Where nothing recorded differs, nothing but noise does, and that is said.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atma.eval.statistics import mcnemar, mean_interval

Row = dict[str, Any]
SIZES = ("trials", "documents")
"""Of a measurement's description, what says how often and not what."""
PLACE = ("kind", "measure", "task", "filter", "length", "start", "end", "depth")
"""What tells the rows of one measurement apart. Those that it does not are matched in their order."""
PAIRED = {"outcomes": "outcomes", "document_losses": "losses"}
"""Lists with one value a trial or a document: what pairs two rows, if both are of the same trials."""


class Change(NamedTuple):
    """One figure that two rows share: its values, and whether they differ by more than chance (None: unknown)."""

    row: str
    metric: str
    first: float
    second: float
    chance: str
    """The paired test where there is one: McNemar's p, or a 95% interval of the mean difference; else empty."""
    explained: tuple[str, ...]
    """What differs: "dtype: float32 → bfloat16"; empty if nothing recorded does."""


class Comparison(NamedTuple):
    """Of two results: figures that changed, how many rows agree to the last digit, and rows that only one has."""

    changes: list[Change]
    equal: int
    only_first: list[str]
    only_second: list[str]


def compare(first: Sequence[Row], second: Sequence[Row]) -> Comparison:
    """Match the rows of two results. ValueError: no row of one is in the other, or rows without a measurement."""
    ours, theirs = _by_identity(first), _by_identity(second)
    shared = [identity for identity in ours if identity in theirs]
    if not shared:
        raise ValueError("the two results have no measurement in common; compare files of the same suite and options")
    changes: list[Change] = []
    equal = 0
    for identity in shared:
        found = _changes(identity, ours[identity], theirs[identity])
        changes += found
        equal += not found
    alone = [[x for x in one if x not in other] for one, other in ((ours, theirs), (theirs, ours))]
    return Comparison(changes, equal, alone[0], alone[1])


def differences(first: Row, second: Row) -> tuple[str, ...]:
    """What is recorded of how two rows were made and differs, as "name: one → other"; hashes in eight digits."""
    one, other = _circumstances(first), _circumstances(second)
    names = [*one, *(name for name in other if name not in one)]
    return tuple(
        f"{name}: {_short(one.get(name))} → {_short(other.get(name))}"
        for name in names
        if one.get(name) != other.get(name)
    )


def _changes(identity: str, first: Row, second: Row) -> list[Change]:
    explained = differences(first, second)
    chance = _chance(first, second)
    return [
        Change(identity, name, first[name], second[name], chance, explained)
        for name in _metrics(first)
        if name in _metrics(second) and first[name] != second[name]
    ]


def _chance(first: Row, second: Row) -> str:
    """The paired test of two rows of the same trials, if both tell them."""
    for field in PAIRED:
        one, other = first.get(field), second.get(field)
        if one is None or other is None or len(one) != len(other) or _trials(first) != _trials(second):
            continue
        if field == "outcomes":
            found = mcnemar(one, other)
            return f"{found.only_first} only first, {found.only_second} only second, McNemar p = {found.p:.3g}"
        interval = mean_interval(np.subtract(other, one))
        if interval.low is not None:
            return f"paired mean {interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    return ""


def _trials(row: Row) -> object:
    """What tells whether two rows are of the same trials: their own hash, else that of the data and the seed."""
    stamp = row["provenance"]
    return row.get("trials_sha256") or (stamp.get("data_hash"), stamp.get("seed"))


def _by_identity(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by what they measure. Of several with one identity (other weights, say) the last counts."""
    found: dict[str, Row] = {}
    counts: dict[tuple[str, str, str], int] = {}
    for row in rows:
        known = {"suite": str, "measurement": dict, "provenance": dict, "key": str}
        if not all(isinstance(row.get(name), kind) for name, kind in known.items()):
            raise ValueError("a row without suite, measurement, provenance and key: not a results file of atma eval")
        spec = {name: value for name, value in row["measurement"].items() if name not in SIZES}
        what = f"{row['suite']} {json.dumps(spec, sort_keys=True)}"
        label = " ".join(str(row[name]) for name in PLACE if name in row)
        place = what, row["key"], label
        index = counts[place] = counts.get(place, -1) + 1
        found[f"{row['suite']} {label} {_flat(spec)} #{index}"] = row
    return found


def _flat(spec: Row) -> str:
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(spec.items()))


def _circumstances(row: Row) -> Row:
    own = {
        name: value for name, value in row.items() if name.endswith("_sha256") or name in (*SIZES, "truncated_tokens")
    }
    return row["provenance"] | own


def _metrics(row: Row) -> list[str]:
    """Names of a row's figures: its fractions, and no counts, settings or bounds of intervals."""
    return [name for name, value in row.items() if isinstance(value, float) and not name.endswith(("_low", "_high"))]


def _short(value: object) -> str:
    text = str(value)
    return text[:8] if len(text) == 64 else text
