"""`atma sweep`: train and measure every combination of a recipe's factors."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from atma.bars import bars

if TYPE_CHECKING:
    from atma.sweep.cells import Sweep
    from atma.sweep.ledger import Ledger

VERBS = {
    "run": ("sweep.run", "run every cell with workers on this machine, or go on"),
    "work": ("sweep.work", "be one worker, beside others that share the folder"),
    "status": ("sweep.status", "show what is done, running, stale and failed, and the time left"),
    "plan": ("sweep.plan", "list the cells and what they cost"),
    "analyse": ("sweep_analysis.analyse", "contrasts, effects, leaders and the Pareto front of a sweep or a table"),
    "dashboard": ("sweep_analysis.dashboard", "one page to explore a sweep or a table in a browser"),
}

JOB = tyro.conf.arg(metavar="KEY=VALUE ...")
"""Shown in help of what is asked of a cluster."""


def run(
    recipe: Path,
    /,
    out: Path | None = None,
    workers: int = 1,
    threads: int | None = None,
    device: str | None = None,
    retry: bool = False,
    launch: Literal["here", "slurm", "ray"] = "here",
    job: Annotated[tuple[str, ...], JOB] = (),
) -> None:
    """Run every cell of a sweep with workers on this machine or a cluster; go on where it was stopped, in whatever way.

    Args:
        recipe: A shipped sweep by its name, such as sweep-nano, or a TOML file with the tables of a recipe and [sweep].
        out: The folder of the sweep; runs/NAME of the recipe by default.
        workers: Processes that work on cells.
        threads: Threads of each; the cores divided by the workers by default, one where a cluster runs them.
        device: cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default.
        retry: Try the cells again that failed before.
        launch: Where the workers run: here, or as jobs of slurm or ray, which must share the sweep's folder.
        job: What to ask the cluster for, such as gpus_per_node=1 slurm_partition=long, or address=auto for ray.
    """
    from atma.device import device_of
    from atma.launching import read
    from atma.sweep.cells import load_sweep
    from atma.sweep.controller import Controller, Crew
    from atma.sweep.data import check_data, prepare_data
    from atma.sweep.display import display
    from atma.sweep.files import remove_abandoned
    from atma.sweep.launch import run_jobs
    from atma.sweep.ledger import Ledger

    request = read(launch, job)
    if request is None:
        device_of(device)
        crew = Crew.choose(workers, threads, device)
    else:
        crew = Crew(workers, 1 if threads is None else threads, device)
    sweep = load_sweep(recipe)
    with bars() as progress:
        prepare_data(sweep, progress)
    _tell_limits(sweep)
    ledger = Ledger.create(out or Path("runs") / sweep.name, sweep)
    check_data(sweep, ledger)
    remove_abandoned(ledger.folder)
    if retry:
        print(f"{ledger.retry()} failed cells to try again")
    with display() as shown:
        if request is None:
            Controller(recipe, ledger, crew, shown).go()
        else:
            run_jobs(request, crew, recipe, ledger, shown)
    _tell_failures(ledger)


def work(
    recipe: Path,
    /,
    out: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    parent: int | None = None,
) -> None:
    """Be one worker of a sweep, beside any others, on this machine or on another that shares the folder.

    SIGTERM and Ctrl-C write a checkpoint and give the cell back.

    Args:
        recipe: The sweep's recipe.
        out: The folder of the sweep, on a disk that all workers share; runs/NAME of the recipe by default.
        threads: Threads to compute with.
        device: cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default.
        parent: Stop when the process of this number, which must be the one that starts this, ends.
    """
    import torch

    from atma.device import device_of
    from atma.sweep.cells import load_sweep
    from atma.sweep.data import check_data
    from atma.sweep.ledger import Ledger
    from atma.sweep.worker import Worker

    device_of(device)
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads}: at least 1")
        torch.set_num_threads(threads)
    sweep = load_sweep(recipe)
    _tell_limits(sweep)
    ledger = Ledger.create(out or Path("runs") / sweep.name, sweep)
    check_data(sweep, ledger)
    Worker(sweep, ledger, device, parent, lambda text: print(text, flush=True)).go()


def status(target: Path, /, out: Path | None = None) -> None:
    """Show how a sweep stands: counts, who works on what, failures, time left.

    Args:
        target: The folder of the sweep, or its recipe.
        out: With a recipe, the folder of the sweep; runs/NAME of the recipe by default.
    """
    from rich.console import Console

    from atma.sweep.status import Follower, table

    follower = Follower(_ledger(target, out))
    follower.look()
    Console().print(table(follower))
    _tell_failures(follower.ledger)


def plan(recipe: Path, /, out: Path | None = None, measure: bool = False) -> None:
    """List a sweep's cells, their number, and what they cost.

    Args:
        recipe: The sweep's recipe.
        out: The folder of the sweep, whose finished cells tell what one takes; runs/NAME of the recipe by default.
        measure: Train some steps of the first cell on this machine, on one process, to estimate with.
    """
    from atma.sweep.cells import load_sweep
    from atma.sweep.data import check_evaluations
    from atma.sweep.estimate import estimate

    sweep = load_sweep(recipe)
    limits = check_evaluations(sweep)
    for cell in sweep.cells:
        print(f"{cell.id}  {cell.label}")
    for line in [*estimate(sweep, out or Path("runs") / sweep.name, measure), *limits]:
        print(line)


def _ledger(target: Path, out: Path | None) -> "Ledger":
    from atma.sweep.cells import load_sweep
    from atma.sweep.ledger import Ledger

    return Ledger.open(target if target.is_dir() else out or Path("runs") / load_sweep(target).name)


def _tell_limits(sweep: "Sweep") -> None:
    """Print what cells have too little text for. ValueError: one could never be measured."""
    from atma.sweep.data import check_evaluations

    for line in check_evaluations(sweep):
        print(line)


def _tell_failures(ledger: "Ledger") -> None:
    for name, failure in ledger.failures():
        print(f"failed: {name}: {failure.get('error')}")
