"""Texts that a model in training writes now and then, so that one sees how it stands.

They change nothing of the training: they draw from a generator of their own, seeded by the run's seed, the step and the
prompt; nothing is kept of a gradient; and the model is left in the mode it was in. `samples.jsonl` of the run folder
keeps them, a line each, and is cut back with the record when a run goes on.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atma.config import Recipe, TrainConfig
from atma.disk import sync
from atma.model import Model
from atma.sampling import choose, of_tokens
from atma.settings import Settings
from atma.tokenizer import Tokenizer
from atma.train.step import generator

NAME = "samples.jsonl"
SETTINGS = Settings(temperature=0.8, top_p=0.95)
PURPOSE = 5
"""Keeps the draws of samples apart from all other draws of a run."""


class Sample(NamedTuple):
    """A text, after so many steps."""

    step: int
    prompt: str
    text: str

    def row(self) -> dict[str, Any]:
        """What is shown of it: an event, with the parts of it besides."""
        lines = [f"    {line}" for line in _shown(f"{self.prompt}⟩{self.text}").splitlines()]
        return {"kind": "event", "event": "\n".join(["a sample:", *lines]), **self._asdict()}


def _shown(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(one if one.isprintable() or one == "\n" else " " if one == "\t" else "�" for one in text)


def check_samples(recipe: Recipe, tokenizer: Tokenizer | None) -> None:
    """ValueError, before a run begins, where no text could be written."""
    if recipe.train.sample_every and tokenizer is None:
        raise ValueError(
            f"'train.sample_every' must be 0 here: {recipe.data.path} has no tokenizer.json, so no text can be written"
        )


def due(train: TrainConfig, step: int) -> bool:
    """Whether texts are written after so many steps: also after the last."""
    return train.sample_every > 0 and step > 0 and (step % train.sample_every == 0 or step == train.steps)


def written(model: Model, tokenizer: Tokenizer, train: TrainConfig, step: int) -> Iterator[Sample]:
    """A text for each prompt."""
    training = model.training
    model.eval()
    try:
        for number, prompt in enumerate(train.sample_prompts):
            random = generator(PURPOSE, train.seed, step, number)
            yield Sample(step, prompt, _text(model, tokenizer, prompt, train.sample_tokens, random))
    finally:
        model.train(training)


@torch.no_grad()
def _text(model: Model, tokenizer: Tokenizer, prompt: str, count: int, random: torch.Generator) -> str:
    tokens = [*(tokenizer.beginning or [tokenizer.eot]), *tokenizer.encode(prompt)]
    device, start = model.embed.weight.device, len(tokens)
    state = model.init_state(1, start + count)
    seen, unread = torch.zeros(tokenizer.vocab_size, dtype=torch.bool), tokens
    while len(tokens) < start + count:
        hidden, state = model(torch.tensor([unread], device=device), state)
        logits = of_tokens(model.logits(hidden[:, -1])[0].float().cpu(), tokenizer)
        if not bool(torch.isfinite(logits.max())):
            return f"{tokenizer.decode(tokens[start:])} (the model's logits are not finite)"
        token = choose(logits, SETTINGS, seen, random)
        if token == tokenizer.eot:
            break
        tokens.append(token)
        unread = [token]
    return tokenizer.decode(tokens[start:])


def keep(run: Path, samples: list[Sample]) -> list[Sample]:
    """Append to the run's samples, and give them back. OSError names the file."""
    lines = "".join(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in samples)
    with open(run / NAME, "ab") as file:
        file.write(lines.encode("utf-8", "replace"))
    return samples


def read_samples(run: Path) -> list[Sample]:
    """Every text of a run, in order; lines that are none are left out."""
    return [sample for _, sample in _lines(run / NAME)]


def cut_samples(run: Path, step: int) -> None:
    """Drop the texts after `step`, and a last line that a crash cut short."""
    path = run / NAME
    if not path.exists():
        return
    end = 0
    for after, sample in _lines(path):
        if sample.step > step:
            break
        end = after
    os.truncate(path, end)
    sync(path)


def _lines(path: Path) -> Iterator[tuple[int, Sample]]:
    """Each text and where its line ends."""
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            try:
                row = json.loads(line)
                sample = Sample(int(row["step"]), str(row["prompt"]), str(row["text"]))
            except (ValueError, TypeError, KeyError):
                continue
            if line.endswith(b"\n"):
                yield end, sample
