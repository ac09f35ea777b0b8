"""One cell's measurements as flat names and numbers, named as in the paper's table of 120 cells."""

import itertools
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from atma.train import read_record

Row = dict[str, Any]
FIGURES = {
    "clean": ("bits_per_byte",),
    "junk": ("bits_per_byte",),
    "fixed": ("bits_per_byte",),
    "trend": ("slope", "spearman"),
    "retrieval": ("token_accuracy", "exact_accuracy", "recall", "cross_entropy"),
    "absent": ("token_accuracy", "exact_accuracy", "recall", "cross_entropy"),
    "ranking": ("accuracy", "answer_nats"),
    "generation": ("accuracy", "named"),
    "accuracy": ("accuracy", "exact_accuracy"),
    "capacity": ("accuracy", "exact_accuracy"),
    "run": ("tokens_to_99", "pairs_held", "memory_bytes"),
}
"""What becomes a metric of a suite's row of each kind; of the kind "task" every figure of lm-eval does."""
UNSAID = ("trend", "retrieval", "accuracy", "capacity", "run", "task")
"""Kinds that names leave out."""
WORDS = ("task", "filter", "size", "mixer", "rate", "haystack", "depth", "scoring")
"""Keys of a row that say what its figures are of."""
SHARES = ("accuracy", "acc", "acc_norm", "exact_match", "recall", "named")
"""Figures that are shares: as metrics they are percent."""
RENAMED = {"tokens_to_99": "tokens_to_learn"}
"""A number at the end of a metric's name is a length."""


def flat_metrics(rows: list[Row], run: Path) -> dict[str, float]:
    """Of evaluation rows and the training record of folder `run`.

    Losses and cross-entropies are nats a token, accuracies percent; `_L` is the context length in tokens.
    `needle_absent_ce` is at the shortest length. Seconds are of training steps alone, those before a stop included;
    tokens per second is the median step's.
    """
    return training_metrics(read_record(run)) | evaluation_metrics(rows)


def training_metrics(record: list[Row]) -> dict[str, float]:
    """The last validation loss, and time and speed of the steps."""
    steps = [row for row in record if row["kind"] == "train"]
    losses = [row["loss"] for row in record if row["kind"] == "validation"]
    tokens = [0, *(row["tokens"] for row in steps)]
    sizes = [after - before for before, after in itertools.pairwise(tokens)]
    speeds = [row["tokens_per_second"] for row in steps]
    found: dict[str, float] = {
        "train_seconds": round(sum(size / speed for size, speed in zip(sizes, speeds, strict=True)), 3),
        "train_tokens_per_second": statistics.median(speeds),
    }
    return {"final_val_loss_nats": losses[-1]} | found if losses else found


def evaluation_metrics(rows: list[Row]) -> dict[str, float]:
    """Losses and needles by length."""
    found: dict[str, float] = {"params": rows[0]["provenance"]["parameters"]}
    for row in rows:
        length = row.get("length")
        if row["kind"] in _LOSSES:
            found[f"{_LOSSES[row['kind']]}_{length}"] = row["loss"]
        elif row["kind"] == "needle":
            found[f"needle_token_acc_{length}"] = 100 * row["token_accuracy"]
            found[f"needle_exact_acc_{length}"] = 100 * row["exact_accuracy"]
            found[f"needle_ce_{length}"] = row["cross_entropy"]
    needles = [row for row in rows if row["kind"] == "needle"]
    if needles:
        found["needle_absent_ce"] = min(needles, key=lambda row: row["length"])["absent_cross_entropy"]
    return found


_LOSSES = {"nested": "clean_nll", "junk": "junk_nll", "fixed": "fixed_nll"}


def suite_metrics(suites: dict[str, list[Row]]) -> dict[str, float]:
    """Of the rows of each suite: SUITE_WHAT_FIGURE, with _L at the end where the row is of a context length.

    WHAT is the row's kind, unless it goes without saying, and its `WORDS`. Rows of one name (seeds of a recall run) are
    averaged; where one of them has no figure, there is no metric.
    """
    found: dict[str, list[float | None]] = {}
    for suite, rows in suites.items():
        for row in rows:
            for name, value in _figures(suite, row):
                found.setdefault(name, []).append(value)
    whole = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: statistics.fmean(known) for name, known in whole.items() if len(known) == len(found[name])}


def _figures(suite: str, row: Row) -> Iterator[tuple[str, float | None]]:
    """Name and value of what a row says; nothing of rows that are no figures, such as learning curves."""
    kind = row["kind"]
    figures = [name for name in FIGURES.get(kind, ()) if name in row]
    if kind == "task":
        ends = ("_stderr", "_low", "_high")
        figures = [name for name, value in row.items() if isinstance(value, float) and not name.endswith(ends)]
    words = [suite, *([] if kind in UNSAID else [kind]), *_words(row)]
    length = [str(row["length"])] if "length" in row and kind != "run" else []
    for figure in figures:
        value = row[figure]
        if figure in SHARES:
            value = 100 * value
        yield "_".join([*words, RENAMED.get(figure, figure), *length]), value


def _words(row: Row) -> Iterator[str]:
    """What a row's figures are of, each as a part of a name."""
    for key in WORDS:
        value = row.get(key)
        if value is None or (key, value) in (("rate", 1.0), ("filter", "none"), ("haystack", "none")):
            continue
        text = f"{value:g}" if isinstance(value, float) else str(value)
        yield re.sub(r"[^\w.+=-]+", "-", f"{key}{text}" if key in ("rate", "depth") else text)
