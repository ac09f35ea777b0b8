"""`atma eval recall`: small models of several mixers, trained to remember and tested beyond their length."""

from pathlib import Path
from typing import Annotated

import tyro

from atma.commands.machine import Machine
from atma.eval.recall.suite import Recall


def run(
    suite: Annotated[Recall, tyro.conf.OmitArgPrefixes] = Recall(),  # noqa: B008
    out: Path | None = None,
    page: Path | None = None,
    budget: str = "",
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),  # noqa: B008
) -> None:
    """Train small models on associative recall, copying, or a task of MAD, and test them at longer contexts.

    No model is asked for: each run begins from fresh weights. Prints how many tokens each mixer needed and how much it
    answers at each multiple of the training length.

    Args:
        suite: Task, sizes, mixers and training.
        out: Keep the rows in this .jsonl file; runs that it already holds are not made again.
        page: Also write learning curves and accuracy by length to this .html file.
        budget: A time such as 30m: the training tokens of all runs are halved until about so much is needed.
        machine: Where to compute.
    """
    from atma.bars import bars
    from atma.commands.suite import check_page, command_line, print_table
    from atma.eval.recall.suite import recall
    from atma.eval.recall.summary import figures, table
    from atma.eval.suite import duration

    where = machine.take()
    check_page(page)
    seconds = duration(budget) if budget else None
    with bars() as progress:
        rows = recall(suite, out, progress, seconds, str(where))
    brief = table(rows)
    where = "for ever more pairs" if suite.task == "capacity" else "at multiples of the training length"
    caption = f"answers right {where}: 95% interval, of how many; of several seeds the mean, and their range"
    print_table(f"recall: {suite.task}", brief.header, brief.rows, caption)
    if out is not None:
        print(f"rows: {out}")
    if page is not None:
        from atma.report.content import environment
        from atma.report.plain import plain_page

        title = f"Recall: {suite.task}"
        print(f"page: {plain_page(page, title, figures(rows), command_line(), environment(), table=table(rows))}")
