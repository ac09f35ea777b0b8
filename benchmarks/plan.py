"""What `atma plan` predicts of this machine, beside what a training then does: tokens a second, and the most memory.

    python benchmarks/plan.py --repeats 5 --out plan.json

Three sizes, one and two processes of one thread each. A prediction and a real run of `atma.train` follow each other,
in turns, on random tokens; medians, with the least and the most ratio of a turn as their spread. On a machine that
others use, --clock processor counts the time that a process computes, not the time that it waits for a core.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from atma.config import ModelConfig, Recipe, TrainConfig, dump_toml, load_recipe, preset
from atma.display import bytes_text, table_text
from atma.plan import Mesh, costs_of, held, measured, plan
from atma.plan.here import groups
from atma.plan.pieces import CLOCKS, peak_bytes
from atma.threads import NUMBER
from atma.train.loop import fit
from atma.train.parallel import join
from atma.train.precision import choose_precision
from atma.train.source import Source
from atma.train.step import generator

WARM = 2
"""Steps of a run that are not counted."""


class Rows:
    """Random tokens of a step: what they are changes no time."""

    def __init__(self, recipe: Recipe, step: int, world: int) -> None:
        train = recipe.train
        shape = (train.batch_tokens // (train.length * world), train.length + 1)
        ids = torch.randint(recipe.model.vocab_size, shape, generator=generator(step))
        self.began = {name: now() for name, now in CLOCKS.items()}
        self.tokens: Tensor = ids[:, :-1]
        self.targets: Tensor = ids[:, 1:].clone()
        self.segment_ids: Tensor = torch.zeros(self.tokens.shape, dtype=torch.int32)


def sizes() -> dict[str, Recipe]:
    """A tiny model, that of the recipe nano, and one of 20 million parameters."""
    medium: ModelConfig = preset("small").changed({"vocab_size": 4096, "width": 384, "depth": 8, "query_heads": 6})
    trains = {
        "nano-test": (preset("nano-test"), TrainConfig(length=256, batch_tokens=2048)),
        "nano": (preset("nano"), TrainConfig(length=256, batch_tokens=2048)),
        "20m": (medium, TrainConfig(length=256, batch_tokens=1024, accumulation=2)),
    }
    return {name: Recipe(name, model, train=train) for name, (model, train) in trains.items()}


def real(folder: Path) -> None:
    """One process of a run: its tokens a second and the most memory, into the folder."""
    recipe = load_recipe(folder / "recipe.toml")
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"))
    steps: list[Rows] = []

    def batch(step: int) -> Rows:
        steps.append(Rows(recipe, step, ranks.world))
        return steps[-1]

    fit(recipe, folder / "run", Source(batch, batch, 0, "random", recipe.model.vocab_size), ranks=ranks)
    if ranks.rank == 0:
        found: dict[str, float] = {"peak": peak_bytes()}
        for name in CLOCKS:
            taken = [after.began[name] - one.began[name] for one, after in itertools.pairwise(steps[WARM:])]
            found[name] = recipe.train.batch_tokens / statistics.median(taken)
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


def run(recipe: Recipe, processes: int, steps: int) -> dict[str, float]:
    """A real run of so many steps in as many processes."""
    train = replace(recipe.train, tokens=steps * recipe.train.batch_tokens, evaluate_every=0)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "recipe.toml").write_text(dump_toml(replace(recipe, train=train)), encoding="utf-8")
        command = [sys.executable, __file__, "--real", place]
        own = [group if processes > 1 else {} for _, group in groups(processes)]
        running = [subprocess.Popen(command, env=os.environ | group | {NUMBER: "1"}) for group in own]
        if max([process.wait() for process in running]) != 0:
            raise SystemExit(f"the run of {recipe.name} in {processes} processes failed")
        return json.loads((folder / "found.json").read_text(encoding="utf-8"))


def compare(recipe: Recipe, processes: int, options: argparse.Namespace) -> dict[str, object]:
    """Predictions and runs in turn."""
    compute = choose_precision(recipe.train.precision, torch.device("cpu"), recipe.model.width)
    costs = costs_of(recipe, compute)
    turns: list[dict[str, float]] = []
    for _ in range(options.repeats):
        pace = measured(costs, processes, options.rounds, 1, options.clock)
        option = next(one for one in plan(costs, processes, pace).options if one.mesh == Mesh(processes))
        assert not option.checkpointing
        peak = held(costs, option.mesh, False, pace.program).peak
        found = run(recipe, processes, options.steps)
        found["tokens_per_second"] = found[options.clock]
        turns.append({"predicted": option.tokens_per_second(recipe), "predicted_peak": peak} | found)
        print(recipe.name, processes, turns[-1], file=sys.stderr, flush=True)
    return {"size": recipe.name, "processes": processes, "parameters": costs.size.total, "turns": turns}


def table(rows: list[dict]) -> str:
    head = ["size", "processes", "predicted tokens/s", "measured", "ratio", "of turns", "predicted peak", "measured"]
    return table_text([*head, "ratio"], (list(_cells(row)) for row in rows))


def _cells(row: dict) -> Iterator[str]:
    turns = row["turns"]

    def middle(key: str) -> float:
        return statistics.median(turn[key] for turn in turns)

    ratios = sorted(turn["predicted"] / turn["tokens_per_second"] for turn in turns)
    yield from (f"{row['size']} ({row['parameters'] / 1e6:.3g}M)", str(row["processes"]))
    yield from (f"{middle('predicted'):,.0f}", f"{middle('tokens_per_second'):,.0f}")
    yield from (f"{statistics.median(ratios):.2f}", f"{ratios[0]:.2f} to {ratios[-1]:.2f}")
    yield from (bytes_text(middle("predicted_peak")), bytes_text(middle("peak")))
    yield f"{middle('predicted_peak') / middle('peak'):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", choices=sizes(), default=list(sizes()))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--real", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.real is not None:
        real(options.real)
        return
    cases = [(sizes()[name], processes) for name in options.sizes for processes in options.processes]
    rows = [compare(recipe, processes, options) for recipe, processes in cases]
    if options.out is not None:
        options.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    machine = f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, {options.clock} time, {options.repeats} turns")
    print(table(rows))


if __name__ == "__main__":
    main()
