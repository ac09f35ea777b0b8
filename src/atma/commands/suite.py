"""What every suite's command shares: where rows go, and what is shown."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from atma.commands.tables import print_table

if TYPE_CHECKING:
    from atma.eval.measured import Measured
    from atma.eval.suite import Suite


__all__ = [
    "Rows",
    "check_page",
    "command_line",
    "left_out",
    "measure",
    "print_table",
    "tell",
    "told_selection",
    "told_trials",
]


class Rows(NamedTuple):
    """The rows of a suite, and what of it did not fit the budget, in words to end with."""

    rows: list[dict[str, Any]]
    left_out: str


def measure(suite: "Suite", measured: "Measured") -> Rows:
    """The rows of a suite, with progress on the terminal."""
    from atma.bars import bars
    from atma.eval.suite import duration, run, within

    budget = duration(measured.budget) if measured.budget else None
    model, trials = measured.load(), None
    if budget is not None and (trials := within(suite, model, budget)):
        print(f"{measured.budget}: {told_trials(suite.trials(), trials)}")
    with bars() as progress:
        rows = run(suite, model, measured.out, progress, trials)
    if measured.out is not None:
        print(f"rows: {measured.out}")
    tell(told_selection(rows))
    return Rows(rows, "" if trials is None else left_out(measured.budget, suite.trials(), trials))


def left_out(budget: str, wanted: Mapping[int, int], trials: Mapping[int, int]) -> str:
    """What a budget had no room for; empty where it had room for all."""
    none = [f"{length:,}" for length in sorted(wanted) if not trials.get(length)]
    fewer = [f"{trials[n]} of {wanted[n]} at {n:,}" for n in sorted(wanted) if 0 < trials.get(n, 0) < wanted[n]]
    parts = [f"not measured, for want of time: {', '.join(none)} tokens"] if none else []
    parts += [f"fewer trials: {', '.join(fewer)} tokens"] if fewer else []
    return f"--budget {budget}: {'; '.join(parts)}; give a longer one" if parts else ""


def told_selection(rows: Sequence[dict[str, Any]]) -> str:
    """What a selection policy has read, by the rows of it, and what is certain of that; empty without one."""
    shares = [row["keys_read"] for row in rows if "keys_read" in row]
    if not shares:
        return ""
    text = f"{rows[0]['provenance']['selection']}: {min(shares):.1%} to {max(shares):.1%} of the keys read as they are"
    certified = [row for row in rows if "certificate_direction" in row]
    if not certified:
        return text
    direction, magnitude = (max(row[f"certificate_{of}"] for row in certified) for of in ("direction", "magnitude"))
    return f"{text}; certain of every query: direction within {direction:.4f}, magnitude within {magnitude:.4f}"


def tell(words: str) -> None:
    """Print the last words, if there are any."""
    if words:
        print(words)


def told_trials(wanted: Mapping[int, int], trials: Mapping[int, int]) -> str:
    """How many trials fit a budget at each length, and where not one does."""
    counts = [f"{trials.get(length, 0)} of {count} trials at {length:,}" for length, count in sorted(wanted.items())]
    return ", ".join(counts)


def check_page(page: Path | None) -> None:
    """ValueError, before anything is measured, for a page that is a folder or not called as a page."""
    if page is not None and page.is_dir():
        raise ValueError(f"--page {page}: a folder; name the .html file to write")
    if page is not None and page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--page {page}: a page is HTML; name a file that ends in .html")


def command_line() -> str:
    """The command of this process, for the page that it writes."""
    return shlex.join(["atma", *sys.argv[1:]])
