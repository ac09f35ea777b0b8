"""Models trained side by side, a step each in turn: all have had the same tokens, and a slow moment falls on all.

After every step the rest is planned again, so that the rate falls to zero when the time is up.
"""

import statistics
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from atma.checkpoint import save_model
from atma.config import Recipe, TrainConfig, identity
from atma.demo.pace import Stage, steps_in
from atma.model import Model
from atma.strict import to_dict
from atma.train import read_record, train
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.precision import choose_precision
from atma.train.record import NAME, Record
from atma.train.schedule import rate_multiplier
from atma.train.source import Source, open_source
from atma.train.step import Stepper, generator, validation_loss

LEAST_STEPS, PROBE_STEPS, VALIDATIONS, RECENT = 2, 6, 4, 8


class Learner:
    """One model in training, with its record in a folder."""

    def __init__(self, recipe: Recipe, folder: Path, source: Source) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.recipe, self.folder, self.source, self.done = recipe, folder, source, 0
        self.model = Model(recipe.model, generator(2, recipe.train.seed))
        self.compute = choose_precision(recipe.train.precision, torch.device("cpu"), recipe.model.width)
        optimisers = Optimisers(self.model, recipe.train)
        self.stepper = Stepper(self.model, optimisers, recipe.train, self.compute, Ranks())

    def advance(self, train: TrainConfig, seconds: Callable[[], float]) -> None:
        """The next step of the schedule that `train` now is; `seconds` is the clock."""
        began, rate = seconds(), rate_multiplier(self.done, train)
        outcome = self.stepper(self.done, self.source.train(self.done), rate)
        self.done += 1
        speed = train.batch_tokens / max(seconds() - began, 1e-9)
        row = {"tokens": self.tokens, "loss": outcome.loss, "rate": rate, "grad_norm": outcome.grad_norm}
        self._write("train", row | {"tokens_per_second": round(speed, 1)})

    def validate(self) -> float:
        """Loss of the validation batches, written to the record too."""
        source = self.source
        loss = validation_loss(self.stepper, (source.validation(i) for i in range(source.validation_batches)))
        self._write("validation", {"tokens": self.tokens, "loss": loss})
        return loss

    def finish(self, train: TrainConfig) -> Recipe:
        """Write the model folder, and return the recipe as it was trained in the end."""
        made = replace(self.recipe, train=train)
        extra: dict[str, Any] = {"name": made.name, "identity": identity(made), "data": self.source.hash}
        extra |= {"step": self.done, "tokens": self.tokens, "recipe": to_dict(made)}
        save_model(self.folder / "final", self.model, self.source.tokenizer, extra)
        return made

    @property
    def tokens(self) -> int:
        return self.done * self.recipe.train.batch_tokens

    def _write(self, kind: str, values: dict[str, float]) -> None:
        with Record(self.folder / NAME) as record:
            record.write(kind, self.done, values)


@dataclass(frozen=True)
class Trained:
    """What came of it: the plan at first and at the end, and the rate at the end (0 but for an early stop)."""

    planned_steps: int
    steps: int
    rate: float
    speed: float
    """Tokens a second, of all models together."""


def train_together(
    learners: Sequence[Learner], stage: Stage, most_steps: int, advance: Callable[[str, int, int], None]
) -> tuple[Trained, TrainConfig]:
    """Train all, as many steps as fit into the stage (two at least); `advance` is told how far it is.

    Returns what came of it, and the schedule that was followed to its end.
    """
    now, recent = stage.pace.now, deque[float](probe(learners, stage), maxlen=RECENT)
    first = max(LEAST_STEPS, steps_in(stage.left, recent, most_steps))
    train, done = replanned(learners[0].recipe.train, 0, first), 0
    began = now()
    while done < train.steps and not (stage.pace.stopped and done >= LEAST_STEPS):
        before = now()
        for learner in learners:
            learner.advance(train, now)
        done += 1
        if done % max(1, -(-train.steps // VALIDATIONS)) == 0 or done == train.steps:
            losses = [f"{learner.recipe.name} {learner.validate():.2f}" for learner in learners]
            advance(f"training: validation loss {', '.join(losses)}", done, train.steps)
        recent.append(now() - before)
        advance("training", done, train.steps)
        if not stage.pace.stopped:
            train = _again(train, done, steps_in(stage.left, recent, most_steps - done))
    rate = rate_multiplier(done, train) if done < train.steps else 0.0
    seconds = max(now() - began, 1e-9)
    tokens = len(learners) * done * train.batch_tokens
    return Trained(first, done, rate, tokens / seconds), replace(train, tokens=done * train.batch_tokens)


def probe(learners: Sequence[Learner], stage: Stage) -> list[float]:
    """Seconds that a step of all takes, measured on copies that nothing else is done with, after a first one."""
    now = stage.pace.now
    with tempfile.TemporaryDirectory() as folder:
        copies = [Learner(one.recipe, Path(folder) / str(i), one.source) for i, one in enumerate(learners)]
        for _ in range(2):
            began = now()
            for copy in copies:
                copy.advance(copy.recipe.train, now)
            seconds = now() - began
    return [seconds]


def replanned(train: TrainConfig, done: int, steps: int) -> TrainConfig:
    """The schedule that goes on from where this one is after `done` steps, and falls to zero at `steps`.

    While the rate has not begun to fall, the level part stays the same share of the whole, and ends now at the latest;
    afterwards the fall becomes steeper or flatter and begins where the rate now is, so that nothing jumps.
    """
    rate = rate_multiplier(done, train)
    level = train.constant_share * steps
    if done > train.constant_share * train.steps or done > level:
        level = steps - (steps - done) / rate if rate > 0 else level
    share = min(1.0, max(0.0, level / steps))
    return replace(train, tokens=steps * train.batch_tokens, constant_share=share)


def training_speed(recipe: Recipe) -> float:
    """Tokens/s of the recipe on this machine: the median of a few steps after the first two."""
    batch = recipe.train.batch_tokens
    settings = replace(recipe.train, tokens=PROBE_STEPS * batch, evaluate_every=0)
    with tempfile.TemporaryDirectory() as folder:
        train(replace(recipe, train=settings), Path(folder) / "probe")
        speeds = [row["tokens_per_second"] for row in read_record(Path(folder) / "probe") if row["kind"] == "train"]
    return statistics.median(speeds[2:])


def learners(recipes: Sequence[Recipe], seeds: int, folder: Path) -> list[Learner]:
    """One for every recipe and seed, in folders by their names."""
    made = []
    for seed in range(seeds):
        for recipe in recipes:
            settings = replace(recipe.train, seed=seed, evaluate_every=1)
            settings = replace(settings, evaluation_tokens=2 * settings.batch_tokens)
            seeded = replace(recipe, train=settings)
            path = folder / f"{recipe.name.replace(' ', '-')}-{seed}"
            made.append(Learner(seeded, path, open_source(seeded, Ranks())))
    return made


def _again(train: TrainConfig, done: int, more: int) -> TrainConfig:
    """Fewer steps whenever fewer fit; more only while the rate has not begun to fall, and where it is worth it."""
    steps = done + more
    longer = steps > 1.1 * train.steps and done < train.constant_share * train.steps
    if steps < train.steps or longer:
        return replanned(train, done, max(steps, done, LEAST_STEPS))
    return train
