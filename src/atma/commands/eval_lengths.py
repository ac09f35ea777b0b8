"""`atma eval lengths`: a table of results by context length."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from atma.bars import bars
from atma.commands.machine import Machine
from atma.commands.reading import Reading
from atma.commands.suite import check_page, tell, told_selection
from atma.commands.tables import print_table
from atma.config import EvaluationConfig


@dataclass(frozen=True)
class Rope:
    """Whether positions are stretched."""

    rope_scaling: Literal["none", "linear", "yarn"] = "none"
    """Stretch the positions of a rope model over texts longer than it was trained on."""
    rope_trained: int | None = None
    """Its trained length in tokens. Default: what its folder says."""
    rope_factor: float | None = None
    """Stretch so many times at every length. Default: as much as each length needs."""


def run(
    model: str = "nano",
    data: Path | None = None,
    evaluation: Annotated[EvaluationConfig, tyro.conf.OmitArgPrefixes] = EvaluationConfig(),  # noqa: B008
    out: Path | None = None,
    page: Path | None = None,
    reading: Annotated[Reading, tyro.conf.OmitArgPrefixes] = Reading(),  # noqa: B008
    rope: Annotated[Rope, tyro.conf.OmitArgPrefixes] = Rope(),
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Measure a model at many context lengths: loss, bits per byte, and recall of a needle.

    Text is read in chunks through the model's state, so length costs time, not memory.

    Args:
        model: A packaged model (see `atma info`), a model folder, a run folder, or hf: and a folder or name of
            transformers.
        data: A folder made by `atma prepare` with the model's own tokenizer; its validation split is read. Default: the
            data that the model was trained on if they are here, else the held-out files of the standard library.
        evaluation: What to measure.
        out: Keep the rows in this .jsonl file; what it already holds for the same model and data is not run again.
        page: Write the curves to this .html file.
        reading: How the model is read.
        rope: Whether positions are stretched.
        machine: Where to compute.
    """
    from atma.eval.lengths import evaluate_model
    from atma.eval.measure import text_of, trained_of
    from atma.eval.measured import Measured

    if page is not None:
        check_page(page)
    measured = Measured(
        model,
        select=reading.select,
        weights=reading.weights,
        rope_scaling=rope.rope_scaling,
        rope_trained=rope.rope_trained,
        rope_factor=rope.rope_factor,
        device=machine.device,
        threads=machine.threads,
    )
    subject = measured.load()
    with bars() as progress:
        token_set = text_of(subject, data, progress)
        rows = evaluate_model(subject, token_set, evaluation, progress, out)
    show(rows, f"{subject.name} on {token_set.manifest['source'] if data is None else data}")
    if out is not None:
        print(f"rows: {out}")
    if page is not None:
        from atma.eval.results_table import Part, Results

        print(f"page: {Results([Part(subject.name, rows, trained_of(subject))]).save(page)}")


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """By length: loss on nested prefixes and on fixed targets (with bits per byte), needle recall with its interval."""
    by_length: dict[int, dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] in ("nested", "fixed", "needle"):
            by_length.setdefault(row["length"], {})[row["kind"]] = row
    return [
        [f"{length:,}", _loss(found.get("nested")), _loss(found.get("fixed")), *_needle(found.get("needle"))]
        for length, found in sorted(by_length.items())
    ]


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table of an evaluation."""
    head = ["context", "prefixes", "fixed targets", "needle tokens", "needle exact"]
    caption = "loss in nats per token (bits per byte); shares: 95% interval, of how many"
    print_table(title, head, table(rows), caption)
    tell(told_selection(rows))
    skipped = sorted({length for row in rows for length in row.get("skipped_lengths", ())})
    if skipped:
        print(f"too little text for losses at {', '.join(f'{length:,}' for length in skipped)} tokens")


def _loss(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    bits = row.get("bits_per_byte")
    return f"{row['loss']:.3f}" + (f" ({bits:.3f})" if bits is not None else "")


def _needle(row: dict[str, Any] | None) -> tuple[str, str]:
    from atma.eval.retrieval.needles import VALUE_TOKENS
    from atma.statistics import share_text

    if row is None:
        return "–", "–"
    trials = row["trials"]
    counts = {"token": trials * VALUE_TOKENS, "exact": trials}
    tokens, exact = (share_text(row, f"{name}_accuracy", f"{name}_", of) for name, of in counts.items())
    return tokens, exact
