"""What `atma sweep run` shows: a live bar for the sweep and one for each cell at work, or plain lines in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from atma.sweep.controller import Display
from atma.sweep.status import Follower, share_done

LOG_SECONDS = 60.0


class Lines:
    """Plain lines: every finished cell, and the counts once a minute."""

    def __init__(self, seconds: float = LOG_SECONDS) -> None:
        self._seconds, self._last, self._said = seconds, -float("inf"), ""

    def line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    def show(self, follower: Follower) -> None:
        now, text = time.monotonic(), follower.line()
        if now - self._last >= self._seconds and text != self._said:
            self._last, self._said = now, text
            self.line(text)


class Bars:
    """A bar for the sweep and one a running cell, by rich."""

    def __init__(self, progress) -> None:
        self._progress = progress
        self._whole = progress.add_task("sweep", total=None, text="")
        self._cells: dict = {}

    def line(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def show(self, follower: Follower) -> None:
        standings = follower.standings
        running = {standing.cell: standing for standing in standings if standing.state == "running"}
        ended = sum(standing.state in ("done", "failed") for standing in standings)
        whole = ended + sum(map(share_done, running.values()))
        self._progress.update(self._whole, total=len(standings), completed=whole, text=follower.line())
        for cell in self._cells.keys() - running.keys():
            self._progress.remove_task(self._cells.pop(cell))
        for cell, standing in running.items():
            if cell not in self._cells:
                self._cells[cell] = self._progress.add_task(standing.label, total=1.0, text="")
            stage = standing.doing.get("stage", "")
            self._progress.update(self._cells[cell], completed=share_done(standing), text=stage)


@contextmanager
def display() -> Iterator[Display]:
    """Bars when stdout is a terminal, lines when it is not."""
    if not sys.stdout.isatty():
        yield Lines()
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, refresh_per_second=4) as progress:
        yield Bars(progress)
