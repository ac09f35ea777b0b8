"""One lesson: a small model learns a task, from examples that never repeat or from a set, and is asked at many lengths.

The steps are those of `atma train` (its optimisers, clipping and masked targets), or of MAD (atma.eval.recall.adamw);
what is left out is what a run of a minute does without: folders, checkpoints, token shards.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from atma.config import ModelConfig, TrainConfig
from atma.eval.recall.adamw import AdamW, cosine
from atma.eval.recall.compression import AutoEncoder
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
SHUFFLE = 3
"""The stream, after those of the examples, by which a set of examples is put in order for each time over it."""
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
    examples: int = 0
    """Of the set that is gone over again and again; 0: no example comes twice."""
    mad: bool = False
    """Whether the rule is that of MAD in place of that of `atma train`."""

    def multiplier(self, step: int) -> float:
        """Factor on the learning rates at a step."""
        return (cosine if self.mad else rate_multiplier)(step, self.train)


class Learner:
    """A model in training on one task after another, with one count of steps and tokens."""

    def __init__(self, config: ModelConfig, practice: Practice, device: torch.device, encoded: bool = False) -> None:
        train = practice.train
        self.model = (AutoEncoder if encoded else Model)(config, generator(2, train.seed)).to(device)
        compute = choose_precision(train.precision, device, config.width)
        rule = (AdamW if practice.mad else Optimisers)(self.model, train)
        self.stepper = Stepper(self.model, rule, train, compute, Ranks())
        self.rows_drawn, self.step, self.tokens = 0, 0, 0
        self.diverged = False

    def learn(self, task: Task, practice: Practice, advance: Advance) -> Iterator[Row]:
        """Make the steps of `practice`; yields a point of the curve at each examination, the last step's included.

        Ends early at the accuracy wanted, or when PATIENCE steps in a row were not finite (`diverged`).
        """
        train, began, streak = practice.train, time.perf_counter(), 0
        rows = train.batch_tokens // task.length
        held_out = examples(task, practice.test_seed, VALIDATION, 0, practice.trials)
        drawn = batches(task, train.seed, rows, practice.examples, self.rows_drawn)
        for step in range(train.steps):
            outcome = self.stepper(step, next(drawn), practice.multiplier(step))
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


def train_config(tokens: int, batch_tokens: int, seed: int, rate: float) -> TrainConfig:
    """The rates of `atma train` times `rate`, level after the warm-up, since a lesson may end at any step."""
    usual = TrainConfig()
    rates = {name: rate * getattr(usual, name) for name in ("muon_rate", "embedding_rate", "head_rate", "vector_rate")}
    shape = {"length": 1, "batch_tokens": batch_tokens, "tokens": tokens, "seed": seed}
    return replace(usual, constant_share=1.0, precision="float32", **shape, **rates)


def batches(task: Task, seed: int, rows: int, count: int, first: int = 0) -> Iterator[Examples]:
    """Training examples without end: from `first` on; or each of a set of `count` in an order, then in another."""
    while not count:
        yield examples(task, seed, TRAIN, first, rows)
        first += rows
    whole, waiting, times = examples(task, seed, TRAIN, 0, count), np.empty(0, dtype=np.int64), 0
    while True:
        while len(waiting) < rows:
            order = np.random.default_rng([seed, SHUFFLE, times]).permutation(count)
            waiting, times = np.append(waiting, order), times + 1
        chosen, waiting = torch.from_numpy(waiting[:rows]), waiting[rows:]
        yield Examples(*(part[chosen] for part in whole))


def correct(model: Model, batch: Examples, advance: Advance | None = None) -> np.ma.MaskedArray:
    """Which answers are right, (B, T) bool, masked where nothing is asked; each is the likeliest token.

    Long rows go through the state, those of an auto-encoder excepted.
    """
    right = torch.zeros(batch.targets.shape, dtype=torch.bool)
    chunk = max(DEFAULT.chunk, batch.tokens.shape[1] if isinstance(model, AutoEncoder) else 0)
    for rows, positions, hidden in pieces(model, batch.tokens, None, DEFAULT._replace(chunk=chunk), advance):
        targets = batch.targets[rows, positions]
        asked = targets != NOT_SCORED
        if asked.any():
            answers = model.logits(hidden[asked.to(hidden.device)]).argmax(-1)
            right[rows, positions][asked] = answers.cpu() == targets[asked]
    return np.ma.array(right.numpy(), mask=(batch.targets == NOT_SCORED).numpy())


def seconds_a_step(config: ModelConfig, task: Task, practice: Practice, device: str) -> float:
    """How long one training step takes, the better of two, after one that is not counted."""
    train = practice.train
    learner = Learner(config, practice, torch.device(device), task.encoded)
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
