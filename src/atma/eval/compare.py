"""Two results files side by side: what changed, whether by more than chance, and what recorded difference explains it.

Rows are matched by what was measured, whatever it was measured with. A change is explained by the things that differ
between two rows among all that is recorded: weights, tokenizer, prompts, data, code, dtype, device, backend, threads,
batch, seed, truncation. Where nothing recorded differs, nothing but noise does, and that is said.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from atma.statistics import mcnemar, mean_interval, says

Row = dict[str, Any]
SIZES = ("trials", "documents")
"""Of a measurement's description, what says how often and not what."""
PLACE = ("kind", "measure", "task", "filter", "length", "start", "end", "depth")
"""What tells the rows of one measurement apart. Those that it does not are matched in their order."""
PAIRED = ("outcomes", "document_losses")
"""Lists with one value a trial or a document: what pairs two rows, if both are of the same trials."""
LEVEL = 0.05
"""Of McNemar's p: at or above it two models are not told apart."""


class Change(NamedTuple):
    """One figure that two rows share: its values, and whether they differ by more than chance (None: unknown)."""

    row: str
    metric: str
    first: float
    second: float
    chance: str
    """The paired test where there is one, else empty: the 95% interval of the mean difference over documents, or how
    many trials only the first and only the second got right, with McNemar's p."""
    says: str
    """What that test says of the second: "higher", "lower" or "undecided"; empty without a test."""
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
    ours, theirs = _by_place(first), _by_place(second)
    shared, names = [place for place in ours if place in theirs], _names([*ours, *theirs])
    if not shared:
        raise ValueError("the two results have no measurement in common; compare files of the same suite and options")
    changes: list[Change] = []
    equal = 0
    for place in shared:
        found = _changes(names[place], ours[place], theirs[place])
        changes += found
        equal += not found
    alone = [[names[x] for x in one if x not in other] for one, other in ((ours, theirs), (theirs, ours))]
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


def _changes(name: str, first: Row, second: Row) -> list[Change]:
    explained = differences(first, second)
    return [
        Change(name, metric, first[metric], second[metric], *_chance(metric, first, second), explained)
        for metric in _metrics(first)
        if metric in _metrics(second) and first[metric] != second[metric]
    ]


def _chance(metric: str, first: Row, second: Row) -> tuple[str, str]:
    """The paired test of a figure and its word, if it is the mean of what two rows tell of the same trials."""
    for field in PAIRED:
        one, other = first.get(field), second.get(field)
        if not one or not other or len(one) != len(other) or _trials(first) != _trials(second):
            continue
        if not np.allclose((np.mean(one), np.mean(other)), (first[metric], second[metric]), rtol=1e-6, atol=1e-9):
            continue
        if field == "outcomes":
            found = mcnemar(one, other)
            sure = found.only_second - found.only_first if found.p < LEVEL else 0
            return f"{found.only_first} : {found.only_second}, p = {found.p:.2g}", says(sure, sure)
        interval = mean_interval(np.subtract(other, one))
        if interval.low is not None:
            return f"[{interval.low:+.4f}, {interval.high:+.4f}]", says(interval.low, interval.high)
    return "", ""


def _trials(row: Row) -> object:
    """What tells whether two rows are of the same trials: their own hash, else that of the data and the seed."""
    stamp = row["provenance"]
    return row.get("trials_sha256") or (stamp.get("data_hash"), stamp.get("seed"))


class _Place(NamedTuple):
    """What a row measures, whatever it was measured with."""

    suite: str
    label: str
    spec: tuple[tuple[str, str], ...]
    """The measurement's description, names and JSON."""
    index: int
    """Among the rows of one measurement that nothing else tells apart."""


def _by_place(rows: Sequence[Row]) -> dict[_Place, Row]:
    """Rows by what they measure. Of several at one place (of other weights, say) the last counts."""
    found: dict[_Place, Row] = {}
    counts: dict[tuple[_Place, str], int] = {}
    for row in rows:
        known = {"suite": str, "measurement": dict, "provenance": dict, "key": str}
        if not all(isinstance(row.get(name), kind) for name, kind in known.items()):
            raise ValueError("a row without suite, measurement, provenance and key: not a results file of atma eval")
        items = sorted(row["measurement"].items())
        spec = tuple((name, json.dumps(value, sort_keys=True)) for name, value in items if name not in SIZES)
        place = _Place(row["suite"], " ".join(_label(row)), spec, 0)
        index = counts[place, row["key"]] = counts.get((place, row["key"]), -1) + 1
        found[place._replace(index=index)] = row
    return found


def _label(row: Row) -> list[str]:
    return [str(row[name]) for name in PLACE if name in row and row[name] != row["suite"]]


def _names(places: Sequence[_Place]) -> dict[_Place, str]:
    """What to call them: of the description, only what is not the same for all of their suite."""
    shared: dict[str, set[tuple[str, str]]] = {}
    for place in places:
        shared[place.suite] = shared.get(place.suite, set(place.spec)) & set(place.spec)
    numbered = {place._replace(index=0) for place in places if place.index}
    names = {}
    for place in places:
        told = [item for item in place.spec if item not in shared[place.suite] and item[0] not in PLACE]
        own = [f"{name} {_short(json.loads(text))}" for name, text in told]
        number = [f"#{place.index}"] if place._replace(index=0) in numbered else []
        names[place] = " ".join([place.suite, place.label, ", ".join(own), *number]).replace("  ", " ").strip()
    return names


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
