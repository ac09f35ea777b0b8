"""What a sweep costs: counted in tokens always, in time from finished cells or from some measured steps."""

import statistics
from collections.abc import Iterator
from pathlib import Path

from atma.config import EvaluationConfig
from atma.sweep.cells import Sweep
from atma.sweep.ledger import PLAN, Ledger
from atma.sweep.suites import SUITES
from atma.sweep.task import Task
from atma.train.progress import clock

DAY = 86_400


def estimate(sweep: Sweep, folder: Path, measure: bool = False) -> Iterator[str]:
    """Lines that tell how much there is to do. ValueError when steps are to be measured and there is no data."""
    trained = sum(cell.recipe.train.tokens for cell in sweep.cells)
    read = sum(evaluation_tokens(cell.recipe.evaluation) for cell in sweep.cells)
    seeds = len(sweep.config.seeds)
    yield f"{len(sweep.cells)} cells ({len(sweep.cells) // seeds} × {seeds} seeds)"
    yield f"{trained:,} tokens to train on, {read:,} to measure on"
    if asked := [name for name in SUITES if any(name in cell.suites for cell in sweep.cells)]:
        yield f"and what the suites read, which is not counted: {', '.join(asked)}"
    if (folder / PLAN).exists():
        ledger = Ledger.open(folder)
        yield from _left([ledger.task(cell.id) for cell in sweep.cells])
    if measure:
        yield from _measured(sweep, trained, read)


def evaluation_tokens(evaluation: EvaluationConfig) -> int:
    """Tokens that an evaluation reads, where there is text enough."""
    lengths = evaluation.lengths
    losses = evaluation.documents * (sum(lengths) + lengths[-1] * (2 if evaluation.junk else 1))
    return losses + sum(2 * evaluation.trials(length) * length for length in lengths)


def spoken(seconds: float) -> str:
    """Seconds as h:mm:ss, or days from two on."""
    return clock(seconds) if seconds < 2 * DAY else f"{seconds / DAY:.1f} days"


def _left(tasks: list[Task]) -> Iterator[str]:
    """What the results say of the rest, those that were given up left out; nothing while there is none."""
    results = [result for task in tasks if (result := task.result()) is not None]
    left, given_up = sum(not task.finished() for task in tasks), sum(task.failure() is not None for task in tasks)
    if results:
        seconds = statistics.mean(result["seconds"] for result in results)
        failed = f", {given_up} given up" if given_up else ""
        done = f"{len(results)} done in {clock(seconds)} each{failed}"
        yield f"{done}; {left} are left: {spoken(left * seconds)} for one worker"


def _measured(sweep: Sweep, trained: int, read: int) -> Iterator[str]:
    from atma.demo import training_speed

    speed = training_speed(sweep.cells[0].recipe)
    yield (
        f"the first cell trains at {speed:,.0f} tokens a second here; at that speed, read three times as fast, one "
        f"worker needs {spoken((trained + read / 3) / speed)}"
    )
