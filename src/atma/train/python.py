"""`train_model`: a run from Python in one call, and what one holds of it. The same code as `atma train`."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atma.config import Recipe, assign, identity, recipe_of
from atma.device import device_of
from atma.display import facts_html, facts_text
from atma.loading import Loaded, load
from atma.report.chart import Chart
from atma.report.content import Run, Section
from atma.report.figures import training
from atma.strict import toml_value
from atma.threads import settle
from atma.train.folder import recipe_of as recipe_of_run
from atma.train.loop import train
from atma.train.progress import terminal_progress
from atma.train.record import read_record
from atma.train.resume import recorded_threads
from atma.train.start import filled, load_run_recipe

if TYPE_CHECKING:
    from atma.model import Model


def train_model(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    *,
    set: Mapping[str, Any] | None = None,
    resume: bool = False,
    device: str | None = None,
    threads: int | None = None,
) -> "TrainingRun":
    """Train the model that a recipe describes, into a run folder, and return the run.

        run = train_model("recipes/nano.toml", "runs/mine", set={"train.tokens": 100_000})

    recipe: a shipped recipe by its name, such as "own-data", a TOML file as of `atma train`, its tables as a dict, or a
    `Recipe`. out: the run folder; runs/NAME of the recipe by default. set: settings of the recipe to change, by
    "table.key". resume: go on from the newest good checkpoint in the folder; a finished run is returned as it is.
    device: "cpu" or "cuda"; by default a GPU if there is one. threads: PyTorch's, while it trains; by default, as with
    the command, those of OMP_NUM_THREADS, or that the run began with, or that measure fastest, for its bits depend on
    them. A bar shows the progress in a notebook or terminal, a line every ten seconds elsewhere.
    ValueError: a key or value of the recipe that cannot be, data that are not there, a folder with another run, or no
    such device. KeyboardInterrupt leaves the last checkpoint, from which resume goes on.
    """
    device_of(device, "device")
    chosen = recipe_from(recipe, set or {})
    folder = Path(out) if out is not None else Path("runs") / chosen.name
    with _settled(threads, recorded_threads(folder) if resume else 0):
        train(chosen, folder, resume, terminal_progress(), device)
    return TrainingRun(folder)


@contextlib.contextmanager
def _settled(threads: int | None, kept: int) -> Iterator[None]:
    """With the threads of `atma train`; afterwards the process has its own again."""
    if threads is not None and threads < 1:
        raise ValueError(f"'threads' must be at least 1, not {threads}")
    before = torch.get_num_threads()
    try:
        settle(threads or 0, kept)
        yield
    finally:
        torch.set_num_threads(before)


def recipe_from(recipe: str | Path | Mapping[str, Any] | Recipe, settings: Mapping[str, Any]) -> Recipe:
    """A recipe by any of its forms, with settings "table.key" changed. ValueError says which key is wrong."""
    if not isinstance(recipe, str | Path | Mapping | Recipe):
        raise ValueError(f"'recipe' must be a shipped recipe's name, a file, a dict or an atma.Recipe, not {recipe!r}")
    if not isinstance(settings, Mapping):
        raise ValueError(f"'set' must be a dict, such as {{'train.tokens': 100_000}}, not {settings!r}")
    assignments = [f"{key}={_said(key, value)}" for key, value in settings.items()]
    if isinstance(recipe, str | Path):
        return load_run_recipe(recipe, assignments)
    if isinstance(recipe, Recipe):
        from atma.strict import from_dict, to_dict

        values = {name: table for name, table in to_dict(recipe).items() if table is not None}
        assign(values, assignments)
        return from_dict(Recipe, values)
    values = {name: dict(table) if isinstance(table, Mapping) else table for name, table in recipe.items()}
    assign(values, assignments)
    return recipe_of(filled(values))


class TrainingRun:
    """A finished run: its `folder`, `recipe`, record and model. ValueError: the folder holds none."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.recipe: Recipe = recipe_of_run(self.folder)
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        """The final model with its tokenizer, as `atma.load` gives it; read when first asked for."""
        if self._loaded is None:
            self._loaded = load(self.folder)
        return self._loaded

    @property
    def model(self) -> "Model":
        """The final model, ready to evaluate."""
        return self.loaded.model

    @property
    def record(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl: "kind" is train, validation or event; losses in nats a token."""
        return read_record(self.folder)

    def curve(self) -> Chart:
        """Training and validation loss by tokens seen. ValueError: the record holds no losses."""
        figure = training(Section("", [Run(self.recipe.name, self.recipe, metrics=self.record)]))
        if figure is None:
            raise ValueError(f"{self.folder}: its record holds no losses")
        return Chart(f"Training of {self.recipe.name}", [figure], {"recipe": identity(self.recipe)})

    def facts(self) -> dict[str, str]:
        """What became of it, by name."""
        rows, train = self.record, self.recipe.train
        facts = {
            "folder": str(self.folder),
            "layers": self.recipe.model.facts()["layers"],
            "trained length": f"{train.length:,} tokens",
            "steps": f"{train.steps:,} of {train.batch_tokens:,} tokens",
        }
        for kind, words in (("train", "last training loss"), ("validation", "validation loss")):
            losses = [row["loss"] for row in rows if row["kind"] == kind and row["loss"] is not None]
            facts |= {words: f"{losses[-1]:.3f} nats a token"} if losses else {}
        return facts

    def __repr__(self) -> str:
        return facts_text(f"TrainingRun {self.recipe.name}", self.facts())

    def _repr_html_(self) -> str:
        return facts_html(f"TrainingRun {self.recipe.name}", self.facts())


def _said(key: str, value: Any) -> str:
    """A value as `--set` has it. ValueError: it is none of a recipe."""
    if isinstance(value, Path):
        value = str(value)
    if isinstance(value, bool | int | float | str | list | tuple):
        return toml_value(value)
    raise ValueError(f"'{key}' must be a number, text, truth value or list, not {value!r}")
