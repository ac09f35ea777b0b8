"""Kill the workers and the controller of a sweep again and again with SIGKILL, and check that nothing shows.

    python benchmarks/sweep_kills.py --kills 20

Runs a sweep of cells of about a second each, starting the controller again whenever it was the one killed. Afterwards
every cell must have exactly one result, whole, with the weights and the measurements of a sweep that nobody disturbed.
Exit status 1 when anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from atma.data.prepare import Preparation, prepare
from atma.sweep.cells import load_sweep

WORDS = "the of a to in is that it was for on are with as his they be at one have this from or had by"
CONTROLLER_SHARE = 0.25
"""Of the kills, so many hit the controller."""
RECIPE = """
[model]
preset = "nano-test"
[data]
path = "{data}"
[train]
length = 64
batch_tokens = 512
tokens = {tokens}
evaluate_every = 1000
evaluation_tokens = 1024
checkpoint_every = 5
[evaluation]
lengths = [64, 128, 256]
documents = 2
target_tokens = 32
needle_trials = 0
[sweep]
seeds = {seeds}
deaths = 1000
lease = 5.0
[sweep.factors]
attention = {{ field = "model.core", values = ["polar", "nope", "rope"] }}
memory = {{ field = "model.memory", values = [false, true] }}
regularizer = {{ field = "train.regulariser", values = ["none", "weak"] }}
"""
MEASURED = ("metrics", "factors", "seed", "config")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=2, help="12 cells for each")
    parser.add_argument("--steps", type=int, default=30, help="of each cell's training")
    parser.add_argument("--pause", type=float, default=6.0, help="most seconds between two kills")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(Path(folder), arguments.seeds, arguments.steps)
        began = time.monotonic()
        run(recipe, Path(folder) / "whole", arguments.workers).wait()
        alone = time.monotonic() - began
        kills = kill_often(recipe, Path(folder) / "killed", arguments)
        print(f"undisturbed {alone:.0f} s, killed {time.monotonic() - began - alone:.0f} s, kills: {dict(kills)}")
        cells = [cell.id for cell in load_sweep(recipe).cells]
        wrong = differences(Path(folder) / "whole", Path(folder) / "killed", cells)
        wrong += [f"only {kills.total()} kills"] if kills.total() < arguments.kills else []
    print("\n".join(wrong) or f"{len(cells)} cells: one whole result each, with equal weights and measurements")
    return 1 if wrong else 0


def make_recipe(folder: Path, seeds: int, steps: int) -> Path:
    """A corpus of made-up sentences, and the recipe of a sweep on it."""
    words = random.Random(1)
    lines = [" ".join(words.choices(WORDS.split(), k=words.randint(5, 200))) for _ in range(400)]
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines[number::8]))
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    text = RECIPE.format(data=folder / "data", tokens=512 * steps, seeds=list(range(seeds)))
    (folder / "kills.toml").write_text(text)
    return folder / "kills.toml"


def run(recipe: Path, out: Path, workers: int) -> subprocess.Popen:
    """The controller, in a process of its own."""
    line = [sys.executable, "-m", "atma", "sweep", "run", str(recipe), "--out", str(out)]
    line += ["--workers", str(workers), "--threads", "1", "--device", "cpu"]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL)


def kill_often(recipe: Path, out: Path, arguments: argparse.Namespace) -> Counter[str]:
    """Kill one of the sweep's processes at random moments until it ends; whom, how often."""
    moments, kills = random.Random(arguments.seed), Counter()
    controller = run(recipe, out, arguments.workers)
    while controller.poll() is None or controller.returncode < 0:
        if controller.poll() is not None:
            controller = run(recipe, out, arguments.workers)
        deadline = time.monotonic() + moments.uniform(0.2, arguments.pause)
        while controller.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if kills.total() < arguments.kills and controller.poll() is None:
            kills.update(kill_one(controller, moments))
            controller.poll()
    if controller.returncode:
        raise SystemExit(f"the controller failed with status {controller.returncode}")
    return kills


def kill_one(controller: subprocess.Popen, moments: random.Random) -> list[str]:
    """SIGKILL the controller or one of its workers; whom, or nobody where there is no worker yet."""
    if moments.random() < CONTROLLER_SHARE:
        controller.kill()
        controller.wait()
        return ["controller"]
    workers = children(controller.pid)
    if not workers:
        return []
    os.kill(moments.choice(workers), signal.SIGKILL)
    return ["worker"]


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def differences(whole: Path, killed: Path, cells: list[str]) -> list[str]:
    """What of the killed sweep is not as it should be."""
    wrong = []
    found = sorted(path.name for path in (killed / "cells").iterdir())
    if found != sorted(cells):
        wrong.append(f"{len(found)} cell folders for {len(cells)} cells")
    for cell in cells:
        wrong += [f"{cell}: {what}" for what in cell_differences(whole / "cells" / cell, killed / "cells" / cell)]
    return wrong


def cell_differences(whole: Path, killed: Path) -> list[str]:
    try:
        wanted, found = (json.loads((folder / "result.json").read_text()) for folder in (whole, killed))
    except (OSError, ValueError) as error:
        return [f"no whole result: {error}"]
    timed = {"train_seconds", "train_tokens_per_second"}
    for result in (wanted, found):
        result["metrics"] = {key: value for key, value in result["metrics"].items() if key not in timed}
    wrong = [f"'{key}' differs" for key in MEASURED if wanted[key] != found[key]]
    if wanted["provenance"]["weights_sha256"] != found["provenance"]["weights_sha256"]:
        wrong.append("the weights differ")
    runs = [path.name for path in killed.glob("run-*") if (path / "final").exists()]
    if len(runs) != 1:
        wrong.append(f"final models of {runs}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
