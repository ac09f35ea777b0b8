"""One live bar for a job: a line of the output in a notebook, else on the terminal's error stream, if that is one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from atma import notebook


@contextmanager
def bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Gives a function to call with a stage, how much of it is done, and of how much (None: unknown)."""
    if notebook.active():
        line = notebook.Line()
        try:
            yield lambda stage, done, total: line.show(stage, done / total if total else None)
        finally:
            line.end()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task: list[TaskID] = []

        def advance(stage: str, done: int, total: int | None) -> None:
            if not task:
                task.append(progress.add_task(stage, total=total))
            progress.update(task[0], description=stage, completed=done, total=total)

        yield advance
