"""The training side: documents of facts, question and answer, as texts, or as rows of which only answers are scored.

BABILong's models are fine-tuned on answers at short lengths before they are tested at long ones (arXiv 2406.10149).
`fine_tune` does that to one of our models with the training loop of every run, from the model's weights instead of new
ones. Its samples are of the split "train", none of which is ever a test's.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from atma.config import DataConfig, Recipe, TrainConfig
from atma.data.batches import Batch
from atma.eval.language_model import LanguageModel, OwnModel
from atma.eval.reasoning.prompts import Maker
from atma.eval.reasoning.suite import Reasoning
from atma.eval.reasoning.tasks import chosen
from atma.eval.reasoning.worlds import Task, between, pick
from atma.eval.suite import sha256
from atma.loading import load_floats
from atma.narrow import require_floats, width_in
from atma.ops.loss import NOT_SCORED
from atma.strict import check_fields
from atma.train.folder import claimed
from atma.train.parallel import Ranks
from atma.train.progress import Progress, Silent
from atma.train.record import NAME, Record
from atma.train.run import Run
from atma.train.source import Source

SAMPLES = 1 << 31
"""Training draws its samples from so many of a seed."""


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned on a suite's tasks and lengths."""

    tokens: int = 1_000_000
    batch_tokens: int = 8192
    """Tokens of a step: rows of the longest length, filled with whole documents."""
    row: int = 256
    """Tokens of a row where no length is longer."""
    rate: float = 0.3
    """Times the learning rates of a new run."""
    loss: Literal["answer", "all"] = "answer"
    """Which tokens are scored."""

    def __post_init__(self) -> None:
        check_fields(self)

    def config(self, suite: Reasoning) -> TrainConfig:
        """The settings of the training loop. ValueError: an option that makes no sense."""
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"'rate' must be positive, not {self.rate}")
        if self.row < 1:
            raise ValueError(f"'row' must be 1 token or more, not {self.row}")
        new, length = TrainConfig(), max(self.row, *suite.lengths)
        rates = ("muon_rate", "embedding_rate", "head_rate", "vector_rate")
        scaled = {name: self.rate * getattr(new, name) for name in rates}
        rows = max(1, self.batch_tokens // length)
        sizes = {"length": length, "batch_tokens": rows * length, "tokens": self.tokens, "seed": suite.seed}
        return replace(new, **scaled, **sizes, evaluate_every=0)


class Rows:
    """Batches of documents: a pure function of the step."""

    def __init__(self, maker: Maker, suite: Reasoning, train: TrainConfig, loss: str) -> None:
        self.maker, self.train, self.loss = maker, train, loss
        self.tasks, self.lengths = chosen(suite.tasks), suite.lengths

    def batch(self, step: int) -> Batch:
        """Rows (B, T) of whole documents, those of a row of one length; the rest is end-of-text and not scored."""
        rows = [self._row(step, row) for row in range(self.train.batch_tokens // self.train.length)]
        ids, targets = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        starts = ids == self.maker.writer.tokenizer.eot
        segments = starts.cumsum(1, dtype=torch.int32) - 1
        return Batch(ids, targets, segments)

    def _row(self, step: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.maker.seed, step, row])
        length = self.train.length
        ids = np.full(length, self.maker.writer.tokenizer.eot, np.int64)
        targets = np.full(length, NOT_SCORED, np.int64)
        used, size = 0, pick(rng, self.lengths)
        while True:
            task = pick(rng, self.tasks)
            document, answer = self.document(task, size, between(rng, 0, SAMPLES - 1))
            inputs, goals = document[:-1], document[1:].copy()
            if used + len(inputs) > length:
                if used == 0:
                    raise ValueError(f"a document of {task.name} takes {len(inputs)} tokens; choose longer rows")
                return ids, targets
            if self.loss == "answer":
                goals[: len(goals) - answer] = NOT_SCORED
            ids[used : used + len(inputs)] = inputs
            targets[used : used + len(inputs)] = goals
            used += len(inputs)

    def document(self, task: Task, length: int, index: int) -> tuple[np.ndarray, int]:
        """Token ids, end-of-text first, and how many at the end are the answer with its line end."""
        prompt = self.maker.prompt(task, length, index)
        answer = prompt.candidates[prompt.true]
        return np.concatenate([prompt.ids, answer]), len(answer)


def fine_tune(
    model: OwnModel,
    suite: Reasoning,
    tuning: FineTuning,
    out: Path,
    resume: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Train a model on from its weights into the run folder `out`; the final model's folder.

    ValueError: `out` holds something else, or an option that makes no sense.
    """
    own, config, folder = model.loaded.model, tuning.config(suite), model.loaded.path
    if folder is not None and width_in(own) is not None:
        own = load_floats(folder).model
    require_floats(own, "fine-tuning")
    maker, weights = suite.maker(model, "train"), str(model.provenance()["weights_sha256"])
    text = maker.text.sha256 if maker.text is not None else ""
    told = f"reasoning: {' '.join(suite.tasks)}; lengths {list(suite.lengths)}; {tuning.loss} tokens; from {weights}"
    recipe = Recipe(out.name or "reasoning", own.config, DataConfig(told), config)
    rows = Rows(maker, suite, config, tuning.loss)
    spec = sha256([told, suite.shots, suite.background, text, model.tokenizer.hash()])
    source = Source(rows.batch, rows.batch, 0, spec, model.tokenizer.vocab_size, model.tokenizer)
    rows.batch(0)
    with claimed(recipe, out, resume) as notes:
        run = Run(recipe, out, source, next(own.parameters()).device, Ranks())
        run.model.load_state_dict(own.state_dict())
        notes += run.restore() if resume else []
        with Record(out / NAME) as record:
            return run.go(record, progress or Silent(), notes)


def write_documents(model: LanguageModel, suite: Reasoning, path: Path) -> int:
    """`per_cell` training documents of every task and length as jsonl with `text`, for `atma prepare`; how many.

    Their lengths are those of the model's tokens; a text tokenised anew may differ by a few.
    """
    maker, tokenizer = suite.maker(model, "train"), model.tokenizer
    rows = Rows(maker, suite, TrainConfig(), "all")
    lines: list[str] = []
    for task in chosen(suite.tasks):
        for length in suite.lengths:
            for index in range(suite.per_cell):
                ids, answer = rows.document(task, length, index)
                about = {
                    "task": task.name,
                    "length": length,
                    "answer": tokenizer.decode(ids[-answer:].tolist()).strip(),
                }
                lines.append(json.dumps({"text": tokenizer.decode(ids[1:].tolist())} | about, ensure_ascii=False))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)
