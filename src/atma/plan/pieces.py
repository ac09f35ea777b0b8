"""Pieces of a training, measured in this process: real steps of models with few layers, and what ranks send each other.

A model that has one layer of each name, and others with two more of one of them: the differences are what a layer of
that name takes, and what is left is what the ends take. `python -m atma.plan.pieces FOLDER` does so in every one of
several processes at once and writes its results to FOLDER, so that they share the machine as the training's will.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atma import threads
from atma.config import Recipe, TrainConfig, load_recipe
from atma.model import Model
from atma.train.optim import Optimisers
from atma.train.owners import Owners
from atma.train.parallel import Ranks, join, wait
from atma.train.precision import choose_precision
from atma.train.start import adapters
from atma.train.step import Stepper, generator

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "processor": time.process_time}
"""Processor time leaves out what other programs take, and waiting."""
SETTINGS, RECIPE = "settings.json", "recipe.toml"
MORE = 2
"""Layers that a longer model has more than the shortest."""
SUMMED = 1 << 24
"""The most numbers that are summed over processes to measure the rate."""
SMALL, WORDS = 16, 64
"""Tokens and words of the step after which a process is as large as any before it has a model."""


class Settings(NamedTuple):
    """What is measured."""

    rows: int
    lengths: tuple[int, ...]
    rounds: int
    vocabulary: int
    """Words of the head that is measured."""
    threads: int
    clock: str = "wall"
    """One of `CLOCKS`."""


class _Rows(NamedTuple):
    tokens: Tensor
    targets: Tensor
    segment_ids: Tensor


class _Timed:
    """Optimisers whose updates are timed, of a process that moves everything."""

    owners = None

    def __init__(self, optimisers: Optimisers, now: Callable[[], float]) -> None:
        self.optimisers, self.now, self.seconds = optimisers, now, 0.0

    def zero_grad(self) -> None:
        self.optimisers.zero_grad()

    def step(self, multiplier: float) -> None:
        began = self.now()
        self.optimisers.step(multiplier)
        self.seconds = self.now() - began


class Piece:
    """Steps of one small model on random tokens."""

    def __init__(self, recipe: Recipe, train: TrainConfig, rows: int, clock: str = "wall") -> None:
        model, self.now = recipe.model, CLOCKS[clock]
        self.train = replace(train, batch_tokens=rows * train.length, accumulation=1, compile=False)
        made = Model(model, generator(0))
        self.attached = adapters(recipe, made)
        torch.nn.init.normal_(made.head.weight, std=0.02, generator=generator(1))
        compute = choose_precision(train.precision, torch.device("cpu"), model.width)
        self.timed = _Timed(Optimisers(made, self.train), self.now)
        self.stepper = Stepper(made, self.timed, self.train, compute, Ranks())  # pyright: ignore[reportArgumentType]
        ids = torch.randint(model.vocab_size, (rows, train.length + 1), generator=generator(2))
        self.batch = _Rows(ids[:, :-1], ids[:, 1:].clone(), torch.zeros(rows, train.length, dtype=torch.int32))

    def step(self) -> tuple[float, float]:
        """Seconds of both passes and of the update."""
        began = self.now()
        self.stepper(0, self.batch, 0.1)
        whole = self.now() - began
        return whole - self.timed.seconds, self.timed.seconds


def measure(recipe: Recipe, settings: Settings, ranks: Ranks) -> dict[str, Any]:
    """Of one process: seconds by layer and length, of the ends and an update; bytes a second; bytes it has at least."""
    resident = _resident(recipe)
    names = list(dict.fromkeys(recipe.model.layers))
    seconds = {length: _lengths(recipe, settings, names, length, ranks) for length in settings.lengths}
    first, second = settings.lengths[0], seconds[settings.lengths[0]]
    tokens = settings.rows * first
    size = recipe.model.vocab_size / settings.vocabulary
    layers = {name: {n: each[name][0] / (settings.rows * n) for n, each in seconds.items()} for name in names}
    counts = {name: recipe.model.layers.count(name) for name in names}
    update = second[""][1] * size + sum(counts[name] * second[name][1] for name in names)
    ends = second[""][0] / tokens * size
    return {
        "layers": layers,
        "ends": ends,
        "update": update,
        "bytes": _rate(recipe, ranks, settings.rounds, CLOCKS[settings.clock]) if ranks.world > 1 else 0.0,
        "resident": resident,
        "threads": torch.get_num_threads(),
    }


def _lengths(
    recipe: Recipe, settings: Settings, names: list[str], length: int, ranks: Ranks
) -> dict[str, tuple[float, float]]:
    """Seconds of passes and of the update that a layer of each name adds, and under "" those of the ends."""
    train = replace(recipe.train, length=length, batch_tokens=length * settings.rows, accumulation=1)
    model = recipe.model.changed({"vocab_size": settings.vocabulary})

    def piece(pattern: list[str]) -> Piece:
        layers = {"pattern": tuple(pattern), "depth": len(pattern)}
        return Piece(replace(recipe, model=model.changed(layers)), train, settings.rows, settings.clock)

    pieces = {"": piece(names)} | {name: piece([*names, *[name] * MORE]) for name in names}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in pieces}
    for turn in range(settings.rounds + 1):
        for name, one in pieces.items():
            wait(ranks)
            taken = one.step()
            if turn:
                found[name].append(taken)
    medians = {name: tuple(map(statistics.median, zip(*each, strict=True))) for name, each in found.items()}
    added = {n: tuple(max(0.0, (a - b) / MORE) for a, b in zip(medians[n], medians[""], strict=True)) for n in names}
    rest = tuple(max(0.0, medians[""][i] - sum(each[i] for each in added.values())) for i in range(2))
    return {name: (each[0], each[1]) for name, each in added.items()} | {"": (rest[0], rest[1])}


def _rate(recipe: Recipe, ranks: Ranks, rounds: int, now: Callable[[], float]) -> float:
    """Bytes a second that this process sends when gradients go to their owners and weights come back.

    Of as many numbers as a model of one layer has, up to `SUMMED`, as many of each process.
    """
    numbers = sum(p.numel() for p in Model(recipe.model.changed({"depth": 1})).parameters())
    each = min(SUMMED, numbers) // ranks.world
    parameters = {str(rank): torch.nn.Parameter(torch.zeros(each)) for rank in range(ranks.world)}
    owners = Owners(ranks, parameters, dict.fromkeys(parameters, 1.0))
    taken = []
    for _ in range(rounds + 1):
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        wait(ranks)
        began = now()
        owners.reduce()
        owners.spread()
        taken.append(now() - began)
    return 2 * (ranks.world - 1) / ranks.world * 4 * each * ranks.world / statistics.median(taken[1:])


def _resident(recipe: Recipe) -> int:
    """The most bytes of this process once it has made a step of the smallest model: see `smallest`."""
    small = smallest(recipe)
    Piece(small, small.train, 1).step()
    return peak_bytes()


def smallest(recipe: Recipe) -> Recipe:
    """The recipe with one layer of each name, few words and few tokens."""
    names = tuple(dict.fromkeys(recipe.model.layers))
    model = recipe.model.changed({"pattern": names, "depth": len(names), "vocab_size": WORDS})
    return replace(recipe, model=model, train=replace(recipe.train, length=SMALL, batch_tokens=SMALL, accumulation=1))


def peak_bytes() -> int:
    """The most that this process has had in memory; its parent's is not in it, as it is in `ru_maxrss`."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = status.read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def main(folder: Path) -> None:
    """Measure what `folder` says and write its results there."""
    values: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    settings = Settings(**values)._replace(lengths=tuple(values["lengths"]))
    threads.settle(settings.threads)
    ranks = join(torch.device("cpu"))
    found = measure(load_recipe(folder / RECIPE), settings, ranks)
    (folder / f"{ranks.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    threads.wait_briefly()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault(threads.NUMBER, "1")
    main(Path(sys.argv[1]))
