"""What one lesson leaves: its learning curve, its accuracy at every length, and what is to be known of it, as rows."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch

from atma.config import ModelConfig, TrainConfig, canonical, identity, to_dict
from atma.eval.recall.tasks import TEST, Capacity, Task, examples
from atma.eval.recall.training import Learner, Practice, correct, token_cost
from atma.eval.stream import Advance
from atma.eval.suite import Measurement, sha256
from atma.model import Block
from atma.state import leaves
from atma.statistics import proportion

LEARNED = 0.99
"""Held-out accuracy at which a task counts as learned."""
LEAST_TRIALS = 16
Row = dict[str, Any]


@dataclass(frozen=True)
class Lesson:
    """One model to be trained on one task and examined."""

    task: Task
    mixer: str
    rate: float
    """Factor on all learning rates."""
    config: ModelConfig
    practice: Practice
    factors: tuple[int, ...]
    """Lengths of the test, as multiples of the training length; of the probe, the numbers of pairs likewise."""
    trials: int
    threshold: float = 0.0
    """Accuracy below which the capacity probe ends."""
    device: str = "cpu"

    @property
    def probing(self) -> bool:
        return isinstance(self.task, Capacity)

    def measurement(self) -> Measurement:
        """The lesson as a resumable piece."""
        train = self.practice.train
        about = {"task": self.task.name, "size": self.task.size, "mixer": self.mixer, "rate": self.rate}
        about |= {"run_seed": train.seed} | ({"decay": train.weight_decay} if self.practice.mad else {})
        options: Row = {"every": self.practice.every, "held_out": self.practice.trials, "trials": self.trials}
        options |= {"stop_at": self.practice.stop_at, "factors": list(self.factors), "threshold": self.threshold}
        if self.practice.examples or self.practice.mad:
            options |= {"examples": self.practice.examples, "mad": self.practice.mad}
        whole = [asdict(self.task), canonical(self.config), canonical(train), options]
        name = f"{self.task.name} {self.task.size}, {self.mixer}, rate × {self.rate:g}, seed {train.seed}"
        tokens = self.tokens()
        spec = about | {"configuration": sha256(whole)[:16]}
        return Measurement(name, spec, tokens, lambda advance: self.rows(about, _Whole(tokens, advance)))

    def tokens(self) -> int:
        """Tokens read when nothing ends the lesson early."""
        tasks = [self.task.stretched(factor) for factor in self.factors]
        tests = sum(task.length * self.count(f) for task, f in zip(tasks, self.factors, strict=True))
        taught = tasks if self.probing else [self.task]
        return tests + sum(token_cost(self.of_length(task), task) for task in taught)

    def count(self, factor: int) -> int:
        """Test examples: fewer in longer contexts, so that every length costs about the same."""
        return self.trials if self.probing else max(LEAST_TRIALS, self.trials // factor)

    def of_length(self, task: Task) -> Practice:
        """The practice on another length, about as many tokens a step."""
        return self.practice._replace(train=batched(self.practice.train, task.length))

    def rows(self, about: Row, advance: "_Whole") -> list[Row]:
        device = torch.device(self.device)
        learner = Learner(self.config, self.practice, device, self.task.encoded)
        made = list((self._probe if self.probing else self._learn)(learner, advance))
        advance.finish()
        return [about | row for row in (*made, self._summary(learner, made))]

    def _learn(self, learner: Learner, advance: Advance) -> Iterator[Row]:
        for point in learner.learn(self.task, self.practice, advance):
            yield {"kind": "curve", "length": self.task.length} | point
        for factor in self.factors:
            yield self._test(learner, self.task.stretched(factor), factor, advance) | {"kind": "accuracy"}

    def _probe(self, learner: Learner, advance: Advance) -> Iterator[Row]:
        """Ever more pairs, each number learned from where the last one left, until too few are answered."""
        for factor in self.factors:
            task = self.task.stretched(factor)
            assert isinstance(task, Capacity)
            more = {"pairs": task.pairs, "gap": task.gap}
            for point in learner.learn(task, self.of_length(task), advance):
                yield {"kind": "curve", "length": task.length} | more | point
            row: Row = self._test(learner, task, factor, advance) | {"kind": "capacity"} | more
            yield row
            if row["accuracy"] < self.threshold:
                return

    def _test(self, learner: Learner, task: Task, factor: int, advance: Advance) -> Row:
        batch = examples(task, self.practice.test_seed, TEST, 0, self.count(factor))
        right = correct(learner.model, batch, advance)
        whole = np.asarray(right.all(1))
        row: Row = {"length": task.length, "factor": factor, "trials": len(right), "answers": int(right.count())}
        row |= proportion("accuracy", "", int(right.sum()), row["answers"])
        row |= proportion("exact_accuracy", "exact_", int(whole.sum()), whole.size)
        row |= {"outcomes": whole.astype(int).tolist()}
        return row | {"trials_sha256": sha256(np.stack([batch.tokens.numpy(), batch.targets.numpy()]))}

    def _summary(self, learner: Learner, made: Sequence[Row]) -> Row:
        curve = [row for row in made if row["kind"] == "curve"]
        learned = [row["tokens"] for row in curve if row["accuracy"] >= LEARNED]
        row: Row = {"kind": "run", "length": self.task.length, "trained_tokens": learner.tokens}
        row |= {"tokens_to_99": learned[0] if learned else None, "validation_accuracy": curve[-1]["accuracy"]}
        row |= {"seconds": sum(_last_of_each_length(curve)), "diverged": learner.diverged}
        row |= {"parameters": sum(p.numel() for p in learner.model.parameters())}
        row |= {"memory_bytes": memory_bytes(learner)}
        if self.probing:
            held = [r["pairs"] for r in made if r["kind"] == "capacity" and r["accuracy"] >= self.threshold]
            row |= {"pairs_held": max(held, default=0)}
        row |= {"identity": identity(self.config), "model": to_dict(self.config)}
        return row | {"train": to_dict(self.practice.train), "about": asdict(self.task)}


def batched(train: TrainConfig, length: int) -> TrainConfig:
    """The same settings for rows of another length: whole rows, at most `batch_tokens`. ValueError: not one fits."""
    if length > train.batch_tokens:
        raise ValueError(f"a batch of {train.batch_tokens} tokens has no room for a row of {length}; make it larger")
    return replace(train, length=length, batch_tokens=train.batch_tokens // length * length)


def memory_bytes(learner: Learner) -> int:
    """Bytes that what forgets carries of one row, whatever its length: memories, and mixers that are one."""
    model = learner.model
    forgets = {i for i, block in enumerate(model.blocks) if cast(Block, block).mixer.retention() is not None}
    held = [leaf for leaf in leaves(model.init_state(1, 1)) if leaf.carried and int(leaf.path[1]) in forgets]
    parts = {leaf.path[1] for leaf in held if "memory" in leaf.path}
    return sum(leaf.tensor.nbytes for leaf in held if "memory" in leaf.path or leaf.path[1] not in parts)


def _last_of_each_length(curve: Sequence[Row]) -> list[float]:
    return list({row["length"]: row["seconds"] for row in curve}.values())


class _Whole:
    """Tells of an advance, and at the end of what an early end has left out."""

    def __init__(self, tokens: int, advance: Advance) -> None:
        self._left, self._advance = tokens, advance

    def __call__(self, tokens: int) -> None:
        self._left -= tokens
        self._advance(tokens)

    def finish(self) -> None:
        self(self._left)
