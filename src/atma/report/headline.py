"""What the figures say, in plain words computed from the rows.

A word such as "higher" follows an interval, never a sign: where zero is in it, no difference was seen, and so it says.
Intervals over documents are Student's here: the bootstrap is too narrow for the few that a short time allows.
"""

import numpy as np

from atma.report.content import Row, Run, Section, size_text
from atma.statistics import Interval, mean_interval, says, slope


def headline(section: Section) -> list[str]:
    """Ours, the first, beside each other model; one sentence for each measure and run; and what to know of them."""
    sentences = []
    for run in section.runs:
        label = section.label(run)
        sentences += [text for text in (loss_sentence(label, run), needle_sentence(label, run)) if text]
    return comparisons(section) + sentences + caveats(section)


def comparisons(section: Section) -> list[str]:
    """Whether loss rises less with length in the first run than in each other of its seed, document by document."""
    sentences = []
    for ours, other in _pairs(section):
        kind = "fixed" if endpoints(ours, "fixed") else "nested"
        found = _slope_between(ours, other, kind)
        if found is not None:
            sentences.append(_slope_words(section.label(ours), section.label(other), found))
    return sentences


def caveats(section: Section) -> list[str]:
    """Where another stands at the training length already, and why, so that nobody reads the gap as one of length."""
    sentences = [_start_words(section, ours, other) for ours, other in _pairs(section)]
    known = list(dict.fromkeys((run.name, run.caveat) for run in section.runs if run.caveat))
    return [text for text in sentences if text] + [f"About {name}: {caveat}" for name, caveat in known]


def endpoints(run: Run, kind: str) -> tuple[Row, Row] | None:
    """The row at the training length (or the nearest above it) and the row at the greatest length."""
    rows = run.rows(kind)
    first = next((row for row in rows if row["length"] >= run.trained_length), None)
    return None if first is None or first is rows[-1] else (first, rows[-1])


def loss_sentence(label: str, run: Run) -> str:
    """Loss at the training length and at the greatest length: on fixed targets, or nested prefixes where only those
    were measured; empty where neither reaches beyond the training length."""
    kind = "fixed" if endpoints(run, "fixed") else "nested"
    ends = endpoints(run, kind)
    if ends is None:
        return ""
    first, last = ends
    return (
        f"{label} at {times(last, run)} its training length: {first['loss']:.2f} → {last['loss']:.2f} nats per token "
        f"({_change(run.summary(kind), first, last)})."
    )


def needle_sentence(label: str, run: Run) -> str:
    """Needle accuracy at the greatest length, with its interval and trials; empty where no needle was measured."""
    rows = run.rows("needle")
    if not rows:
        return ""
    last = rows[-1]
    interval = f"[{last['token_low']:.0%}, {last['token_high']:.0%}]"
    return (
        f"{label} recalls {last['token_accuracy']:.0%} {interval} of a needle's tokens in a sequence of "
        f"{size_text(last['length'])} tokens ({times(last, run)}; {last['trials']} needles, teacher-forced)."
    )


def times(row: Row, run: Run) -> str:
    """A row's length as a multiple of the training length: "64×"."""
    return f"{row['length'] / run.trained_length:.3g}×"


def _change(summary: Row | None, first: Row, last: Row) -> str:
    """The difference and its interval over documents, where the summary spans the same two lengths, in words."""
    difference, low, high = last["loss"] - first["loss"], None, None
    if summary and (summary["lengths"][0], summary["lengths"][-1]) == (first["length"], last["length"]):
        low, high = (summary.get(f"change_t_{end}", summary.get(f"change_{end}")) for end in ("low", "high"))
    words = says(low, high, "lower by", "higher by", "no difference seen:")
    amount = _signed(difference) if words.endswith(":") else f"{abs(difference):.3f}"
    return f"{words} {amount}, {_span(low, high)}"


def _pairs(section: Section) -> list[tuple[Run, Run]]:
    """The first model of each seed with each other model of that seed."""
    if not section.runs:
        return []
    first = section.runs[0].name
    ours = {run.recipe.train.seed: run for run in reversed(section.runs) if run.name == first}
    fallback = section.runs[0]
    return [(ours.get(run.recipe.train.seed, fallback), run) for run in section.runs if run.name != first]


def _losses(ours: Run, other: Run, kind: str) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """Lengths from the training length on, and losses (documents, lengths) of both on the same documents."""
    found = []
    for run in (ours, other):
        rows = [row for row in run.rows(kind) if row["length"] >= ours.trained_length and row.get("document_losses")]
        found.append({row["length"]: row["document_losses"] for row in rows})
    lengths = sorted(set(found[0]) & set(found[1]))
    sizes = {len(losses[length]) for losses in found for length in lengths}
    if not lengths or len(sizes) != 1:
        return None
    first, second = (np.array([losses[length] for length in lengths], dtype=np.float64).T for losses in found)
    return lengths, first, second


def _slope_between(ours: Run, other: Run, kind: str) -> Interval | None:
    """Ours minus the other's, nats a doubling."""
    losses = _losses(ours, other, kind)
    return None if losses is None or len(losses[0]) < 2 else slope(losses[1] - losses[2], losses[0])


def _slope_words(ours: str, other: str, found: Interval) -> str:
    told = f"{_signed(found.value)} nats a doubling, {_span(found.t_low, found.t_high)}"
    words = says(
        found.t_low,
        found.t_high,
        f"Loss rises less with length in {ours} than in {other}",
        f"Loss rises more with length in {ours} than in {other}: here {ours} does not do what it is for",
        f"No difference seen between the slopes of {ours} and {other}: nothing here shows that {ours} holds better",
    )
    return f"{words} ({told})."


def _start_words(section: Section, ours: Run, other: Run) -> str:
    kind = "fixed" if endpoints(ours, "fixed") else "nested"
    losses = _losses(ours, other, kind)
    if losses is None:
        return ""
    mine, theirs = losses[1][:, 0], losses[2][:, 0]
    found = mean_interval(theirs - mine)
    word = says(found.t_low, found.t_high, "better", "worse", "")
    if not word:
        return ""
    return (
        f"{section.label(other)} is {word} than {section.label(ours)} at {losses[0][0]:,} tokens already, where both "
        f"were trained ({theirs.mean():.2f} and {mine.mean():.2f} nats, {_span(found.t_low, found.t_high)}): "
        "compare how each line goes on from there, not where it stands."
    )


def _span(low: float | None, high: float | None) -> str:
    """An interval in words."""
    if low is None or high is None:
        return "no interval from one document"
    return f"95% interval {_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
