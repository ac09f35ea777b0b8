"""Choices after one context: the context read once against read again with each, by processor time, interleaved.

python benchmarks/shared_context.py [--model nano] [--lengths 64 128 256 1024]
"""

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import numpy as np
import tyro

from atma.eval.continuations import shared
from atma.eval.language_model import OwnModel, Scored
from atma.eval.ragged import predict_each
from atma.loading import load

CHOICES, CHOICE_TOKENS, AGREE = 4, 8, 1e-3


def main(
    model: str = "nano",
    lengths: Annotated[tuple[int, ...], tyro.conf.arg(help="Context tokens.")] = (32, 64, 128, 256, 1024),
    rounds: int = 3,
) -> None:
    """Print both medians and their ratio at each length, of eight questions, or as many as 2,048 tokens hold."""
    ours = OwnModel(load(model))
    for length in lengths:
        rng = np.random.default_rng(length)
        questions = [rng.integers(0, 256, length).tolist() for _ in range(min(8, max(1, 2048 // length)))]
        choices = [rng.integers(0, 256, CHOICE_TOKENS).tolist() for _ in range(CHOICES)]
        ways: dict[str, Callable[[], list[Scored]]] = {
            "again": lambda q=questions, c=choices: _again(ours, q, c),
            "once": lambda q=questions, c=choices: [one for question in q for one in shared(ours, question, c)],
        }
        for one, other in zip(*(way() for way in ways.values()), strict=True):
            assert np.abs(one.nats - other.nats).max() < AGREE, "the two ways disagree"
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(rounds):
            for name, way in ways.items():
                start = time.process_time()
                way()
                times[name].append(time.process_time() - start)
        again, once = (statistics.median(times[name]) for name in ways)
        print(f"{length:,} tokens: again {again:.3f} s, once {once:.3f} s, {again / once:.2f} times")


def _again(ours: OwnModel, questions: list[list[int]], choices: list[list[int]]) -> list[Scored]:
    sequences = [np.array(question + choice) for question in questions for choice in choices]
    return predict_each(ours, sequences, [CHOICE_TOKENS] * len(sequences))


if __name__ == "__main__":
    tyro.cli(main)
