"""What the figures say, in plain words computed from the rows: one sentence a run, and the comparison of a section."""

from atma.report.content import Row, Run, Section, size_text


def headline(section: Section) -> list[str]:
    """One sentence for each measure and run of a section, for example
    "ATMA at 64× its training length: 2.91 → 2.90 nats per token (no higher: −0.012)."."""
    sentences = []
    for run in section.runs:
        label = section.label(run)
        sentences += [text for text in (loss_sentence(label, run), needle_sentence(label, run)) if text]
    return sentences


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
    """Needle accuracy at the greatest length, with its interval; empty where no needle was measured."""
    rows = run.rows("needle")
    if not rows:
        return ""
    last = rows[-1]
    interval = f"[{last['token_low']:.0%}, {last['token_high']:.0%}]"
    return (
        f"{label} recalls {last['token_accuracy']:.0%} {interval} of a needle's tokens in a sequence of "
        f"{size_text(last['length'])} tokens ({times(last, run)})."
    )


def times(row: Row, run: Run) -> str:
    """A row's length as a multiple of the training length: "64×"."""
    return f"{row['length'] / run.trained_length:.3g}×"


def _change(summary: Row | None, first: Row, last: Row) -> str:
    """The difference in words; with its interval over documents where the summary spans the same two lengths."""
    difference = last["loss"] - first["loss"]
    words = f"higher by {difference:.3f}" if difference > 0 else f"no higher: {_signed(difference)}"
    if not summary or (summary["lengths"][0], summary["lengths"][-1]) != (first["length"], last["length"]):
        return words
    low, high = summary.get("change_low"), summary.get("change_high")
    return words if low is None or high is None else f"{words}, 95% interval {_signed(low)} to {_signed(high)}"


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "−")
