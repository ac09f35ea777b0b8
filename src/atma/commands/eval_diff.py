"""`atma eval diff`: two results files side by side."""

from collections import Counter
from pathlib import Path


def run(first: Path, second: Path, /, limit: int = 40) -> None:
    """Compare two files of results: what changed, whether by more than chance, and what explains it.

    Args:
        first: A results file (.jsonl) of `atma eval`.
        second: Another.
        limit: Changes to print at most.
    """
    from atma.commands.suite import print_table
    from atma.eval.compare import compare
    from atma.eval.results import read_rows

    for path in (first, second):
        if not path.is_file():
            raise ValueError(f"{path}: no such results file")
    found = compare(read_rows(first), read_rows(second))
    head = ["measurement", "figure", "first", "second", "difference", "paired", "second is"]
    changes = found.changes[:limit]
    before = ["", *(change.row for change in changes)]
    rows = [
        [c.row if c.row != last else "", c.metric, *_figures(c.first, c.second), c.chance, c.says]
        for c, last in zip(changes, before, strict=False)
    ]
    if rows:
        told = (
            "paired: 95% interval over documents, or trials that only the first : only the second got right; "
            "undecided: that may be chance"
        )
        print_table(f"{first} and {second}", head, rows, told)
    if len(found.changes) > limit:
        print(f"and {len(found.changes) - limit} more changes; --limit shows them")
    print(f"{found.equal} rows are equal to the last digit")
    for path, alone in ((first, found.only_first), (second, found.only_second)):
        if alone:
            print(f"only in {path}: {len(alone)} rows, such as {alone[0]}")
    for reason, count in Counter(change.explained for change in found.changes).items():
        print(f"{count} changes: {'; '.join(reason) or 'nothing that is recorded differs'}")


def _figures(first: float, second: float) -> list[str]:
    return [f"{first:.4f}", f"{second:.4f}", f"{second - first:+.4f}"]
