"""`atma train`: run a recipe."""

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import tyro

from atma.config import Recipe, assign, from_dict, load_recipe, to_dict

ASSIGNMENTS = tyro.conf.arg(name="set", metavar="KEY=VALUE ...")


def run(
    recipe: Path | None = None,
    /,
    out: Path | None = None,
    resume: bool = False,
    assignments: Annotated[tuple[str, ...], ASSIGNMENTS] = (),
    tensorboard: bool = False,
    device: str | None = None,
    evaluate: bool = False,
    threads: int = 0,
) -> None:
    """Train the model that a recipe describes.

    Writes a run folder: the recipe as run, metrics.jsonl, checkpoints, and at the end the model in final/. A run that
    was stopped, in whatever way, goes on with --resume and ends with the same bits. SIGTERM, Ctrl-C and SIGHUP write a
    checkpoint first; a second one ends at once.

    Args:
        recipe: A TOML file with the tables model, data, train and evaluation; see recipes/. With --resume and --out it
            may be left out: the folder's own is taken.
        out: The run folder; runs/NAME of the recipe by default.
        resume: Go on from the newest good checkpoint in the run folder; longer, if train.tokens is set to more.
        assignments: Change settings of the recipe, such as train.tokens=100000 model.core=rope.
        tensorboard: Also write the record for TensorBoard, into tensorboard/ of the run folder.
        device: Where to train, such as cpu or cuda; a GPU if there is one by default.
        evaluate: At the end measure the model as [evaluation] of the recipe says; rows go into evaluation.jsonl.
        threads: Processor threads; measured by default, and kept when a run goes on, because its bits depend on them.
    """
    from atma.signals import noticing

    with noticing() as asked:  # first of all: the imports take seconds
        from atma import threads as processor_threads
        from atma.commands.trained import announce, measured
        from atma.device import device_of
        from atma.train import Stopped, export_tensorboard, terminal_progress, train
        from atma.train.resume import recorded_threads

        device_of(device)
        chosen = _chosen(recipe, out, resume, assignments)
        folder = out or Path("runs") / chosen.name
        announce(chosen, evaluate)
        print(processor_threads.settle(threads, recorded_threads(folder) if resume else 0), flush=True)
        try:
            final = train(chosen, folder, resume, terminal_progress(), device, asked)
        except Stopped as stopped:
            if os.environ.get("RANK", "0") == "0":
                again = f"atma train --resume --out {shlex.quote(str(folder))}"
                print(f"atma: {stopped}; go on with: {again}", file=sys.stderr)
            raise SystemExit(asked.status) from None
    if tensorboard:
        export_tensorboard(folder, folder / "tensorboard")
    print(f"trained: {final}\ntry it: atma generate --model {folder} PROMPT")
    measured(chosen, folder, device, evaluate)


def _chosen(recipe: Path | None, out: Path | None, resume: bool, assignments: tuple[str, ...]) -> Recipe:
    """The recipe of a file, or of the run to resume, with settings changed."""
    if recipe is not None:
        return load_recipe(recipe, assignments)
    if not resume or out is None:
        raise ValueError("name a recipe, such as recipes/nano.toml; or a run to go on with: --resume --out runs/NAME")
    from atma.train.folder import recipe_of

    return override(recipe_of(out), assignments)


def override(recipe: Recipe, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with settings "table.key=value" changed; a value is TOML, or else text. ValueError as for a recipe."""
    values = to_dict(recipe)
    assign(values, assignments)
    return from_dict(Recipe, values)
