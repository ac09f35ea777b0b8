"""The options of `atma eval recall`, the lessons that they mean, and how long lessons may be within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from atma.config import ModelConfig, TrainConfig
from atma.eval.provenance import software
from atma.eval.recall import adamw
from atma.eval.recall.lessons import Lesson, Row, batched
from atma.eval.recall.mixers import base, mixer, reach
from atma.eval.recall.tasks import TASKS, AssociativeRecall, Capacity, Task
from atma.eval.recall.training import Practice, seconds_a_step, train_config
from atma.eval.suite import Progress, run_measurements
from atma.ops import backend_for
from atma.strict import check_fields

Name = Literal[
    "mqar",
    "copy",
    "selective-copy",
    "capacity",
    "mad-recall",
    "mad-fuzzy",
    "mad-noisy",
    "mad-copy",
    "mad-compression",
    "mad-memory",
]
"""The tasks, as `TASKS` has them."""
ALL = "all"
"""In place of sizes: those taken by default, and the harder ones."""
LEAST_STEPS = 20
EVALUATING = 1 / 3
"""About what reading a token costs beside learning from it."""


@dataclass(frozen=True)
class Recall:
    """Models of several mixers, each trained on a task at some sizes and tested on lengths beyond."""

    task: Name = "mqar"
    """What is learned."""
    sizes: tuple[str, ...] = ()
    """LENGTH,PAIRS of mqar, LENGTH of copy, LENGTH,SYMBOLS of selective-copy, PAIRS that capacity begins with, and
    LENGTH,VOCABULARY of the six of MAD, then PERCENT of noise of mad-noisy and SYMBOLS of mad-copy. By default those of
    the literature for mqar and MAD, and our own for the others; "all" is these and MAD's harder ones."""
    vocabulary: int = 0
    """Keys and values, symbols, or all ids of MAD's; 0 is the task's own, such as 8192 (mqar), 64 (copy) and 16."""
    filler: Literal["blank", "random"] = "blank"
    """What stands between the queries of mqar."""
    mixers: tuple[str, ...] = ("polar+memory", "polar", "nope+memory", "nope", "rope")
    """CORE or CORE+memory of the global layers, or the name of any mixer that takes their place; after commas settings
    of this one alone: polar+memory,window=16."""
    model_preset: str = ""
    """Begin with this preset; by default layers of width 64: local and global, twice for selective-copy; two that look
    far for the tasks of MAD."""
    model: tuple[str, ...] = ()
    """Settings of every model, KEY=VALUE of a recipe's table [model], such as width=128 depth=4."""
    rates: tuple[float, ...] = (1.0,)
    """Factors on the learning rates of `atma train`; of several the best on held-out examples is marked."""
    seeds: tuple[int, ...] = (0,)
    """Of initial weights and training examples."""
    protocol: Literal["atma", "mad"] = "atma"
    """How models are trained: by the optimisers of `atma train`, or as MAD does it, by AdamW at 5e-4 times each of
    `rates`, falling by a cosine, with 128 examples a step and no clipping."""
    weight_decays: tuple[float, ...] = (0.0,)
    """Of the protocol of MAD, whose grid is rates 0.2, 1 and 2, each with a decay of 0 and of 0.1."""
    examples: int = 0
    """Of a training set that is gone over again and again; 0 draws new ones for ever. MAD has 12800, or 256 of
    mad-memory."""
    epochs: int = 0
    """Times over the training set, in place of `tokens`. MAD has 200."""
    tokens: int = 2_000_000
    """Most training tokens of a run; of the capacity probe, of each number of pairs."""
    batch_tokens: int = 8192
    """Tokens of a training step."""
    every: int = 25
    """Steps between the points of a learning curve."""
    held_out: int = 64
    """Examples that a point of the curve is measured on."""
    trials: int = 256
    """Test examples at the training length; at F times the length 1/F of them, 16 at least."""
    factors: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Test lengths, in training lengths."""
    stop_at: float = 0.99
    """Held-out accuracy that ends a run; above 1 none does."""
    threshold: float = 0.9
    """Test accuracy below which the capacity probe ends."""
    most_pairs: int = 1024
    """Where the capacity probe ends at the latest."""
    seed: int = 1234
    """Of held-out and test examples."""
    name = "recall"
    """What rows call the suite."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tokens", "batch_tokens", "every", "held_out", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be 1 or more, not {getattr(self, name)}")
        for name in ("sizes", "mixers", "rates", "weight_decays", "seeds", "factors"):
            values = getattr(self, name) or (TASKS[self.task].sizes if name == "sizes" else ())
            if not values or len(set(values)) < len(values):
                raise ValueError(f"'{name}' must be one or more, none twice, not {list(values)}")
        if min(self.factors) < 1 or list(self.factors) != sorted(self.factors):
            raise ValueError(f"'factors' must be whole numbers of 1 or more, increasing, not {list(self.factors)}")
        if min(self.rates) <= 0:
            raise ValueError(f"'rates' must be positive factors, not {list(self.rates)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"'threshold' must be above 0 and at most 1, not {self.threshold}")
        self._check_protocol()

    def _check_protocol(self) -> None:
        if min(self.weight_decays) < 0 or (self.protocol == "atma" and self.weight_decays != (0.0,)):
            rule = "0 or more, and are chosen for --protocol mad alone"
            raise ValueError(f"'weight_decays' must be {rule}, not {list(self.weight_decays)}")
        if self.examples < 0 or self.epochs < 0 or (self.epochs and not self.examples):
            rule = "0 or more, and epochs are of a set of examples"
            raise ValueError(f"'examples' and 'epochs' must be {rule}, not {self.examples} and {self.epochs}")

    def tasks(self) -> list[Task]:
        """The task at each size. ValueError: a size that is not of the task."""
        kind = TASKS[self.task]
        named = self.sizes or kind.sizes
        return [self._task(size) for size in ((*kind.sizes, *kind.harder) if named == (ALL,) else named)]

    def lessons(self, device: str = "cpu") -> list[Lesson]:
        """Every lesson, those of one size together. ValueError for what cannot be trained or tested."""
        chosen = product(self.tasks(), self.mixers, self.rates, self.weight_decays, self.seeds)
        return [
            self.lesson(self._model(task, words), task, words, seed, (rate, decay), device)
            for task, words, rate, decay, seed in chosen
        ]

    def lesson(
        self,
        config: ModelConfig,
        task: Task,
        name: str,
        seed: int = 0,
        rates: tuple[float, float] = (1.0, 0.0),
        device: str = "cpu",
    ) -> Lesson:
        """Any model on a task, by these options but for task, sizes, mixers, models, rates, decays and seeds.

        name: what rows call the model. rates: the factor on learning rates, and the weight decay of the protocol of
        MAD. ValueError for what cannot be trained or tested.
        """
        config, factors = replace(config, vocab_size=task.ids), self.factors
        if isinstance(task, Capacity):
            task = replace(task, gap=reach(config) or 0)
            factors = _doublings(task.pairs, self.most_pairs)
        practice = Practice(self._train(task, seed, *rates), self.every, self.held_out, self.stop_at, self.seed)
        practice = practice._replace(examples=self.examples, mad=self.protocol == "mad")
        threshold = self.threshold if isinstance(task, Capacity) else 0.0
        lesson = Lesson(task, name, rates[0], config, practice, factors, self.trials, threshold, device)
        longest = task.stretched(factors[-1])  # what cannot be drawn or batched is refused here, before any lesson
        if lesson.probing:
            batched(practice.train, longest.length)
        return lesson

    def within(self, budget: float, device: str = "cpu") -> "Recall":
        """These options with the training tokens of every lesson halved until all take about `budget` seconds.

        All mixers keep equal tokens. ValueError when so few steps would be left that nothing could be learned.
        """
        if self.epochs:
            raise ValueError("a budget shortens --tokens; leave --epochs out")
        costs = _seconds_a_token(self.lessons(device))
        fitted = self
        while (needed := sum(_seconds(lesson, costs) for lesson in fitted.lessons(device))) > budget:
            if fitted.tokens // 2 < LEAST_STEPS * fitted.batch_tokens:
                least = f"{LEAST_STEPS} steps of every run, and their tests, are about {needed:.3g} s"
                raise ValueError(f"a budget of {budget:.3g} s is too short: {least}; choose fewer sizes or mixers")
            fitted = replace(fitted, tokens=fitted.tokens // 2)
        return fitted

    def _task(self, size: str) -> Task:
        known: dict[str, Any] = _numbers(self.task, size)
        known |= {"vocabulary": self.vocabulary} if self.vocabulary else {}
        if self.task == AssociativeRecall.name:
            known |= {"filler": self.filler}
        return TASKS[self.task](**known)

    def _model(self, task: Task, words: str) -> ModelConfig:
        return mixer(words, base(task, self.model_preset, self.model))

    def _train(self, task: Task, seed: int, rate: float, decay: float) -> TrainConfig:
        tokens = self.epochs * self.examples * task.length or self.tokens
        if self.protocol == "mad":
            return adamw.train_config(task.length, tokens, seed, rate, decay)
        return batched(train_config(tokens, self.batch_tokens, seed, rate), task.length)


def recall(
    suite: Recall,
    results: Path | str | None = None,
    progress: Progress | None = None,
    budget: float | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Train and test what the options ask for; the rows of all lessons, in order, kept in `results` as they end.

    Those of a lesson are its curve ("curve"), its accuracy at each length ("accuracy", or "capacity" at each number of
    pairs) and what is to be known of it ("run"). `budget`, in seconds, shortens all lessons alike (`Recall.within`).
    """
    fitted = suite if budget is None else suite.within(budget, device)
    stamp = software() | {"dtype": "float32", "device": device, "backend": backend_for(), "seed": suite.seed}
    return run_measurements(
        suite.name, [lesson.measurement() for lesson in fitted.lessons(device)], stamp, results, progress
    )


def learn(
    config: ModelConfig, task: Name, tokens: int, seed: int = 0, options: Recall | None = None, name: str = ""
) -> list[Row]:
    """The rows of one model, of any configuration, that learns a task at its first size: what `recall` does of many.

    Sizes, vocabulary, examples, tests and the protocol are those of `options`; `name` is what rows call the mixer. To
    keep rows in a file, give `run_measurements` what `Recall.lesson(...).measurement()` returns. ValueError: `Recall`.
    """
    wanted = replace(options or Recall(), task=task, tokens=tokens)
    return wanted.lesson(config, wanted.tasks()[0], name, seed).measurement().run(lambda _: None)


def _numbers(task: str, size: str) -> dict[str, int]:
    """The fields of a task that a size gives."""
    parts = size.split(",")
    if len(parts) != len(TASKS[task].fields) or not all(part.isdecimal() for part in parts):
        rule = f"{','.join(TASKS[task].fields).upper()}, such as {TASKS[task].sizes[0]}"
        raise ValueError(f"a size of {task} is {rule}, not '{size}'")
    return dict(zip(TASKS[task].fields, map(int, parts), strict=True))


def _doublings(first: int, most: int) -> tuple[int, ...]:
    if first > most:
        raise ValueError(f"the probe begins with {first} pairs and ends at {most}; choose fewer to begin with")
    return tuple(2**i for i in range((most // first).bit_length()))


def _seconds_a_token(lessons: Sequence[Lesson]) -> dict[tuple[str, str], float]:
    """Of training, by size and mixer, measured at the longest rows."""
    costs: dict[tuple[str, str], float] = {}
    for lesson in lessons:
        place = (lesson.task.size, lesson.mixer)
        if place not in costs:
            task = lesson.task.stretched(lesson.factors[-1]) if lesson.probing else lesson.task
            practice = lesson.of_length(task)
            seconds = seconds_a_step(lesson.config, task, practice, lesson.device)
            costs[place] = seconds / practice.train.batch_tokens
    return costs


def _seconds(lesson: Lesson, costs: dict[tuple[str, str], float]) -> float:
    steps = len(lesson.factors) if lesson.probing else 1
    learned = steps * lesson.practice.train.tokens
    return costs[lesson.task.size, lesson.mixer] * (learned + EVALUATING * max(0, lesson.tokens() - learned))
