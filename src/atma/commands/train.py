"""`atma train`: run a recipe."""

from pathlib import Path
from typing import Annotated

import tyro

from atma.config import Recipe, assign, from_dict, load_recipe, to_dict

ASSIGNMENTS = tyro.conf.arg(name="set", metavar="KEY=VALUE ...")


def run(
    recipe: Path,
    /,
    out: Path | None = None,
    resume: bool = False,
    assignments: Annotated[tuple[str, ...], ASSIGNMENTS] = (),
    tensorboard: bool = False,
    device: str | None = None,
    evaluate: bool = False,
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
        evaluate: At the end measure the model as [evaluation] of the recipe says; rows go into evaluation.jsonl.
    """
    from atma.commands.trained import announce, measured
    from atma.device import device_of
    from atma.train import export_tensorboard, terminal_progress, train

    device_of(device)
    chosen = load_recipe(recipe, assignments)
    folder = out or Path("runs") / chosen.name
    announce(chosen, evaluate)
    final = train(chosen, folder, resume, terminal_progress(), device)
    if tensorboard:
        export_tensorboard(folder, folder / "tensorboard")
    print(f"trained: {final}\ntry it: atma generate --model {folder} PROMPT")
    measured(chosen, folder, device, evaluate)


def override(recipe: Recipe, assignments: tuple[str, ...]) -> Recipe:
    """The recipe with settings "table.key=value" changed; a value is TOML, or else text. ValueError as for a recipe."""
    values = to_dict(recipe)
    assign(values, assignments)
    return from_dict(Recipe, values)
