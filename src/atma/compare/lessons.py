"""One recall task of one entrant, as a piece of work that the workers of a sweep take."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as changed
from typing import Any, cast

from atma.config import ModelConfig
from atma.device import device_of
from atma.eval.provenance import software
from atma.eval.recall.lessons import Lesson
from atma.eval.recall.suite import TASKS, Recall
from atma.eval.recall.tasks import Capacity, Task
from atma.eval.suite import run_measurements, sha256
from atma.sweep import files
from atma.sweep.cell import Told, run_cell
from atma.sweep.cells import Cell, label
from atma.sweep.metrics import suite_metrics
from atma.sweep.recipe import Scalar
from atma.sweep.task import Claim, worker
from atma.train import Stopped

FACTORS = (1, 2, 4, 8, 16)
"""Test lengths, in training lengths of the task."""
NEVER = 2.0
"""No accuracy."""
BATCH = 1024
"""Tokens of a step: these tasks are learned by the number of steps."""


@dataclass(frozen=True)
class Piece:
    """A lesson with its place in the comparison."""

    lesson: Lesson
    factors: dict[str, Scalar]
    seed: int

    @property
    def id(self) -> str:
        """Of what is learned and asked."""
        return sha256(self.lesson.measurement().spec | {"mixer": ""})[:16]

    @property
    def label(self) -> str:
        return label(self.factors, self.seed)


def lesson(words: str, name: str, model: Callable[[Task], ModelConfig], seed: int, tokens: int) -> Piece:
    """The piece of a task in words, TASK or TASK=SIZE; `model` makes the entrant that learns it. ValueError."""
    kind, _, size = words.partition("=")
    known = [name for name in TASKS if name != Capacity.name]
    if kind not in known:
        raise ValueError(f"no task '{kind}' to compare by; there are {', '.join(known)}")
    sizes = (size,) if size else ()
    # To the end, however soon it is learned: what holds beyond the training length also goes by the tokens trained on.
    asked = Recall(cast(Any, kind), sizes, tokens=tokens, factors=FACTORS, batch_tokens=BATCH, stop_at=NEVER)
    found = asked.tasks()
    if len(found) > 1:
        sizes = ", ".join(f"{kind}={one.size}" for one in found)
        raise ValueError(f"'{words}' has several sizes; choose one, or more, of {sizes}")
    mine = asked.lesson(model(found[0]), found[0], name, seed)
    return Piece(mine, {"mixer": name, "task": words}, seed)


def run_piece(
    piece: Cell | Piece, claim: Claim, device: str | None, stop: Callable[[], bool], told: Told
) -> dict[str, Any]:
    """The result of a training on text or of a lesson. `Stopped` once `stop()` is true."""
    if isinstance(piece, Cell):
        return run_cell(piece, claim, device, stop, told)
    return _run_lesson(piece, claim, device, stop, told)


def _run_lesson(piece: Piece, claim: Claim, device: str | None, stop: Callable[[], bool], told: Told) -> dict[str, Any]:
    """Learn and ask. What was learned is given up where it stops: a lesson is minutes."""
    started, began, worked = files.utc(), time.monotonic(), time.process_time()
    chosen = changed(piece.lesson, device=str(device_of(device)))

    def progress(stage: str, done: int, of: int) -> None:
        told(stage, done, of)
        if stop():
            raise Stopped(f"stopped at {stage}")

    rows = run_measurements("recall", [chosen.measurement()], software(), progress=progress)
    told_elsewhere = ("mixer", "size", "rate")
    plain = [{key: value for key, value in row.items() if key not in told_elsewhere} for row in rows]
    return {
        "cell": piece.id,
        "factors": piece.factors,
        "seed": piece.seed,
        "metrics": suite_metrics({"recall": plain}),
        "rows": rows,
        "provenance": software() | {"attempt": claim.number, "worker": worker()},
        "started": started,
        "seconds": round(time.monotonic() - began, 3),
        "processor_seconds": round(time.process_time() - worked, 3),
    }
