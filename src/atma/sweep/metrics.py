"""One cell's measurements as flat names and numbers, named as in the paper's table of 120 cells."""

import itertools
import statistics
from pathlib import Path
from typing import Any

from atma.train import read_record

Row = dict[str, Any]


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
