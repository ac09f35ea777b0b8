"""`atma train`: run a recipe."""

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from atma.commands.sweep import JOB
from atma.config import Recipe, assign, from_dict, load_values, to_dict, with_words
from atma.strict import toml_value

if TYPE_CHECKING:
    from atma.launching import Request
    from atma.train.trackers import Followed

ASSIGNMENTS = tyro.conf.arg(name="set", metavar="KEY=VALUE ...")
FROM = tyro.conf.arg(name="from")


@dataclass(frozen=True)
class Machine:
    """Where to train."""

    device: str | None = None
    """cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default."""
    threads: int = 0
    """Processor threads; measured by default, and kept when a run goes on, because its bits depend on them."""
    launch: Literal["here", "slurm", "ray"] = "here"
    """Where the processes run: here, or as a job of slurm or ray, which must share the run folder. docs/scaling.md."""
    job: Annotated[tuple[str, ...], JOB] = ()
    """What to ask the cluster for, such as nodes=2 processes_per_node=8 slurm_partition=gpu timeout_min=600."""

    def words(self) -> list[str]:
        """Of each process, on its command line."""
        device = ["--device", self.device] if self.device is not None else []
        return [*device, *(["--threads", str(self.threads)] if self.threads else [])]


@dataclass(frozen=True)
class Watching:
    """What is shown and measured besides."""

    track: tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...] = ()
    """Trackers that follow the run live: tensorboard, wandb, mlflow, trackio. One that fails is told and left out."""
    tensorboard: bool = False
    """The same as --track tensorboard: event files in tensorboard/ of the run folder."""
    evaluate: bool = False
    """At the end measure the model as [evaluation] of the recipe says; rows go into evaluation.jsonl."""

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, each once."""
        return list(dict.fromkeys([*self.track, *["tensorboard"] * self.tensorboard]))

    def words(self) -> list[str]:
        """The same on a command line."""
        track = ["--track", *self.trackers] if self.trackers else []
        return [*track, *["--evaluate"] * self.evaluate]


def run(
    recipe: Path | None = None,
    /,
    out: Path | None = None,
    resume: bool = False,
    assignments: Annotated[tuple[str, ...], ASSIGNMENTS] = (),
    watching: Annotated[Watching, tyro.conf.OmitArgPrefixes] = Watching(),
    machine: Annotated[Machine, tyro.conf.OmitArgPrefixes] = Machine(),
    start: Annotated[str | None, FROM] = None,
) -> None:
    """Train the model that a recipe describes, or fine-tune one that there is.

    Writes a run folder: the recipe as run, metrics.jsonl, checkpoints, and at the end the model in final/. A run that
    was stopped, in whatever way, goes on with --resume and ends with the same bits. SIGTERM, Ctrl-C and SIGHUP write a
    checkpoint first; a second one ends at once.

    Args:
        recipe: A shipped recipe by its name, such as own-data, or a TOML file with the tables model, data, train,
            evaluation and lora. With --resume and --out it may be left out: the folder's own is taken.
        out: The run folder; runs/NAME of the recipe by default.
        resume: Go on from the newest good checkpoint in the run folder; longer, if train.tokens is set to more.
        assignments: Change settings of the recipe, such as train.tokens=100000 model.core=rope.
        watching: What is shown and measured besides.
        machine: Where to train.
        start: A model folder, run or packaged model to start from: its weights and configuration, so that the recipe
            needs no [model]. docs/fine-tuning.md tells more.
    """
    from atma.launching import read
    from atma.signals import noticing

    request = read(machine.launch, machine.job)
    if request is not None:
        changes = _with_start(assignments, start)
        _launched(request, recipe, out, resume, changes, watching, machine)
        return
    with noticing() as asked:  # first of all: the imports take seconds
        from atma import threads as processor_threads
        from atma.commands.trained import announce, ended
        from atma.device import device_of
        from atma.train import Stopped, train
        from atma.train.resume import recorded_threads

        device_of(machine.device)
        chosen = _chosen(recipe, out, resume, _with_start(assignments, start))
        folder = out or Path("runs") / chosen.name
        announce(chosen, watching.evaluate)
        progress = _progress(watching, chosen, folder)
        settled = processor_threads.settle(machine.threads, recorded_threads(folder) if resume else 0)
        if _speaks():
            print(settled, flush=True)
        try:
            with progress:
                final = train(chosen, folder, resume, progress, machine.device, asked)
        except Stopped as stopped:
            if _speaks():
                again = f"atma train --resume --out {shlex.quote(str(folder))}"
                print(f"atma: {stopped}; go on with: {again}", file=sys.stderr)
            raise SystemExit(asked.status) from None
    ended(chosen, folder, final, machine.device, watching.evaluate)


def _launched(
    request: "Request",
    recipe: Path | None,
    out: Path | None,
    resume: bool,
    assignments: tuple[str, ...],
    watching: Watching,
    machine: Machine,
) -> None:
    """Have a cluster run the same command, and show how it goes until it has ended."""
    from atma.commands.trained import summary
    from atma.train import terminal_progress
    from atma.train.launched import FOLDER, follow, launch

    chosen = _chosen(recipe, out, resume, assignments)
    folder = out or Path("runs") / chosen.name
    line = ["train", *([] if recipe is None else [str(recipe)]), "--out", str(folder), *["--resume"] * resume]
    line += [*(["--set", *assignments] if assignments else []), *watching.words(), *machine.words()]
    jobs = launch(request, line, folder, machine.threads or 1)
    count = f"{request.processes} process{'' if request.processes == 1 else 'es'}"
    print(f"{jobs.told()}: {count}, logs in {folder / FOLDER}", flush=True)
    try:
        final = follow(jobs, folder, terminal_progress())
    except KeyboardInterrupt:
        jobs.cancel()
        again = f"atma train --resume --out {shlex.quote(str(folder))}"
        print(f"atma: {jobs.told()}: told to stop; go on, here or anywhere, with: {again}", file=sys.stderr)
        raise
    print(f"trained: {summary(folder)}, model in {final}")


def _progress(watching: Watching, recipe: Recipe, folder: Path) -> "Followed":
    """What shows the run, and tells the trackers of it where this process speaks for all."""
    from atma.train import terminal_progress
    from atma.train.progress import Silent
    from atma.train.trackers import followed

    if not _speaks():
        return followed(Silent(), [], recipe, folder)
    return followed(terminal_progress(), watching.trackers, recipe, folder)


def _speaks() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _with_start(assignments: tuple[str, ...], start: str | None) -> tuple[str, ...]:
    """The settings with the model to start from. ValueError: it is said twice."""
    if start is None:
        return assignments
    if any(one.partition("=")[0].strip() == "train.init_from" for one in assignments):
        raise ValueError("--from and --set train.init_from say the same; keep one")
    return (*assignments, f"train.init_from={toml_value(start)}")


def _chosen(recipe: Path | None, out: Path | None, resume: bool, assignments: tuple[str, ...]) -> Recipe:
    """The recipe of a file, or of the run to resume, with settings changed."""
    from atma.train.start import load_run_recipe

    if recipe is not None:
        if "sweep" in load_values(recipe):
            raise ValueError(f"{recipe}: a sweep, which is run by: atma sweep run {shlex.quote(str(recipe))}")
        chosen = load_run_recipe(recipe, assignments)
    elif not resume or out is None:
        raise ValueError("name a recipe, such as own-data or my.toml; or a run to go on with: --resume --out runs/NAME")
    else:
        from atma.train.folder import recipe_of

        chosen = override(recipe_of(out), assignments)
    tokens = next((one for one in assignments if one.partition("=")[0].strip() == "train.tokens"), None)
    if tokens and chosen.train.epochs:
        raise ValueError(f"--set {tokens}: the recipe counts in epochs: set train.epochs, or train.epochs=0 besides")
    return chosen


def override(recipe: Recipe, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with settings "table.key=value" changed; a value is TOML, or else text. ValueError as for a recipe."""
    values = {name: table for name, table in to_dict(recipe).items() if table is not None}
    assign(values, assignments)
    return with_words(lambda: from_dict(Recipe, values))
