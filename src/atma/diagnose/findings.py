"""What the measurements of a diagnosis say, in plain words, each a difference whose interval excludes zero.

Three kinds. A symptom: with length, far context does harm, loss rises, or recall falls. A cause: without a part, or
with a head capped, the longest length goes better; these are experiments. A companion, told only beside a symptom or a
cause: something that changes with length in the model as it is, which proves nothing by itself. Intervals hold
together (Bonferroni) over the lengths of one symptom, over all causes, and over the heads or blocks of one companion;
a difference too small to matter is not told however sure it is.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

from atma.diagnose.effects import UNCHANGED, Estimate, estimate
from atma.report.content import size_text

Row = dict[str, Any]
LEAST_NATS = 0.02
LEAST_SHARE = 0.05
COMPANIONS = 6
"""Most companions told."""


@dataclass(frozen=True)
class Finding:
    """One sentence and the figure behind it: `effect` in `unit`, with its interval."""

    rule: str
    text: str
    effect: float
    low: float
    high: float
    unit: str

    def row(self) -> Row:
        return {"kind": "finding"} | asdict(self)


def findings(rows: Sequence[Row]) -> list[Finding]:
    """Symptoms, then causes by size (nats, then accuracy), then companions. A model that does not fail has none."""
    symptoms = [*_far_context_harms(rows), *_loss_rises(rows), *_recall_falls(rows)]
    causes = sorted(_causes(rows), key=lambda found: (found.unit != "nats", -abs(found.effect)))
    companions = _companions(rows) if symptoms or causes else []
    return [*symptoms, *causes, *companions]


def _far_context_harms(rows: Sequence[Row]) -> Iterator[Finding]:
    """At the length where it does most; the intervals of all lengths hold together."""
    far = [row for row in rows if row["kind"] == "far" and row["harm_low"] is not None and row["harm_low"] > 0]
    worst = max(far, key=lambda row: row["harm"], default=None)
    if worst is not None and worst["harm"] >= LEAST_NATS:
        found = Estimate(worst["harm"], worst["harm_low"], worst["harm_high"])
        text = (
            f"Far context does harm: with all {_size(worst)} tokens before them read, the same tokens cost "
            f"{found.value:.2f} nats more {_span(found)} than with the last {worst['window']:,} alone."
        )
        yield _finding("far context harms", text, found, "nats")


def _loss_rises(rows: Sequence[Row]) -> Iterator[Finding]:
    worst = _worst(_unchanged(rows, "loss"), "document_losses", 1)
    if worst is not None and worst[1].value >= LEAST_NATS:
        (first, last), found = worst
        text = (
            f"Loss rises by {found.value:.2f} nats a token from {_size(first)} to {_size(last)} tokens {_span(found)}."
        )
        yield _finding("loss rises", text, found, "nats")


def _recall_falls(rows: Sequence[Row]) -> Iterator[Finding]:
    worst = _worst(_unchanged(rows, "recall"), "document_accuracies", -1)
    if worst is not None and abs(worst[1].value) >= LEAST_SHARE:
        (first, last), found = worst
        recalled = (
            f"{first['token_accuracy']:.0%} at {_size(first)} tokens, {last['token_accuracy']:.0%} at {_size(last)}"
        )
        text = f"Recall of the told records falls: {recalled} ({found.value:+.0%} {_span(found, '+.0%')})."
        yield _finding("recall falls", text, found, "accuracy")


def _worst(rows: list[Row], key: str, sign: int) -> tuple[tuple[Row, Row], Estimate] | None:
    """The shorter length that the longest is most surely worse than: a larger figure is worse for sign 1."""
    found = []
    for row in rows[:-1]:
        difference = [b - a for a, b in zip(row[key], rows[-1][key], strict=True)]
        found.append(((row, rows[-1]), estimate(difference, len(rows) - 1)))
    worse = [one for one in found if one[1].sure and sign * one[1].value > 0]
    return max(worse, key=lambda one: sign * one[1].value, default=None)


def _causes(rows: Sequence[Row]) -> Iterator[Finding]:
    last = max((row["length"] for row in rows if row["kind"] == "effect"), default=0)
    effects = [row for row in rows if row["kind"] == "effect" and row["length"] == last]
    helping = [row for row in effects if _helps(row)]
    for row in helping:
        if not _covered(row, helping):
            yield _cause(row, rows)


def _helps(row: Row) -> bool:
    nats = row["loss_high"] is not None and row["loss_high"] < 0 and -row["loss"] >= LEAST_NATS
    recall = row["accuracy_low"] is not None and row["accuracy_low"] > 0 and row["accuracy"] >= LEAST_SHARE
    return nats or recall


def _covered(row: Row, helping: Sequence[Row]) -> bool:
    """Whether a smaller change explains it: of some of its parts, or a cap of the same, doing four fifths as much."""
    mine = set(row["parts"])
    for other in helping:
        theirs = set(other["parts"])
        milder = theirs == mine and other["cap"] is not None and row["cap"] is None
        as_much = other["loss"] <= 0.8 * row["loss"] and other["accuracy"] >= 0.8 * row["accuracy"]
        if as_much and (milder or theirs < mine):
            return True
    return False


def _cause(row: Row, rows: Sequence[Row]) -> Finding:
    length = size_text(row["length"])
    same = [one for one in rows if one["kind"] == "effect" and one["change"] == row["change"]]
    first = min(same, key=lambda one: one["length"])
    if row["loss_high"] is not None and row["loss_high"] < 0 and -row["loss"] >= LEAST_NATS:
        found = Estimate(row["loss"], row["loss_low"], row["loss_high"])
        worth = f"lowers the loss at {length} tokens by {-found.value:.2f} nats {_span(_negative(found))}"
        before = f"{first['loss']:+.2f} nats at {size_text(first['length'])}"
        unit = "nats"
    else:
        found = Estimate(row["accuracy"], row["accuracy_low"], row["accuracy_high"])
        worth = f"raises the recall at {length} tokens by {found.value:.0%} {_span(found, '+.0%')}"
        before, unit = f"{first['accuracy']:+.0%} at {size_text(first['length'])}", "accuracy"
    alone = "" if first is row else f"; {before}"
    rule = "cap" if row["cap"] is not None else "mask" if "subject" not in row else "change"
    return _finding(rule, f"{_subject(row, rows)} {worth}{alone}.", found, unit)


def _subject(row: Row, rows: Sequence[Row]) -> str:
    if "subject" in row:
        return str(row["subject"])
    if row["cap"] is None:
        return f"Going {row['change']}"
    held = {f"{one['layer']}.{one['head']}": one for one in rows if one["kind"] == "retention"}
    words = [f"Layer {head.replace('.', ' head ')} holds {_held(held[head])}." for head in row["heads"]]
    return " ".join([*words, f"Capping {'it' if len(words) == 1 else 'them'} at {row['cap']:g}"])


def _held(row: Row) -> str:
    """The half-life of a head on the text, in words, and at zero input where that is another."""
    used, zero = (_tokens(row[key]) for key in ("half_life_p50", "half_life"))
    return f"{used} tokens (its median half-life)" if used == zero else f"{used} tokens (median; {zero} at zero input)"


def _tokens(half_life: float | None) -> str:
    if half_life is None:
        return "endlessly many"
    return f"{half_life / 1e6:.3g}M" if half_life >= 1e6 else f"{half_life:,.0f}"


def _companions(rows: Sequence[Row]) -> list[Finding]:
    """Changes of weights, of participation and of gains, each kind by size, the first of each before the second."""
    kinds = (_heads_that_change(rows), _heads_that_spread(rows), _blocks_that_amplify(rows))
    ranked = [sorted(kind, key=lambda one: -abs(one.effect)) for kind in kinds]
    return [one for row in zip_longest(*ranked) for one in row if one is not None][:COMPANIONS]


WATCHED = {
    "copy_score": (
        "gives {b:.0%} of its weight to the record's tokens where they are asked for ({a:.0%} at {first})",
        -1,
    ),
    "null_mass": ("gives {b:.0%} of its weight to the null sink ({a:.0%} at {first})", 1),
    "first_mass": ("gives {b:.0%} of its weight to the first token ({a:.0%} at {first})", 1),
    "sink_mass": ("gives {b:.0%} of its weight to one other far token ({a:.0%} at {first})", 1),
}
"""Figures of a head whose change with length, in this direction, may go with a failure."""
LEAST_MASS = 0.1
LEAST_DOUBLINGS = 2


def _heads_that_change(rows: Sequence[Row]) -> Iterator[Finding]:
    seen = [row for row in rows if row["kind"] == "channel"]
    lengths = sorted({row["length"] for row in seen})
    by_place = {(row["layer"], row["head"], row["length"]): row for row in seen}
    heads = sorted({(row["layer"], row["head"]) for row in seen})
    for layer, head in heads if len(lengths) > 1 else []:
        first, last = (by_place[layer, head, length] for length in (lengths[0], lengths[-1]))
        for name, (words, sign) in WATCHED.items():
            if name not in first:
                continue
            pairs = zip(first["values"][name], last["values"][name], strict=True)
            change = estimate([b - a for a, b in pairs], len(heads) * len(WATCHED))
            if change.sure and sign * change.value >= LEAST_MASS:
                told = words.format(a=first[name], b=last[name], first=size_text(lengths[0]))
                text = f"Beside it: at {size_text(lengths[-1])} tokens layer {layer} head {head} {told}."
                yield _finding(name.replace("_", " "), text, change, "mass")


def _heads_that_spread(rows: Sequence[Row]) -> Iterator[Finding]:
    """Heads whose weight spreads over many times more keys. The effect is in doublings of n_eff."""
    seen = sorted((row for row in rows if row["kind"] == "channel"), key=lambda row: row["length"])
    heads = sorted({(row["layer"], row["head"]) for row in seen if "n_eff" in row})
    for layer, head in heads:
        mine = [row for row in seen if (row["layer"], row["head"]) == (layer, head)]
        ends = zip(mine[0]["values"]["n_eff"], mine[-1]["values"]["n_eff"], strict=True)
        change = estimate([math.log2(b / a) for a, b in ends], len(heads))
        if change.sure and change.value >= LEAST_DOUBLINGS:
            before, after = (f"{row['n_eff']:,.0f}" for row in (mine[0], mine[-1]))
            spread = f"{after} keys at {_size(mine[-1])} tokens, {before} at {_size(mine[0])}"
            text = f"Beside it: layer {layer} head {head} spreads its weight over ever more keys: {spread}."
            yield _finding("n_eff", text, change, "doublings")


def _blocks_that_amplify(rows: Sequence[Row]) -> Iterator[Finding]:
    seen = [row for row in rows if row["kind"] == "gain"]
    layers = sorted({row["layer"] for row in seen})
    for layer in layers:
        mine = sorted((row for row in seen if row["layer"] == layer), key=lambda row: row["length"])
        change = estimate([b - a for a, b in zip(mine[0]["values"], mine[-1]["values"], strict=True)], len(layers))
        if change.sure and change.value >= 0.5 * mine[0]["gain"]:
            ends = f"{mine[-1]['gain']:.2f} at {_size(mine[-1])} tokens, {mine[0]['gain']:.2f} at {_size(mine[0])}"
            text = f"Beside it: block {layer} multiplies small disturbances of its input: {ends}."
            yield _finding("gain", text, change, "gain")


def _unchanged(rows: Sequence[Row], kind: str) -> list[Row]:
    found = [row for row in rows if row["kind"] == kind and row["change"] == UNCHANGED]
    return sorted(found, key=lambda row: row["length"])


def _finding(rule: str, text: str, found: Estimate, unit: str) -> Finding:
    assert found.low is not None and found.high is not None
    return Finding(rule, text, found.value, found.low, found.high, unit)


def _negative(found: Estimate) -> Estimate:
    assert found.low is not None and found.high is not None
    return Estimate(-found.value, -found.high, -found.low)


def _span(found: Estimate, form: str = ".2f") -> str:
    return f"[{found.low:{form}}, {found.high:{form}}]"


def _size(row: Row) -> str:
    return size_text(row["length"])
