"""`atma eval recall`: small models of several mixers, trained to remember and tested beyond their length."""

import shlex
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import tyro

from atma.eval.recall.suite import Recall


def run(
    suite: Annotated[Recall, tyro.conf.OmitArgPrefixes] = Recall(),  # noqa: B008
    out: Path | None = None,
    page: Path | None = None,
    budget: str = "",
    device: str = "cpu",
) -> None:
    """Train small models on associative recall, copying or selective copying, and test them at longer contexts.

    No model is asked for: each run begins from fresh weights. Prints how many tokens each mixer needed and how much it
    answers at each multiple of the training length.

    Args:
        suite: Task, sizes, mixers and training.
        out: Keep the rows in this .jsonl file; runs that it already holds are not made again.
        page: Also write learning curves and accuracy by length to this .html file.
        budget: A time such as 30m: the training tokens of all runs are halved until about so much is needed.
        device: Where to train, such as cpu or cuda.
    """
    from atma.commands.bars import bars
    from atma.commands.suite import print_table
    from atma.commands.train import require_device
    from atma.eval.recall.suite import recall
    from atma.eval.recall.summary import figures, table
    from atma.eval.suite import duration

    require_device(device)
    seconds = duration(budget) if budget else None
    with bars() as progress:
        rows = recall(suite, out, progress, seconds, device)
    brief = table(rows, intervals=False)
    where = "for ever more pairs" if suite.task == "capacity" else "at multiples of the training length"
    caption = f"answers right {where}; their intervals are in the rows and on the page"
    print_table(f"recall: {suite.task}", brief.header, brief.rows, caption)
    if out is not None:
        print(f"rows: {out}")
    if page is not None:
        from atma.bench.roofline import write_page

        print(f"page: {write_page(f'Recall: {suite.task}', command(suite), figures(rows), table(rows), page)}")


def command(suite: Recall) -> str:
    """The command line of these options."""
    words = ["atma", "eval", "recall"]
    for field in fields(suite):
        value = getattr(suite, field.name)
        if value != field.default:
            words.append("--" + field.name.replace("_", "-"))
            words += map(str, value if isinstance(value, tuple) else [value])
    return shlex.join(words)
