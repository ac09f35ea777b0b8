"""One cell from its recipe to its result: trained, measured, written down; going on from what a dead worker left.

Every attempt has a run folder of its own, so a worker that was taken for dead and lives on writes nowhere but into its
own. A later attempt begins with the newest good checkpoint of the one before, linked into its folder, and ends with the
same bits as one that was never stopped.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from atma.data.dataset import TokenSet
from atma.eval import OwnModel, evaluate
from atma.eval.provenance import provenance
from atma.loading import load
from atma.strict import to_dict
from atma.sweep import files
from atma.sweep.cells import Cell
from atma.sweep.metrics import flat_metrics, suite_metrics
from atma.sweep.suites import measure, options
from atma.sweep.task import Claim, Task, worker
from atma.train import Stopped, train
from atma.train.record import NAME as RECORD
from atma.train.resume import FOLDER as CHECKPOINTS
from atma.train.resume import newest_checkpoint

ROWS, RECIPE = "rows.jsonl", "recipe.toml"
Values = dict[str, Any]


class Told(Protocol):
    """Hears what a cell is doing: a stage, how much of it is done, and of how much."""

    def __call__(self, stage: str, done: int, of: int) -> None: ...


def run_cell(cell: Cell, claim: Claim, device: str | None, stop: Callable[[], bool], told: Told) -> Values:
    """Train and measure one cell; returns its result. `Stopped` once `stop()` is true, a checkpoint being written."""
    started, began, worked = files.utc(), time.monotonic(), time.process_time()
    folder = run_folder(claim.task.folder, claim.number)
    resume = inherit(claim.task.folder, claim.number)
    train(cell.recipe, folder, resume, _Training(told), device, stop)
    rows, suites, stamp = _measure(cell, folder, device, stop, told)
    stamp |= {"attempt": claim.number, "resumed": resume, "worker": worker()}
    asked = {name: {"options": chosen, "rows": suites[name]} for name, chosen in options(cell.suites).items()}
    return {
        "cell": cell.id,
        "factors": cell.factors,
        "seed": cell.seed,
        "metrics": flat_metrics(rows, folder) | suite_metrics(suites),
        "rows": rows,
        **({"suites": asked} if asked else {}),
        "config": to_dict(cell.recipe),
        "provenance": stamp,
        "started": started,
        "seconds": round(time.monotonic() - began, 3),
        "processor_seconds": round(time.process_time() - worked, 3),
    }


def run_folder(cell: Path, attempt: int) -> Path:
    """Where an attempt trains."""
    return cell / f"run-{attempt:06}"


def inherit(cell: Path, attempt: int) -> bool:
    """Begin an attempt's run folder with the newest good checkpoint of an earlier one; False where there is none."""
    for number in range(attempt - 1, 0, -1):
        old = run_folder(cell, number)
        checkpoint = newest_checkpoint(old)[0] if (old / RECIPE).is_file() else None
        if checkpoint is None:
            continue
        new = run_folder(cell, attempt)
        staging = new.with_name(f".{new.name}")
        shutil.rmtree(staging, ignore_errors=True)
        shutil.copytree(checkpoint, staging / CHECKPOINTS / checkpoint.name, copy_function=os.link)
        for name in (RECIPE, RECORD, ROWS):
            if (old / name).is_file():
                shutil.copyfile(old / name, staging / name)
        staging.rename(new)
        return True
    return False


def tidy(task: Task, keep_model: bool) -> None:
    """Once there is a result: keep its attempt's training record and final model, or not even that; no other's."""
    attempt = (task.result() or {}).get("provenance", {}).get("attempt")
    if attempt is None:
        return
    kept = run_folder(task.folder, attempt)
    for folder in [*task.folder.glob("run-*"), *task.folder.glob(".run-*")]:
        if folder != kept:
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(kept / CHECKPOINTS, ignore_errors=True)
    if not keep_model:
        shutil.rmtree(kept / "final", ignore_errors=True)


def _measure(
    cell: Cell, folder: Path, device: str | None, stop: Callable[[], bool], told: Told
) -> tuple[list[Values], dict[str, list[Values]], Values]:
    """Rows of the recipe's evaluation, rows of each suite, and what the evaluation was made with."""

    def progress(stage: str, done: int, of: int) -> None:
        told(stage, done, of)
        if stop():
            raise Stopped(f"stopped at {stage}")

    loaded = load(folder)
    if device is not None or torch.cuda.is_available():
        loaded.model.to(device or "cuda")
    tokens = TokenSet.open(cell.recipe.data.path, "validation")
    rows = evaluate(loaded, tokens, cell.recipe.evaluation, progress, folder / ROWS)
    where = next(loaded.model.parameters()).device
    suites = dict(measure(cell.suites, OwnModel(loaded), str(where), folder / ROWS, progress))
    return rows, suites, provenance(loaded, tokens, cell.recipe.evaluation.seed)


class _Training:
    """Tells the step of a training run."""

    def __init__(self, told: Told) -> None:
        self._told, self._steps = told, 0

    def start(self, name: str, steps: int, done: int) -> None:
        self._steps = steps
        self._told("training", done, steps)

    def show(self, row: dict[str, Any]) -> None:
        self._told("training", row["step"], self._steps)

    def stop(self) -> None:
        pass
