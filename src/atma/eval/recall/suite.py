"""The options of `atma eval recall`, the lessons that they mean, and how long lessons may be within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from atma.config import TrainConfig
from atma.eval.provenance import software
from atma.eval.recall.lessons import Lesson, Row, batched
from atma.eval.recall.mixers import base, mixer, reach
from atma.eval.recall.tasks import TASKS, AssociativeRecall, Capacity, Task
from atma.eval.recall.training import Practice, seconds_a_step
from atma.eval.suite import Progress, run_measurements
from atma.ops import backend_for
from atma.strict import check_fields

SIZES = {
    "mqar": ("64,4", "128,8", "256,16", "512,64"),
    "copy": ("64",),
    "selective-copy": ("256,16",),
    "capacity": ("4",),
}
FIELDS = {
    "mqar": ("length", "pairs"),
    "copy": ("length",),
    "selective-copy": ("length", "symbols"),
    "capacity": ("pairs",),
}
LEAST_STEPS = 20
EVALUATING = 1 / 3
"""About what reading a token costs beside learning from it."""


@dataclass(frozen=True)
class Recall:
    """Models of several mixers, each trained on a task at some sizes and tested on lengths beyond."""

    task: Literal["mqar", "copy", "selective-copy", "capacity"] = "mqar"
    sizes: tuple[str, ...] = ()
    """LENGTH,PAIRS of mqar, LENGTH of copy, LENGTH,SYMBOLS of selective-copy, PAIRS that capacity begins with. By
    default those of the literature for mqar, and our own for the others."""
    vocabulary: int = 0
    """Keys and values, or symbols; 0 is the task's own: 8192, 64 (copy), 16 (selective-copy)."""
    filler: Literal["blank", "random"] = "blank"
    """What stands between the queries of mqar."""
    mixers: tuple[str, ...] = ("polar+memory", "polar", "nope+memory", "nope", "rope")
    """CORE or CORE+memory of the global layers, or the name of any mixer that takes their place; after commas settings
    of this one alone: polar+memory,window=16."""
    model_preset: str = ""
    """Begin with this preset; by default two layers, local and global, of width 64."""
    model: tuple[str, ...] = ()
    """Settings of every model, KEY=VALUE of a recipe's table [model], such as width=128 depth=4."""
    rates: tuple[float, ...] = (1.0,)
    """Factors on the learning rates of `atma train`; of several the best on held-out examples is marked."""
    seeds: tuple[int, ...] = (0,)
    """Of initial weights and training examples."""
    tokens: int = 2_000_000
    """Most training tokens of a run; of the capacity probe, of each number of pairs."""
    batch_tokens: int = 8192
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

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("tokens", "batch_tokens", "every", "held_out", "trials"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' must be 1 or more, not {getattr(self, name)}")
        for name in ("sizes", "mixers", "rates", "seeds", "factors"):
            values = getattr(self, name) or (SIZES[self.task] if name == "sizes" else ())
            if not values or len(set(values)) < len(values):
                raise ValueError(f"'{name}' must be one or more, none twice, not {list(values)}")
        if min(self.factors) < 1 or list(self.factors) != sorted(self.factors):
            raise ValueError(f"'factors' must be whole numbers of 1 or more, increasing, not {list(self.factors)}")
        if min(self.rates) <= 0:
            raise ValueError(f"'rates' must be positive factors, not {list(self.rates)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"'threshold' must be above 0 and at most 1, not {self.threshold}")

    def tasks(self) -> list[Task]:
        """The task at each size. ValueError: a size that is not of the task."""
        return [self._task(size) for size in self.sizes or SIZES[self.task]]

    def lessons(self, device: str = "cpu") -> list[Lesson]:
        """Every lesson, those of one size together. ValueError for what cannot be trained or tested."""
        chosen = product(self.tasks(), self.mixers, self.rates, self.seeds)
        return [self._lesson(task, words, rate, seed, device) for task, words, rate, seed in chosen]

    def within(self, budget: float, device: str = "cpu") -> "Recall":
        """These options with the training tokens of every lesson halved until all take about `budget` seconds.

        All mixers keep equal tokens. ValueError when so few steps would be left that nothing could be learned.
        """
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

    def _lesson(self, task: Task, words: str, rate: float, seed: int, device: str) -> Lesson:
        config = mixer(words, base(task, self.model_preset, self.model))
        factors = self.factors
        if isinstance(task, Capacity):
            task = replace(task, gap=reach(config) or 0)
            factors = _doublings(task.pairs, self.most_pairs)
        train = batched(_train(rate, seed, self.tokens, self.batch_tokens), task.length)
        practice = Practice(train, self.every, self.held_out, self.stop_at, self.seed)
        threshold = self.threshold if isinstance(task, Capacity) else 0.0
        lesson = Lesson(task, words, rate, config, practice, factors, self.trials, threshold, device)
        longest = task.stretched(factors[-1])  # what cannot be drawn or batched is refused here, before any lesson
        if lesson.probing:
            batched(train, longest.length)
        return lesson


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


def _train(rate: float, seed: int, tokens: int, batch_tokens: int) -> TrainConfig:
    """The rates of `atma train` times `rate`, level after the warm-up, since a lesson may end at any step."""
    usual = TrainConfig()
    return replace(
        usual,
        length=1,
        batch_tokens=batch_tokens,
        tokens=tokens,
        seed=seed,
        muon_rate=rate * usual.muon_rate,
        embedding_rate=rate * usual.embedding_rate,
        head_rate=rate * usual.head_rate,
        vector_rate=rate * usual.vector_rate,
        constant_share=1.0,
        precision="float32",
    )


def _numbers(task: str, size: str) -> dict[str, int]:
    """The fields of a task that a size gives."""
    parts = size.split(",")
    if len(parts) != len(FIELDS[task]) or not all(part.isdecimal() for part in parts):
        rule = f"{','.join(FIELDS[task]).upper()}, such as {SIZES[task][0]}"
        raise ValueError(f"a size of {task} is {rule}, not '{size}'")
    return dict(zip(FIELDS[task], map(int, parts), strict=True))


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
            train = lesson.of_length(task).train
            costs[place] = seconds_a_step(lesson.config, task, train, lesson.device) / train.batch_tokens
    return costs


def _seconds(lesson: Lesson, costs: dict[tuple[str, str], float]) -> float:
    steps = len(lesson.factors) if lesson.probing else 1
    learned = steps * lesson.practice.train.tokens
    return costs[lesson.task.size, lesson.mixer] * (learned + EVALUATING * max(0, lesson.tokens() - learned))
