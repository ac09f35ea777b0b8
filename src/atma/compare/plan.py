"""What a comparison asks of every entrant: the options, and the pieces of work that they mean.

A piece is the training of one entrant with one seed on the text, with its losses and needles by length, or on one
recall task. Its identity is what is trained and measured: entrants, seeds and tasks can be added later, and whatever
is done already stays.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from atma.compare.entrants import Entrant, entrants, learner
from atma.compare.lessons import Piece, lesson
from atma.config import DataConfig, EvaluationConfig, ModelConfig, Recipe, TrainConfig, preset
from atma.data.dataset import TokenSet
from atma.data.prepare import Preparation
from atma.eval.recall.mixers import changed
from atma.strict import check_fields, require
from atma.sweep.cells import NAME, Cell, Sweep
from atma.sweep.recipe import Source, SweepConfig

TASKS = ("mqar=128,8", "copy", "selective-copy")
MIXERS = ("polar+memory", "polar", "nope", "rope")


@dataclass(frozen=True)
class Comparison:
    """Who is compared, on what, and for how long. Lengths and sizes are tokens."""

    mixers: tuple[str, ...] = MIXERS
    """CORE or CORE+MEMORY of the global layers, the name of any mixer that takes their place, with settings of its own
    after commas, or a recipe (.toml) whose whole model it is. The first decides how large all are."""
    seeds: tuple[int, ...] = (0, 1, 2)
    tokens: int = 1_000_000
    """Of text that each is trained on; 0 leaves the text out."""
    batch_tokens: int = 2048
    """Of a step on the text: whole rows. Small steps, of which there are more, begin to recall sooner."""
    copy_share: float = 0.4
    """Of the tokens on the text, those at the start that are random spans told twice, from which a mixer learns to look
    back. Some need several times as many as others; a share that only the quickest can use would rank that alone."""
    tasks: tuple[str, ...] = TASKS
    """Of `atma eval recall`: a task, or TASK=SIZE."""
    task_tokens: int = 1_000_000
    """Most training tokens of a task."""
    model_preset: str = "nano"
    """The base model, whose layers "global" a mixer replaces."""
    model: tuple[str, ...] = ()
    """Settings of the base model, KEY=VALUE, such as depth=4."""
    parameters: Literal["equal", "own"] = "equal"
    """equal: the MLPs are made so wide that all have as many parameters as the first; own: as they come."""
    length: int = 256
    """Of training on the text."""
    longest: int = 64
    """The longest text, in training lengths; losses and needles are measured at every doubling."""
    documents: int = 8
    needle_trials: int = 32
    data: str = "data/stdlib"
    """Made by `atma prepare`; the Python standard library, in 1,024 tokens, is made where it is missing."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("mixers", "seeds"):
            some = getattr(self, name)
            require(len(some) > 0 and len(set(some)) == len(some), name, list(some), "one or more, none twice")
        require(min(self.seeds) >= 0, "seeds", list(self.seeds), "0 or more")
        require(len(set(self.tasks)) == len(self.tasks), "tasks", list(self.tasks), "none twice")
        for name in ("tokens", "task_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(0 <= self.copy_share < 1, "copy_share", self.copy_share, "from 0 to below 1")
        for name in ("length", "longest", "documents", "needle_trials"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(math.log2(self.longest).is_integer(), "longest", self.longest, "a power of 2")

    def base(self) -> ModelConfig:
        """The model before a mixer is chosen; what its preset bounds by the training length is bounded by this one."""
        chosen = preset(self.model_preset)
        bounded = [key for key, value in chosen.following.items() if value not in (None, math.inf)]
        chosen = changed(chosen.changed(dict.fromkeys(bounded, self.length)), self.model)
        made = self.tokens > 0 and Path(self.data).is_dir()
        return chosen.changed({"vocab_size": TokenSet.open(self.data).vocab_size}) if made else chosen

    def entrants(self) -> list[Entrant]:
        """Every entrant, in order. ValueError: one is none."""
        return entrants(self.mixers, self.base(), self.parameters == "equal")

    def evaluation(self) -> EvaluationConfig:
        """How losses and needles are measured: the same for every mixer and seed."""
        return EvaluationConfig(
            self.lengths(),
            self.documents,
            min(EvaluationConfig.target_tokens, self.length // 2),
            needle_trials=self.needle_trials,
            needle_tokens=16 * self.longest * self.length,
        )

    def lengths(self) -> tuple[int, ...]:
        """Of the texts that losses and needles are measured on."""
        return tuple(self.length * 2**i for i in range(self.longest.bit_length()))


class Plan(NamedTuple):
    """All pieces of a comparison, seeds outermost, as the workers of a sweep take them."""

    name: str
    config: SweepConfig
    cells: tuple[Cell | Piece, ...]
    source: Source

    @property
    def trained(self) -> Sweep:
        """The pieces that read the data."""
        return Sweep(self.name, self.config, (), tuple(c for c in self.cells if isinstance(c, Cell)), self.source)


def plan(comparison: Comparison) -> Plan:
    """ValueError: an entrant or a task that there is not, or two entrants that are one."""
    found = comparison.entrants()
    cells = [cell for seed in comparison.seeds for cell in _of_seed(comparison, found, seed)]
    seen = dict[str, str]()
    for cell in cells:
        if cell.id in seen:
            raise ValueError(f"{seen[cell.id]} and {cell.label} are the same; leave one out")
        seen[cell.id] = cell.label
    source = Source("stdlib", Preparation(tokenizer="bpe", vocab_size=comparison.base().vocab_size))
    return Plan("compare", SweepConfig(), tuple(cells), source)


def _of_seed(comparison: Comparison, found: Sequence[Entrant], seed: int) -> Sequence[Cell | Piece]:
    texts = [_text(comparison, one, seed) for one in found] if comparison.tokens else []
    return [*texts, *(_lesson(comparison, found, one, task, seed) for task in comparison.tasks for one in found)]


def _text(comparison: Comparison, one: Entrant, seed: int) -> Cell:
    """The training on text: a cell of a sweep."""
    length, tokens = comparison.length, comparison.tokens
    copied = round(comparison.copy_share * tokens)
    data = DataConfig(comparison.data, recall_share=0.4, copy_warmup_tokens=copied, copy_vocabulary=64)
    train = TrainConfig(length, comparison.batch_tokens, tokens, seed=seed, checkpoint_every=50, evaluate_every=0)
    recipe = Recipe(NAME, one.model, data, train, comparison.evaluation())
    return Cell(recipe, {"mixer": one.name, "task": "text"}, seed)


def _lesson(comparison: Comparison, found: Sequence[Entrant], one: Entrant, task: str, seed: int) -> Piece:
    equal = comparison.parameters == "equal"
    return lesson(task, one.name, lambda asked: learner(found, one, asked, equal), seed, comparison.task_tokens)
