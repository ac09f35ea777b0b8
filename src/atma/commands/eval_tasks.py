"""`atma eval tasks`: lm-eval's tasks on a model."""

from typing import Annotated, Any

import tyro

from atma.commands.suite import measure, print_table
from atma.eval.measured import Measured
from atma.eval.tasks import Tasks


def run(
    measured: Annotated[Measured, tyro.conf.OmitArgPrefixes] = Measured(),  # noqa: B008
    suite: Annotated[Tasks, tyro.conf.OmitArgPrefixes] = Tasks(),  # noqa: B008
) -> None:
    """Run tasks of EleutherAI's lm-eval: multiple choice, perplexity of texts, and greedy answers.

    Needs the extra `atma-lm[lm-eval]`. Most tasks download their data; a folder of own tasks needs no network.

    Args:
        measured: Which model, and how.
        suite: Which tasks.
    """
    if measured.budget:
        raise ValueError("tasks have no trials to choose from: leave --budget out, and choose --limit")
    print_table(
        f"{measured.model} on lm-eval", ["task", "documents", "figure", "", "±"], table(measure(suite, measured).rows)
    )


def table(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A line for each figure of each task, with its standard error."""
    lines = []
    for row in rows:
        name = row["task"] if row["filter"] == "none" else f"{row['task']}, {row['filter']}"
        for figure, value in row.items():
            if isinstance(value, float) and not figure.endswith(("_stderr", "_low", "_high")):
                error = row.get(f"{figure}_stderr")
                lines.append(
                    [name, f"{row['trials']:,}", figure, f"{value:.4f}", "" if error is None else f"{error:.4f}"]
                )
    return lines
