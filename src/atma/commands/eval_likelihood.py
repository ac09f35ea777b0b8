"""`atma eval likelihood`: bits per byte by length, and whether they fall."""

from typing import Annotated, Any

import tyro

from atma.commands.suite import measure, print_table
from atma.eval.likelihood import Likelihood
from atma.eval.measured import Measured


def run(
    measured: Annotated[Measured, tyro.conf.OmitArgPrefixes] = Measured(),  # noqa: B008
    suite: Annotated[Likelihood, tyro.conf.OmitArgPrefixes] = Likelihood(),  # noqa: B008
) -> None:
    """Measure the likelihood of text by length, in bits per byte, so that models of any tokenizers can be compared.

    On clean text, on junk, and on the same last bytes of each text after ever more of it; and whether it falls.

    Args:
        measured: Which model, and how.
        suite: What to measure.
    """
    if measured.budget:
        raise ValueError("likelihood has no trials to choose from: leave --budget out, and choose --documents")
    rows, _ = measure(suite, measured)
    print_table(f"{measured.model} on {suite.texts}", *table(rows, suite.unit))
    for line in [*verdicts(rows), *shortages(rows)]:
        print(line)


def table(rows: list[dict[str, Any]], unit: str) -> tuple[list[str], list[list[str]], str]:
    """Head, a line for each length, and a caption: the mean over texts, with its Student interval."""
    measures = [kind for kind in ("clean", "junk", "fixed") if any(row["kind"] == kind for row in rows)]
    by_length: dict[int, dict[str, str]] = {}
    for row in rows:
        if row["kind"] in measures:
            by_length.setdefault(row["length"], {})[row["kind"]] = _figure(row)
    body = [[f"{n:,}", *(found.get(kind, "–") for kind in measures)] for n, found in sorted(by_length.items())]
    counts = {row["kind"]: row["documents"] for row in rows}
    texts = ", ".join(f"{counts[kind]} of {kind}" for kind in measures)
    return [unit, *measures], body, f"bits per byte, mean over texts ({texts}) with its 95% interval"


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """One line a trend: the verdict, the slope and what it rests on."""
    told = []
    for row in rows:
        if row["kind"] != "trend":
            continue
        slope = f"{row['slope']:+.4f}"
        if row["slope_t_low"] is not None:
            slope += f" [{row['slope_t_low']:+.4f}, {row['slope_t_high']:+.4f}]"
        tests = f"p falls {row['p_falls']:.2g}, rises {row['p_rises']:.2g}, rank correlation {row['spearman']:+.2f}"
        steps = f"; rises at {', '.join(f'{n:,}' for n in row['rises_at'])}" if row["rises_at"] else ""
        told.append(f"{row['task']}: {row['verdict']}, {slope} bits per byte a doubling ({tests}{steps})")
    return told


def shortages(rows: list[dict[str, Any]]) -> list[str]:
    """One line a measure that has too little text for some lengths."""
    short = {row["kind"]: row["skipped_lengths"] for row in rows if row["kind"] != "trend" and "skipped_lengths" in row}
    told = {kind: ", ".join(f"{n:,}" for n in skipped) for kind, skipped in short.items() if skipped}
    return [f"{kind}: too little text at {lengths}" for kind, lengths in told.items()]


def _figure(row: dict[str, Any]) -> str:
    low, high = row["mean_bits_per_byte_t_low"], row["mean_bits_per_byte_t_high"]
    return f"{row['mean_bits_per_byte']:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None else "")
