"""This machine's pace: pieces of the training, measured in as many processes at once as there are ranks and cores."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from atma.config import Recipe, dump_toml
from atma.plan.costs import Costs
from atma.plan.memory import held
from atma.plan.meshes import Mesh
from atma.plan.paces import Measured, Pieces
from atma.plan.pieces import MORE, RECIPE, SETTINGS, Settings, smallest
from atma.plan.work import outline, size_of
from atma.threads import NUMBER, cores

LONGEST = 2048
"""The longest rows that are measured."""
SHORTEST = 32
STEP_PRODUCTS = 2e10
"""Multiply-adds of the forward pass of a measured step, at the most: some seconds a step on one core."""
ENDS_NUMBERS = 1 << 23
"""Numbers of a head that is measured whole; of a larger one a part is, and its time is scaled."""
PATIENCE = 1800
"""Seconds after which processes that measure are given up."""


def measured(costs: Costs, gpus: int, rounds: int = 5, threads: int = 0, clock: str = "wall") -> Measured:
    """Measure.

    threads: of each process; 0: as training has them, one each where there are several processes. clock: of `CLOCKS`.
    ValueError: a process that measures ended with an error, or did not end.
    """
    processes = max(1, min(gpus, cores()))
    settings = _settings(costs, gpus, rounds, threads)._replace(clock=clock)
    with tempfile.TemporaryDirectory() as folder:
        found = _run(Path(folder), costs.recipe, settings, processes)
    return Measured(costs, _pieces(costs, settings, found))


def _settings(costs: Costs, gpus: int, rounds: int, threads: int) -> Settings:
    recipe = costs.recipe
    train, model = recipe.train, recipe.model
    words = max(64, min(model.vocab_size, ENDS_NUMBERS // model.width))
    each = words * model.width + sum((1 + MORE) * one.dense for one in costs.layers.values())
    tokens = int(STEP_PRODUCTS / each)
    length = train.length if train.length <= LONGEST else LONGEST
    while length > max(SHORTEST, tokens):
        length //= 2
    rows = train.batch_tokens // (train.length * train.accumulation * gpus)
    lengths = (length,) if length == train.length else (length, length // 2)
    return Settings(max(1, min(rows, tokens // length)), lengths, rounds, words, threads)


def _run(folder: Path, recipe: Recipe, settings: Settings, processes: int) -> list[dict[str, Any]]:
    """Results of every process."""
    (folder / SETTINGS).write_text(json.dumps(settings._asdict()), encoding="utf-8")
    started = replace(recipe, train=replace(recipe.train, init_from="", init_hash=""))
    (folder / RECIPE).write_text(dump_toml(started), encoding="utf-8")
    running = [_started(folder, rank, processes, environment) for rank, environment in groups(processes)]
    try:
        statuses = [process.wait(timeout=PATIENCE) for process in running]
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"measuring this machine did not end within {PATIENCE} s; name a --device instead") from error
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
    if any(statuses):
        told = (folder / f"{statuses.index(max(statuses, key=abs))}.txt").read_text(encoding="utf-8", errors="replace")
        last = (told.strip().splitlines() or ["it said nothing"])[-1]
        raise ValueError(f"measuring this machine failed: {last}; name a --device instead")
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]


def groups(processes: int) -> list[tuple[int, dict[str, str]]]:
    """The environment of each process, as torchrun sets it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [(rank, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]


def _started(folder: Path, rank: int, processes: int, group: dict[str, str]) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    if processes > 1:
        environment |= group | {NUMBER: environment.get(NUMBER, "1")}
    command = [sys.executable, "-m", "atma.plan.pieces", str(folder)]
    with (folder / f"{rank}.txt").open("wb") as told:
        return subprocess.Popen(command, env=environment, stdout=told, stderr=subprocess.STDOUT)


def _pieces(costs: Costs, settings: Settings, found: list[dict[str, Any]]) -> Pieces:
    """Of all processes together: the slowest of each time, since a step ends when its last process does."""
    layers = {
        name: {length: max(one["layers"][name][str(length)] for one in found) for length in settings.lengths}
        for name in costs.layers
    }
    small = smallest(costs.recipe)
    there = costs._replace(recipe=small, size=size_of(small, outline(small)))
    own = held(there, Mesh(), False, 0.0).peak
    return Pieces(
        layers=layers,
        ends=max(one["ends"] for one in found),
        update=max(one["update"] for one in found),
        bytes=min(one["bytes"] for one in found),
        program=max(0.0, max(one["resident"] for one in found) - own),
        room=_memory() / len(found),
        processes=len(found),
        told=_told(costs, settings, found),
    )


def _told(costs: Costs, settings: Settings, found: list[dict[str, Any]]) -> str:
    lengths = " and ".join(map(str, settings.lengths))
    several = f", by {len(found)} processes at once that also send each other gradients" if len(found) > 1 else ""
    part = f", with {settings.vocabulary:,} of its words" if settings.vocabulary < costs.recipe.model.vocab_size else ""
    return (
        f"this machine, measured: medians of {settings.rounds} steps of models of {', '.join(costs.layers)} with one "
        f"layer of each name and with {MORE} more of one of them, {settings.rows} rows of {lengths} tokens{part}, "
        f"{found[0]['threads']} thread{'s' * (found[0]['threads'] != 1)} a process{several}; more ranks than "
        f"{len(found)} are taken to be as fast and as near"
    )


def _memory() -> float:
    """Bytes of memory of this machine."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    raise ValueError("how much memory this system has is not known; name a --device instead")
