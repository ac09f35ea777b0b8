"""`atma eval reasoning`: questions about facts, alone and spread over long texts; and the training for it."""

from pathlib import Path
from typing import Annotated, Any

import tyro

from atma.commands.suite import measure, print_table, tell
from atma.eval.measured import Measured
from atma.eval.reasoning.suite import Reasoning
from atma.eval.reasoning.training import FineTuning


def run(
    measured: Annotated[Measured, tyro.conf.OmitArgPrefixes] = Measured(),  # noqa: B008
    suite: Annotated[Reasoning, tyro.conf.OmitArgPrefixes] = Reasoning(),  # noqa: B008
    documents: Path | None = None,
    fine_tune: Path | None = None,
    tuning: FineTuning = FineTuning(),  # noqa: B008
    resume: bool = False,
) -> None:
    """Measure answers to bAbI's twenty kinds of questions, their facts spread over long texts as in BABILong.

    A base model that was not trained for it is at chance: --fine-tune trains it on the tasks first, at lengths that
    you choose, and the model in that folder can then be measured at longer ones.

    Args:
        measured: Which model, and how.
        suite: What to measure, or to train for.
        documents: Measure nothing, but write training documents to this .jsonl file, as many of each task and length
            as trials; `atma prepare` takes it.
        fine_tune: Measure nothing, but train the model on the tasks and lengths into this run folder.
        tuning: How it is trained.
        resume: Go on with the fine-tuning that was stopped in that folder.
    """
    if documents is not None and fine_tune is not None:
        raise ValueError("choose one of --documents and --fine-tune")
    if documents is not None:
        _documents(measured, suite, documents)
    elif fine_tune is not None:
        _fine_tune(measured, suite, tuning, fine_tune, resume)
    else:
        rows, left_out = measure(suite, measured)
        show(rows, f"reasoning: {measured.model}")
        tell(left_out)


def _documents(measured: Measured, suite: Reasoning, path: Path) -> None:
    from atma.eval.reasoning.training import write_documents

    print(f"{write_documents(measured.load(), suite, path):,} documents: {path}")


def _fine_tune(measured: Measured, suite: Reasoning, tuning: FineTuning, out: Path, resume: bool) -> None:
    from atma.eval.language_model import OwnModel
    from atma.eval.reasoning.training import fine_tune
    from atma.train import terminal_progress

    model = measured.load()
    if not isinstance(model, OwnModel):
        raise ValueError(f"{measured.model}: only our own models are fine-tuned here; others take --documents")
    final = fine_tune(model, suite, tuning, out, resume, terminal_progress())
    print(f"trained: {final}\nmeasure it: atma eval reasoning --model {out} --tasks {' '.join(suite.tasks)}")


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """A line for each task and way of scoring: chance, the commonest answer's share, then accuracy by length."""
    lengths = sorted({row["length"] for row in rows})
    lines: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["task"], row["kind"]), {})[row["length"]] = row
    body = []
    for (task, kind), found in lines.items():
        base = next(iter(found.values()))
        bounds = [f"{base['chance']:.0%}", f"{base['majority']:.0%}"]
        body.append([f"{task} {kind}", *bounds, *(_cell(found.get(length)) for length in lengths)])
    return ["", "chance", "majority", *(f"{length:,}" if length else "facts" for length in lengths)], body


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print the table."""
    head, body = table(rows)
    trials = sum(row["trials"] for row in rows)
    caption = (
        "ranking: likeliest of the task's answers; generation: first line written is the answer, then: names it alone"
    )
    print_table(title, head, body, f"{caption}; {trials:,} answers; shares: 95% interval, of how many")


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    from atma.statistics import share_text

    told = share_text(row, "accuracy", "accuracy_", row["trials"])
    return f"{told}, {row['named']:.0%}" if row["kind"] == "generation" else told
