"""One live bar for a job: a line of the output in a notebook, a bar on a terminal, else a plain line now and then."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from atma import notebook

if TYPE_CHECKING:
    from rich.progress import ProgressColumn

Advance = Callable[[str, int, int | None], None]
"""Called with a stage, how much of it is done, and of how much (None: unknown)."""
SECONDS = 15.0
"""Between two plain lines. A job that ends sooner says nothing."""
NARROW, TAKEN = 64, 18
"""Columns below which a bar is left out, so that the rest stays on one line; and those that share and time take."""


@contextmanager
def bars() -> Iterator[Advance]:
    """Gives a function to call with a stage, how much of it is done, and of how much (None: unknown)."""
    if notebook.active():
        line = notebook.Line()
        try:
            yield lambda stage, done, total: line.show(stage, done / total if total else None)
        finally:
            line.end()
        return
    from rich.console import Console
    from rich.progress import Progress, TaskID

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    with Progress(*_columns(console.width), console=console, transient=True) as progress:
        task: list[TaskID] = []

        def advance(stage: str, done: int, total: int | None) -> None:
            stage = stage[: max(8, console.width - TAKEN)]
            if not task:
                task.append(progress.add_task(stage, total=total))
            progress.update(task[0], description=stage, completed=done, total=total)

        yield advance


class Lines:
    """Says every so many seconds how far a stage is, and how long what is left of it takes at the pace so far."""

    def __init__(
        self,
        say: Callable[[str], None] | None = None,
        seconds: float = SECONDS,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say, self._seconds, self._now = say or _to_stderr, seconds, now
        self._stage, self._began, self._last, self._first = "", 0.0, now(), 0

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        now = self._now()
        if stage != self._stage or done < self._first:
            self._stage, self._began, self._first = stage, now, done
        if now - self._last < self._seconds:
            return
        self._last = now
        if not total:
            self._say(f"{stage}: {done:,} done{self._pace(now, done)}")
            return
        moved = done - self._first
        left = f", {clock((now - self._began) / moved * (total - done))} left" if moved > 0 else ""
        self._say(f"{stage}: {done:,} of {total:,} ({min(done / total, 1):.0%}){self._pace(now, done)}{left}")

    def _pace(self, now: float, done: int) -> str:
        return f", {rate((done - self._first) / (now - self._began))}" if done > self._first else ""


def rate(each: float) -> str:
    """So many a second, in three digits: 7.25/s, 31.4k/s, 2.00M/s."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if each >= 0.9995 * size:
            return f"{each / size:#.3g}{unit}/s".replace("./", "/").replace(f".{unit}", unit)
    return f"{each:#.3g}/s".replace("./", "/")


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03; – where they are no number."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _columns(width: int) -> "list[ProgressColumn]":
    """What a bar consists of on a terminal of so many columns: one line in any case."""
    from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate(task.speed) if task.speed else "", no_wrap=True)

    described = TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis"))
    share = TextColumn("{task.percentage:3.0f}%", table_column=Column(no_wrap=True, min_width=4))
    left = TimeRemainingColumn(compact=width < NARROW, table_column=Column(no_wrap=True, min_width=5))
    return [described, share, left] if width < NARROW else [described, BarColumn(), share, Rate(), left]


def _to_stderr(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)
