"""`atma extend`: give a trained model length, and report what that brought and cost."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.commands.tables import print_table
from atma.extend.settings import ExtendConfig
from atma.strict import check_fields, require

if TYPE_CHECKING:
    from atma.config import DataConfig, Recipe, TrainConfig
    from atma.loading import Loaded


@dataclass(frozen=True)
class TrainingOptions:
    """What the extension trains on, and what is measured at its end."""

    tokens: int = 600_000
    """Tokens to train on."""
    length: int | None = None
    """Tokens of a training row; those of the model's own training by default, or 2,048."""
    batch_tokens: int | None = None
    """Tokens of a step; those of the model's own training by default, or 16 rows."""
    recall_share: float | None = None
    """Share of rows that are synthetic recall; that of the model's own training by default, or none."""
    seed: int = 0
    factors: tuple[int, ...] = (1, 4, 16, 64)
    """Lengths to measure at, in training rows; none measures nothing."""
    documents: int = 8
    """To measure losses on."""
    needle_trials: int = 32

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tokens", "documents"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        rising = list(self.factors) == sorted(set(self.factors)) and all(factor >= 1 for factor in self.factors)
        require(rising, "factors", self.factors, "rising, each at least 1")


def run(
    model: str,
    out: Path,
    /,
    data: Path = Path("data/stdlib"),
    settings: Annotated[ExtendConfig, tyro.conf.OmitArgPrefixes] = ExtendConfig(),  # noqa: B008
    training: Annotated[TrainingOptions, tyro.conf.OmitArgPrefixes] = TrainingOptions(),
    resume: bool = False,
    device: str | None = None,
    threads: int = 0,
) -> None:
    """Give a trained model length: replace its attention by one that goes on beyond what it was trained on.

    Writes a run folder as `atma train` does: the model is in final/, the report in report.html. A run that was stopped
    goes on with --resume and the same options, and ends with the same bits.

    Args:
        model: A packaged model, a model folder or a run folder, with softmax attention over rotary positions.
        out: The run folder.
        data: A folder made by `atma prepare` with the model's own tokenizer.
        settings: The way, and what of it is to be chosen.
        training: What is trained on, and measured.
        resume: Go on from the newest good checkpoint in the run folder.
        device: cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default.
        threads: Processor threads; measured by default, and kept when a run goes on, because its bits depend on them.
    """
    from atma.signals import noticing

    with noticing() as asked:
        from atma import threads as processor_threads
        from atma.device import device_of
        from atma.extend.run import Extension, extend, recipe_for
        from atma.loading import load_floats
        from atma.train import Stopped, terminal_progress
        from atma.train.resume import recorded_threads

        loaded = load_floats(model)
        text, train = _tables(loaded, settings, training, data)
        recipe = recipe_for(loaded, settings, text, train, out.resolve().name)
        extension = Extension(loaded, recipe, settings)
        print(processor_threads.settle(threads, recorded_threads(out) if resume else 0), flush=True)
        try:
            final = extend(extension, out, resume, terminal_progress(), device_of(device), asked)
        except Stopped as stopped:
            print(f"atma: {stopped}; go on with the same command and --resume", file=sys.stderr)
            raise SystemExit(asked.status) from None
    print(f"extended: {final}\ntry it: atma generate --model {shlex.quote(str(out))} PROMPT", flush=True)
    if training.factors:
        _report(load_floats(model), out, recipe, settings, training)


def _tables(
    loaded: "Loaded", settings: ExtendConfig, training: TrainingOptions, data: Path
) -> "tuple[DataConfig, TrainConfig]":
    """The tables [data] and [train] of the run, filled with those of the model's own training where it tells them."""
    from atma.config import DataConfig, TrainConfig, from_dict
    from atma.extend.run import own_training, rates_of

    known = own_training(loaded)
    length = training.length or known.get("train", {}).get("length") or 2048
    batch = training.batch_tokens or known.get("train", {}).get("batch_tokens") or 16 * length
    share = known.get("data", {}).get("recall_share", 0.0) if training.recall_share is None else training.recall_share
    rates = rates_of(loaded, settings.rate)
    sizes = {"length": length, "batch_tokens": max(length, batch // length * length), "tokens": training.tokens}
    more = {"seed": training.seed, "constant_share": 0.5, "evaluate_every": 50}
    train = from_dict(TrainConfig, sizes | more | rates)
    return DataConfig(path=str(data), recall_share=share), train


def _report(loaded: "Loaded", out: Path, recipe: "Recipe", settings: ExtendConfig, training: TrainingOptions) -> None:
    """Measure before and after, print the table and write the page."""
    from atma.bars import bars
    from atma.config import EvaluationConfig
    from atma.extend.measuring import cost, measure, table, write_page

    lengths = tuple(factor * recipe.train.length for factor in training.factors)
    plan = EvaluationConfig(lengths, training.documents, needle_trials=training.needle_trials, junk=False)
    with bars() as progress:
        rows = measure(loaded, out, recipe, plan, progress)
    head = ["model", "context", "loss", "needles"]
    print_table(f"{recipe.name} ({settings.way})", head, list(table(rows)), "loss: fixed targets, nats a token")
    paid = cost(out, recipe)
    print(f"trained {paid['trained']:,} of {paid['parameters']:,} parameters on {paid['tokens']:,} tokens", end=" ")
    print(f"in {paid['seconds']:,} s\nreport: {write_page(out, recipe, settings, rows, shlex.join(sys.argv))}")
