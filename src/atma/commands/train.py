"""`atma train`: run a recipe."""

from pathlib import Path
from typing import Annotated

import tyro

from atma.config import Recipe, from_dict, load_recipe, to_dict
from atma.strict import read_value

ASSIGNMENTS = tyro.conf.arg(name="set", metavar="KEY=VALUE ...")


def run(
    recipe: Path,
    /,
    out: Path | None = None,
    resume: bool = False,
    assignments: Annotated[tuple[str, ...], ASSIGNMENTS] = (),
    tensorboard: bool = False,
    device: str | None = None,
    threads: int = 0,
) -> None:
    """Train the model that a recipe describes.

    Writes a run folder: the recipe as run, metrics.jsonl, checkpoints, and at the end the model in final/. A run that
    was stopped, in whatever way, goes on with --resume and ends with the same bits.

    Args:
        recipe: A TOML file with the tables model, data, train and evaluation; see recipes/.
        out: The run folder; runs/NAME of the recipe by default.
        resume: Go on from the newest good checkpoint in the run folder.
        assignments: Change settings of the recipe, such as train.tokens=100000 model.core=rope.
        tensorboard: Also write the record for TensorBoard, into tensorboard/ of the run folder.
        device: Where to train, such as cpu or cuda; a GPU if there is one by default.
        threads: Processor threads; measured by default, and kept when a run goes on, because its bits depend on them.
    """
    from atma import threads as processor_threads
    from atma.device import device_of
    from atma.train import export_tensorboard, terminal_progress, train
    from atma.train.resume import recorded_threads

    device_of(device)
    chosen = override(load_recipe(recipe), assignments)
    folder = out or Path("runs") / chosen.name
    print(processor_threads.settle(threads, recorded_threads(folder) if resume else 0), flush=True)
    final = train(chosen, folder, resume, terminal_progress(), device)
    if tensorboard:
        export_tensorboard(folder, folder / "tensorboard")
    print(f"trained: {final}\ntry it: atma generate --model {folder} PROMPT")


def override(recipe: Recipe, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with settings "table.key=value" changed; a value is TOML, or else text. ValueError as for a recipe."""
    values = to_dict(recipe)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals or not path.strip():
            raise ValueError(f"--set {assignment}: write KEY=VALUE, such as train.tokens=100000")
        *tables, key = path.strip().split(".")
        table = values
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ValueError(f"--set {assignment}: '{name}' is no table of a recipe")
        table[key] = read_value(text)
    return from_dict(Recipe, values)
