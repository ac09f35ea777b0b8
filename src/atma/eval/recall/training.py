"""One lesson: a small model learns a task from examples that never repeat, and is then asked at many lengths.

The steps are those of `atma train` (its optimisers, clipping and masked targets); what is left out is what a run of a
minute does without: folders, checkpoints, token shards.
"""

import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from atma.config import ModelConfig, TrainConfig
from atma.eval.recall.tasks import TRAIN, VALIDATION, Examples, Task, examples
from atma.eval.stream import DEFAULT, Advance, pieces
from atma.model import Model
from atma.ops.loss import NOT_SCORED
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.precision import choose_precision
from atma.train.schedule import rate_multiplier
from atma.train.step import Stepper, generator

PATIENCE = 3
"""Non-finite steps in a row that end a lesson."""
Row = dict[str, Any]


class Practice(NamedTuple):
    """How long a lesson lasts: its settings, how often and on how much it is asked, and the accuracy that ends it."""

    train: TrainConfig
    every: int
    """Steps between examinations."""
    trials: int
    """Examples of an examination."""
    stop_at: float
    test_seed: int


class Learner:
    """A model in training on one task after another, with one count of steps and tokens."""

    def __init__(self, config: ModelConfig, train: TrainConfig, device: torch.device) -> None:
        self.model = Model(config, generator(2, train.seed)).to(device)
        compute = choose_precision(train.precision, device, config.width)
        self.stepper = Stepper(self.model, Optimisers(self.model, train), train, compute, Ranks())
        self.rows_drawn, self.step, self.tokens = 0, 0, 0
        self.diverged = False

    def learn(self, task: Task, practice: Practice, advance: Advance) -> Iterator[Row]:
        """Make the steps of `practice`; yields a point of the curve at each examination, the last step's included.

        Ends early at the accuracy wanted, or when PATIENCE steps in a row were not finite (`diverged`).
        """
        train, began, streak = practice.train, time.perf_counter(), 0
        rows = train.batch_tokens // task.length
        held_out = examples(task, practice.test_seed, VALIDATION, 0, practice.trials)
        for step in range(train.steps):
            batch = examples(task, train.seed, TRAIN, self.rows_drawn, rows)
            outcome = self.stepper(step, batch, rate_multiplier(step, train))
            self.rows_drawn, self.step = self.rows_drawn + rows, self.step + 1
            self.tokens += rows * task.length
            advance(rows * task.length)
            streak = 0 if outcome.moved else streak + 1
            self.diverged = streak == PATIENCE
            if (step + 1) % practice.every and step + 1 < train.steps and not self.diverged:
                continue
            accuracy = float(correct(self.model, held_out, advance).mean())
            yield self._point(outcome.loss, accuracy, time.perf_counter() - began)
            if self.diverged or accuracy >= practice.stop_at:
                return

    def _point(self, loss: float, accuracy: float, seconds: float) -> Row:
        shown = loss if math.isfinite(loss) else None
        return {"step": self.step, "tokens": self.tokens, "loss": shown, "accuracy": accuracy, "seconds": seconds}


def correct(model: Model, batch: Examples, advance: Advance | None = None) -> np.ndarray:
    """Which answers are right, (B, answers a row) bool, each the likeliest token. Long rows go through the state."""
    right = torch.zeros(batch.targets.shape, dtype=torch.bool)
    for rows, positions, hidden in pieces(model, batch.tokens, None, DEFAULT, advance):
        targets = batch.targets[rows, positions]
        asked = targets != NOT_SCORED
        if asked.any():
            answers = model.logits(hidden[asked.to(hidden.device)]).argmax(-1)
            right[rows, positions][asked] = answers.cpu() == targets[asked]
    asked = batch.targets != NOT_SCORED
    return right[asked].view(len(right), -1).numpy()


def seconds_a_step(config: ModelConfig, task: Task, train: TrainConfig, device: str) -> float:
    """How long one training step takes, the better of two, after one that is not counted."""
    learner = Learner(config, train, torch.device(device))
    batch = examples(task, train.seed, TRAIN, 0, train.batch_tokens // task.length)
    times = []
    for step in range(3):
        began = time.perf_counter()
        learner.stepper(step, batch, 0.0)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def token_cost(practice: Practice, task: Task) -> int:
    """Tokens of `learn`, examinations included, when nothing ends it early."""
    steps = practice.train.steps
    exams = -(-steps // practice.every)
    return steps * practice.train.batch_tokens + exams * practice.trials * task.length
