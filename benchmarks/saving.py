"""How long training waits for a checkpoint, and what memory that takes: steps that save beside steps that do not.

python benchmarks/saving.py [--preset small] [--length 256] [--steps 12] [--every 3] [--folder .]

A run of made-up tokens, timed from the start of one step to that of the next. With PYTHONPATH on the sources of an
earlier version it measures those: `PYTHONPATH=before/src python benchmarks/saving.py`.
"""

import argparse
import resource
import statistics
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atma.config import Recipe, TrainConfig
from atma.presets import preset
from atma.train.loop import fit
from atma.train.source import Source


class Rows(NamedTuple):
    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


class Clock:
    """Batches, and when each was asked for."""

    def __init__(self, length: int, vocabulary: int) -> None:
        self.length, self.vocabulary = length, vocabulary
        self.asked: list[float] = []

    def __call__(self, step: int) -> Rows:
        self.asked.append(time.perf_counter())
        drawn = torch.Generator().manual_seed(step)
        ids = torch.randint(self.vocabulary, (1, self.length + 1), generator=drawn)
        return Rows(ids[:, :-1], ids[:, 1:], torch.zeros(1, self.length, dtype=torch.int32))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path())
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model = preset(asked.preset)
    train = TrainConfig(
        length=asked.length,
        batch_tokens=asked.length,
        tokens=asked.length * (asked.steps + 1),
        checkpoint_every=asked.every,
        evaluate_every=0,
    )
    clock = Clock(asked.length, model.vocab_size)
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        fit(
            Recipe("saving", model, train=train),
            Path(folder) / "run",
            Source(clock, clock, 0, "none", model.vocab_size),
        )
        newest = max((Path(folder) / "run" / "checkpoints").iterdir())
        size = sum(path.stat().st_size for path in newest.iterdir())
    seconds = [after - before for before, after in zip(clock.asked, clock.asked[1:], strict=False)]
    places = range(1, asked.steps)  # not the first, which compiles and warms up
    saves = {i for i in places if (i + 1) % asked.every == 0}
    after = {i + 1 for i in saves}
    told("steps that save", (seconds[i] for i in saves))
    told("the steps after them", (seconds[i] for i in after if i < asked.steps and i not in saves))
    told("other steps", (seconds[i] for i in places if i not in saves | after))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"a checkpoint is {size / 2**20:,.0f} MiB; peak memory {peak:,.0f} MiB")


def told(what: str, seconds: Iterable[float]) -> None:
    found = sorted(seconds)
    print(f"{what}: median {statistics.median(found):.3f} s, {found[0]:.3f} to {found[-1]:.3f} s ({len(found)})")


if __name__ == "__main__":
    main()
