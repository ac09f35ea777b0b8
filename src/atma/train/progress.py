"""What a run shows while it goes: a live bar in a terminal or a notebook, plain lines elsewhere."""

import sys
import time
from typing import Any, Protocol, TextIO

from atma import notebook
from atma.bars import clock

LEAST, WIDE = 80, 120
"""Columns below which the bar shows the loss alone, and below which it is text without a bar."""


class Progress(Protocol):
    """Follows a run: `start` before the first step, `show` for each row of the record, `stop` at the end, whichever.

    A row's "kind" tells what it is of: "train", "validation" or "event".
    """

    def start(self, name: str, steps: int, done: int) -> None: ...
    def show(self, row: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class Silent:
    """Shows nothing: `start`, `show` and `stop` do nothing."""

    def start(self, name: str, steps: int, done: int) -> None: ...
    def show(self, row: dict[str, Any]) -> None: ...
    def stop(self) -> None: ...


class Lines:
    """One plain line every `seconds`, for logs: step, loss, tokens/s, time left. Validation and events always."""

    def __init__(self, out: TextIO | None = None, seconds: float = 10.0) -> None:
        self._out, self._seconds = out or sys.stdout, seconds
        self._steps, self._done, self._began, self._last = 0, 0, 0.0, 0.0

    def start(self, name: str, steps: int, done: int) -> None:
        self._name, self._steps, self._done = name, steps, done
        self._began = self._last = time.monotonic()
        self._say(f"{name}: {steps - done} steps to go" + (f", {done} already done" if done else ""))

    def show(self, row: dict[str, Any]) -> None:
        now = time.monotonic()
        if row["kind"] == "event":
            self._say(f"{self._name}: step {row['step']}: {row.get('event')}")
        elif row["kind"] == "validation":
            self._say(f"{self._name}: step {row['step']}/{self._steps} validation loss {_loss(row)}")
        elif now - self._last >= self._seconds or row["step"] == self._steps:
            self._last = now
            left = (now - self._began) / max(row["step"] - self._done, 1) * (self._steps - row["step"])
            speed = f"{row['tokens_per_second']:,.0f} tokens/s"
            self._say(f"{self._name}: step {row['step']}/{self._steps} loss {_loss(row)} {speed} {clock(left)} left")

    def stop(self) -> None:
        self._out.flush()

    def _say(self, text: str) -> None:
        print(_encodable(text, self._out), file=self._out, flush=True)


class Bar:
    """A live bar by rich, on one line: share done, loss, validation loss, tokens/s, time left; less on a narrow one."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        console = Console()
        self._width = console.width
        cut = "ellipsis" if console.encoding.startswith("utf") else "crop"
        one_line = Column(no_wrap=True, overflow=cut)
        left = TimeRemainingColumn(self._width < LEAST, table_column=Column(no_wrap=True, min_width=5))
        share = TextColumn("{task.percentage:3.0f}%", table_column=Column(no_wrap=True, min_width=4))
        name = TextColumn("{task.description}", table_column=one_line)
        text = TextColumn("{task.fields[text]}", table_column=one_line)
        if self._width < LEAST:
            columns = [name, share, text, left]
        elif self._width < WIDE:
            columns = [name, MofNCompleteColumn(), text, left]
        else:
            columns = [name, BarColumn(), MofNCompleteColumn(), text, left]
        self._bar = Progress(*columns, console=console, refresh_per_second=4)
        self._validation = ""

    def start(self, name: str, steps: int, done: int) -> None:
        self._validation = ""
        name = _encodable(name[: max(8, self._width // 3)], self._bar.console.file)
        self._task = self._bar.add_task(name, total=steps, completed=done, text="")
        self._bar.start()

    def show(self, row: dict[str, Any]) -> None:
        if row["kind"] == "event":
            text = _encodable(f"step {row['step']}: {row.get('event')}", self._bar.console.file)
            self._bar.console.print(text, markup=False, highlight=False)
        elif row["kind"] == "validation":
            self._validation = f" validation {_loss(row)}"
        elif self._width < LEAST:
            self._bar.update(self._task, completed=row["step"], text=f"loss {_loss(row)}")
        else:
            text = f"loss {_loss(row)}{self._validation} {row['tokens_per_second']:,.0f} tokens/s"
            self._bar.update(self._task, completed=row["step"], text=text)

    def stop(self) -> None:
        self._bar.stop()


class NotebookBar:
    """One line of a notebook's output: share done, loss, validation loss, tokens/s, time left. Events stand below."""

    def __init__(self, line: notebook.Line | None = None) -> None:
        self._line = line or notebook.Line()
        self._name, self._steps, self._done, self._began, self._text, self._validation = "", 1, 0, 0.0, "", ""

    def start(self, name: str, steps: int, done: int) -> None:
        self._name, self._steps, self._done, self._began = name, steps, done, time.monotonic()

    def show(self, row: dict[str, Any]) -> None:
        if row["kind"] == "event":
            print(_encodable(f"step {row['step']}: {row.get('event')}", sys.stdout), flush=True)
            return
        if row["kind"] == "validation":
            self._validation = f", validation {_loss(row)}"
            return
        step = row["step"]
        left = (time.monotonic() - self._began) / max(step - self._done, 1) * (self._steps - step)
        self._text = f"{self._name}: step {step:,} of {self._steps:,}, loss {_loss(row)}"
        speed = f"{row['tokens_per_second']:,.0f} tokens/s, {clock(left)} left"
        self._line.show(f"{self._text}{self._validation}, {speed}", step / self._steps)

    def stop(self) -> None:
        self._line.end(f"{self._text}{self._validation}")


def terminal_progress() -> Progress:
    """A bar in a notebook or when stdout is a terminal, lines when it is neither."""
    if notebook.active():
        return NotebookBar()
    return Bar() if sys.stdout.isatty() else Lines()


def _encodable(text: str, out: Any) -> str:
    """A text that can be written there: "?" for what its encoding lacks, so that no output stops a run."""
    encoding = getattr(out, "encoding", None) or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def _loss(row: dict[str, Any]) -> str:
    return "not finite" if row["loss"] is None else f"{row['loss']:.3f}"
