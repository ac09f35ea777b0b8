"""How long training waits for a checkpoint, and what memory that takes.

python benchmarks/saving.py [--preset small] [--length 64] [--rounds 5] [--folder .] [--alone]

A round is a checkpoint, a step while it is written, what is left to wait for it, and a step alone, on one thread; with
--alone there are no steps. With PYTHONPATH on the sources of an earlier version it measures those:
`PYTHONPATH=before/src python benchmarks/saving.py`. Seconds are those that pass, and those of the processor in the
training thread, which other work on the machine does not lengthen.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from atma.config import Recipe, TrainConfig
from atma.presets import preset
from atma.train.parallel import Ranks
from atma.train.record import Record
from atma.train.run import Run
from atma.train.source import Source


class Rows(NamedTuple):
    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


class Times:
    """Seconds that pass, and of the processor, by what was done."""

    def __init__(self) -> None:
        self.found: dict[str, list[tuple[float, float]]] = {}

    def of(self, what: str, act: Callable[[], object]) -> None:
        began, worked = time.perf_counter(), time.thread_time()
        act()
        self.found.setdefault(what, []).append((time.perf_counter() - began, time.thread_time() - worked))

    def __str__(self) -> str:
        lines = [f"{'median of':<24} {'seconds':>8} {'processor':>10}"]
        for what, pairs in self.found.items():
            passed, worked = (statistics.median(column) for column in zip(*pairs, strict=True))
            lines.append(f"{what:<24} {passed:8.3f} {worked:10.3f}")
        return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path())
    parser.add_argument("--alone", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    model, count = preset(asked.preset), asked.length
    train = TrainConfig(length=count, batch_tokens=count, tokens=count * 1000, evaluate_every=0)

    def rows(step: int) -> Rows:
        ids = torch.randint(model.vocab_size, (1, count + 1), generator=torch.Generator().manual_seed(step))
        return Rows(ids[:, :-1], ids[:, 1:], torch.zeros(1, count, dtype=torch.int32))

    with tempfile.TemporaryDirectory(dir=asked.folder) as folder, Record(Path(folder) / "metrics.jsonl") as record:
        source = Source(rows, rows, 0, "none", model.vocab_size)
        run = Run(Recipe("saving", model, train=train), Path(folder), source, torch.device("cpu"), Ranks())
        print(measured(run, record, rows, 0 if asked.alone else 1, asked.rounds))
        newest = max((Path(folder) / "checkpoints").iterdir())
        print(f"a checkpoint is {sum(path.stat().st_size for path in newest.iterdir()) / 2**20:,.0f} MiB")


def measured(run: Run, record: Record, rows: Callable[[int], Rows], steps: int, rounds: int) -> Times:
    """The times of so many rounds, with steps or without, after one that is not counted."""

    def step(steps: int = steps) -> None:
        for _ in range(steps):
            run.stepper(run.state.step, rows(run.state.step), 1.0)
        run.state.step += 1

    saver, times = getattr(run, "saver", None), Times()
    step(1)
    before = peak()
    for turn in range(rounds + 1):
        kept = times if turn else Times()
        kept.of("a step that saves: saving", lambda: run._checkpoint(record))
        kept.of("a step meanwhile", step)
        if saver is not None:
            kept.of("waiting for the rest", saver.wait)
            kept.of("the copy alone", lambda: saver._copies.of(run._files()))
        kept.of("a step alone", step)
    print(f"peak memory: {before:,.0f} MiB before a checkpoint, {peak():,.0f} MiB at the end")
    return times


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
