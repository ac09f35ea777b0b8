"""The folder of a sweep: a task for each cell, what data it runs on, and the plan that people and pages read.

plan.json                    the cells, their factors and seeds, as last run
data/…json                   the hash of each data set that the first worker saw
cells/ID/claims/             attempts and heartbeats (atma.sweep.task)
cells/ID/run-000001/         the run folder of an attempt
cells/ID/result.json         the one result, or
cells/ID/failed.json         the error that ended the last attempt
logs/                        what local workers said
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from atma.disk import content, destination
from atma.sweep import files
from atma.sweep.cells import label
from atma.sweep.recipe import Scalar, SweepConfig
from atma.sweep.task import FAILED, RESULT, Limits, Task, process_is_gone

PLAN = "plan.json"
State = Literal["done", "failed", "running", "stale", "waiting"]


class Piece(Protocol):
    """Something to be done once, and how it is known: by its id, and to people by its levels and its seed."""

    @property
    def id(self) -> str: ...
    @property
    def factors(self) -> dict[str, Scalar]: ...
    @property
    def seed(self) -> int: ...
    @property
    def label(self) -> str: ...


class Plan(Protocol):
    """All pieces, in the order they are to be done, and when to give one up."""

    @property
    def name(self) -> str: ...
    @property
    def config(self) -> SweepConfig: ...
    @property
    def cells(self) -> Sequence[Piece]: ...


@dataclass(frozen=True)
class Standing:
    """How one cell stands. `doing` is what its worker last said: a stage, how much is done, and of how much."""

    cell: str
    label: str
    state: State
    attempts: int
    doing: dict[str, Any]
    worker: dict[str, Any]


class Ledger:
    """A sweep's folder. Opening it needs no recipe: the plan says which cells there are."""

    def __init__(self, folder: Path, limits: Limits, cells: dict[str, str]) -> None:
        """cells: the label of each cell's id, in order."""
        self.folder, self.limits, self.cells = folder, limits, cells

    @classmethod
    def create(cls, folder: Path, sweep: Plan) -> "Ledger":
        """The folder of this sweep, made if it is not there, its plan as the recipe now says.

        ValueError when the folder holds something else.
        """
        folder = destination(folder)
        if content(folder) and not (folder / PLAN).exists():
            raise ValueError(f"{folder}: not empty and not a sweep; choose another folder")
        limits = Limits(sweep.config.attempts, sweep.config.deaths, sweep.config.lease)
        cells = [{"cell": cell.id, "factors": cell.factors, "seed": cell.seed} for cell in sweep.cells]
        plan = {"name": sweep.name, "limits": asdict(limits), "cells": cells}
        if files.read(folder / PLAN) != plan:
            files.replace(folder / PLAN, plan)
        return cls(folder, limits, {cell.id: cell.label for cell in sweep.cells})

    @classmethod
    def open(cls, folder: Path) -> "Ledger":
        """The folder of a sweep that was begun. ValueError when it is none."""
        plan = files.read(folder / PLAN)
        if plan is None:
            raise ValueError(f"{folder}: no sweep here: no {PLAN}; begin it with `atma sweep run`")
        try:
            cells = {cell["cell"]: label(cell["factors"], cell["seed"]) for cell in plan["cells"]}
            return cls(folder, Limits(**plan["limits"]), cells)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{folder / PLAN}: not the plan of a sweep, or damaged") from None

    def task(self, cell: str) -> Task:
        """The task of a cell."""
        return Task(self.folder / "cells" / cell, self.limits)

    def results(self) -> list[dict[str, Any]]:
        """The results so far, in the order of the plan."""
        found = [self.task(cell).result() for cell in self.cells]
        return [result for result in found if result is not None]

    def failures(self) -> list[tuple[str, dict[str, Any]]]:
        """Label and failure of every cell that has been given up."""
        found = [(name, self.task(cell).failure()) for cell, name in self.cells.items()]
        return [(name, failure) for name, failure in found if failure is not None]

    def finished(self) -> bool:
        """Whether every cell has a result or has been given up."""
        return all(self.task(cell).finished() for cell in self.cells)

    def retry(self) -> int:
        """Let the cells that were given up be tried again; returns how many."""
        return sum(self.task(cell).retry() for cell in self.cells)

    def require_data(self, path: str, found: str) -> None:
        """Note that the sweep runs on the data `path` whose hash is `found`; ValueError if it began on other data."""
        note = self.folder / "data" / f"{hashlib.sha256(path.encode()).hexdigest()[:16]}.json"
        if files.create_once(note, {"path": path, "hash": found}):
            return
        began = (files.read(note) or {}).get("hash")
        if began != found:
            raise ValueError(
                f"{path}: other data (hash {found[:16]}) than the sweep began with ({str(began)[:16]}); "
                "bring that data here, or choose another folder for the sweep"
            )

    def standings(self) -> list[Standing]:
        """How every cell stands now. Stale: its worker's heartbeat is older, by the disk's clock, than a lease.

        A disk that takes no file (read-only, another's, full) does not tell its clock: this machine's is then the best.
        """
        try:
            now = files.disk_time(self.folder)
        except OSError:
            now = time.time()
        return [self._standing(cell, name, now) for cell, name in self.cells.items()]

    def _standing(self, cell: str, name: str, now: float) -> Standing:
        task = self.task(cell)
        if (task.folder / RESULT).exists():
            return Standing(cell, name, "done", 0, {}, {})
        if (task.folder / FAILED).exists():
            return Standing(cell, name, "failed", 0, {}, {})
        past = task.attempts()
        if not past or past[-1].end:
            return Standing(cell, name, "waiting", len(past), {}, {})
        beat = task.beat_path(past[-1].number)
        try:
            silent = now - beat.stat().st_mtime
            doing = files.read(beat) or {}
        except FileNotFoundError:
            silent, doing = 0.0, {}
        gone = process_is_gone(past[-1].worker) or silent > self.limits.lease
        return Standing(cell, name, "stale" if gone else "running", len(past), doing, past[-1].worker)


def counts(standings: list[Standing]) -> Counter[str]:
    """How many cells are in each state."""
    return Counter(standing.state for standing in standings)
