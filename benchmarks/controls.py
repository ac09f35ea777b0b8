"""How strong can the control be made? Rotary attention with Canon, over rates, initial values, tokens and seeds.

    atma prepare stdlib --out data/stdlib --tokenizer bpe --vocab-size 1024
    python benchmarks/controls.py --data data/stdlib --out runs/controls --side-by-side 2

Trains the queue below, the first first, as many side by side as asked for, each into --out/NAME-SEED/final. With
--seconds, a run that cannot end in time is given up, the last of the queue first, and none is begun that cannot.
Runs that are there already are passed over. `runs.json` tells each run's status, its last losses and its speed.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from atma.config import Recipe, load_recipe
from atma.train import train
from atma.train.record import read_record

ROOT = Path(__file__).resolve().parents[1]
CANON = {"core": "rope", "memory": False, "rope_canon": True}
PUBLISHED = {"canon_init": "uniform", "share_query_key_init": False}
VARIANTS: dict[str, tuple[dict, dict]] = {
    "atma": ({}, {}),
    "rope": ({"core": "rope", "memory": False} | PUBLISHED, {}),
    "rope-canon": (CANON, {}),
    "rope-canon-uniform": (CANON | PUBLISHED, {}),
    "rope-canon-fast": (CANON, {"muon_rate": 0.02, "vector_rate": 0.012}),
    "rope-canon-slow": (CANON, {"muon_rate": 0.005, "vector_rate": 0.003}),
    "rope-canon-long": (CANON, {"tokens": 12_000_000}),
    "atma-long": ({}, {"tokens": 12_000_000}),
}
"""By name, what differs from recipes/nano.toml in its tables [model] and [train]."""
QUEUE = [(name, seed) for name in ("rope-canon", "atma") for seed in (0, 1, 2)]
QUEUE += [("rope-canon-fast", 0), ("rope-canon-slow", 0), ("rope-canon-uniform", 0)]
QUEUE += [("rope-canon-long", seed) for seed in (0, 1, 2)] + [("rope", seed) for seed in (0, 1, 2)]
QUEUE += [("atma-long", seed) for seed in (0, 1, 2)]
SETTLING = 45
"""Seconds after a run's beginning before its median speed is judged: kernels are compiled first."""


class Running(NamedTuple):
    """A training on its way."""

    name: str
    place: int
    recipe: Recipe
    process: subprocess.Popen
    began: float


def main() -> None:
    options = _options()
    if options.one:
        name, seed = options.one.rsplit("-", 1)
        train(_recipe(name, int(seed), options.data), options.out / options.one)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    queue = [(place, f"{name}-{seed}") for place, (name, seed) in enumerate(QUEUE)]
    queue = [entry for entry in queue if not (options.out / entry[1] / "final").exists()]
    running: list[Running] = []
    began, told = time.monotonic(), {}
    while queue or running:
        left = (options.seconds or float("inf")) - (time.monotonic() - began)
        while queue and len(running) < options.side_by_side and left > SETTLING:
            running.append(_start(*queue.pop(0), options))
        if not running:
            break
        time.sleep(1)
        for late in _given_up(running, options.out, left):
            late.process.kill()
            told[late.name] = "given up: no time left"
            break
        for ended in [run for run in running if run.process.poll() is not None]:
            running.remove(ended)
            told.setdefault(ended.name, f"status {ended.process.returncode}")
            found = _progress(ended, options.out) | {"ended": told[ended.name]}
            print(json.dumps({"run": ended.name} | found), flush=True)
            (options.out / ended.name / "told.json").write_text(json.dumps(found) + "\n", encoding="utf-8")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/stdlib", help="tokens of 1,024 ids, from `atma prepare`")
    parser.add_argument("--out", type=Path, default=Path("runs/controls"))
    parser.add_argument("--side-by-side", type=int, default=1, help="trainings at once")
    parser.add_argument("--seconds", type=float, help="when all must be done; without, when they are")
    parser.add_argument("--one", metavar="NAME-SEED", help="(a process of its own) train this one")
    return parser.parse_args()


def _recipe(name: str, seed: int, data: str) -> Recipe:
    recipe, (model, settings) = load_recipe(ROOT / "recipes/nano.toml"), VARIANTS[name]
    return replace(
        recipe,
        name=name,
        model=replace(recipe.model, **model),
        data=replace(recipe.data, path=data),
        train=replace(recipe.train, seed=seed, **settings),
    )


def _start(place: int, name: str, options: argparse.Namespace) -> Running:
    command = [sys.executable, __file__, "--data", options.data, "--out", str(options.out), "--one", name]
    kind, seed = name.rsplit("-", 1)
    with (options.out / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    return Running(name, place, _recipe(kind, int(seed), options.data), process, time.monotonic())


def _given_up(running: list[Running], out: Path, left: float) -> list[Running]:
    """Those that cannot end in the time that is left, the last of the queue first."""
    late = []
    for run in running:
        found = _progress(run, out)
        if time.monotonic() - run.began > SETTLING and "tokens" in found:
            more = run.recipe.train.tokens - found["tokens"]
            late += [run] * (more > left * found["tokens_per_second"])
    return sorted(late, key=lambda run: -run.place)


def _progress(run: Running, out: Path) -> dict:
    """How far a run is: tokens, losses, and its median speed."""
    try:
        rows = read_record(out / run.name)
    except (OSError, ValueError):
        return {}
    trained = [row for row in rows if row["kind"] == "train"]
    if not trained:
        return {}
    speeds = sorted(row["tokens_per_second"] for row in trained)
    found = {
        "tokens": trained[-1]["tokens"],
        "loss": trained[-1]["loss"],
        "tokens_per_second": speeds[len(speeds) // 2],
    }
    checked = [row["loss"] for row in rows if row["kind"] == "validation"]
    return found | {"validation": checked[-1] if checked else None, "seconds": round(time.monotonic() - run.began)}


if __name__ == "__main__":
    main()
