"""Kill a training run again and again with SIGKILL, resume it each time, and compare it with one left alone.

    python benchmarks/sigkill.py --kills 25

Both runs train the `nano-test` preset on a corpus made up here. The final weights, the optimiser's state, and every
loss, gradient norm and rate in the record must be the same bits. Exit status 1 when anything differs.
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
from pathlib import Path
from typing import Any, NamedTuple

from atma.config import DataConfig, Recipe, TrainConfig, dump_toml, preset
from atma.data.prepare import Preparation, prepare

WORDS = "the of a to in is that it was for on are with as his they be at one have this from or had by"
BATCH_TOKENS = 512
STARTUP_SHARE = 0.15
"""Of the kills, so many fall before the first step of their process."""


class Kill(NamedTuple):
    """Seconds after the start of the process, steps in the record then, and what the run was doing if it shows."""

    seconds: float
    steps: int
    doing: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--steps", type=int, help="length of the run; by default 10 for every kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        steps = arguments.steps or 10 * arguments.kills
        recipe = make_recipe(Path(folder), steps)
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        seconds = time_of(command(recipe, whole, resume=False))
        kills = kill_often(recipe, killed, arguments.kills, steps, random.Random(arguments.seed))
        report(kills, seconds)
        wrong = differences(whole, killed)
        if len(kills) < arguments.kills:
            wrong.append(f"only {len(kills)} kills fell before the end of the run; raise --steps")
    print("\n".join(wrong) or f"{len(kills)} kills: weights, optimiser state and every logged number are bit-identical")
    return 1 if wrong else 0


def make_recipe(folder: Path, steps: int) -> Path:
    """A corpus of made-up sentences, and the recipe of a short run on it."""
    words = random.Random(1)
    lines = [" ".join(words.choices(WORDS.split(), k=words.randint(5, 200))) for _ in range(400)]
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text("\n".join(lines[number::8]))
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    train = TrainConfig(
        length=64,
        batch_tokens=BATCH_TOKENS,
        tokens=BATCH_TOKENS * steps,
        checkpoint_every=3,
        evaluate_every=7,
        evaluation_tokens=1024,
        regulariser="weak",
    )
    data = DataConfig(path=str(folder / "data"), recall_share=0.3)
    (folder / "recipe.toml").write_text(dump_toml(Recipe("sigkill", preset("nano-test"), data, train)))
    return folder / "recipe.toml"


def command(recipe: Path, run: Path, resume: bool) -> list[str]:
    line = [sys.executable, "-m", "atma", "train", str(recipe), "--out", str(run), "--device", "cpu"]
    return [*line, "--resume"] if resume else line


def start(line: list[str]) -> subprocess.Popen:
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})


def time_of(line: list[str]) -> float:
    began = time.monotonic()
    if start(line).wait():
        raise SystemExit(f"failed: {' '.join(line)}")
    return time.monotonic() - began


def kill_often(recipe: Path, run: Path, wanted: int, steps: int, moments: random.Random) -> list[Kill]:
    """Run to the end through `wanted` kills, spread over `steps` steps by what is left of both."""
    kills: list[Kill] = []
    while True:
        clock = time.time()
        process = start(command(recipe, run, resume=(run / "recipe.toml").exists()))
        began = time.monotonic()
        if len(kills) < wanted:
            share = (steps - len(train_steps(run))) / (wanted - len(kills) + 1)
            wait_a_while(process, run, share, moments)
            process.send_signal(signal.SIGKILL)
        if process.wait() == -signal.SIGKILL:
            kills.append(Kill(time.monotonic() - began, len(train_steps(run)), doing(run, clock)))
        elif process.returncode:
            raise SystemExit(f"the resumed run failed with status {process.returncode}")
        else:
            return kills


def wait_a_while(process: subprocess.Popen, run: Path, share: float, moments: random.Random) -> None:
    """Sleep to a random moment: sometimes of the start, mostly up to 2·`share` steps on, anywhere within a step."""
    if moments.random() < STARTUP_SHARE:
        time.sleep(moments.uniform(0, 4))
        return
    goal = len(train_steps(run)) + moments.uniform(0, 2 * share)
    while process.poll() is None and len(train_steps(run)) < goal:
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 1.5) * last_step_seconds(run))


def last_step_seconds(run: Path) -> float:
    speeds = [row["tokens_per_second"] for row in rows(run) if row["kind"] == "train"]
    return BATCH_TOKENS / speeds[-1] if speeds else 0.0


def doing(run: Path, since: float) -> str:
    """What the process that started at time `since` left unfinished."""
    for pattern, what in (("checkpoints/.*.staging", "writing a checkpoint"), (".final.*", "writing the final model")):
        if any(folder.stat().st_mtime > since for folder in run.glob(pattern)):
            return what
    record = run / "metrics.jsonl"
    return "training" if record.exists() and record.stat().st_mtime > since else "starting"


def rows(run: Path) -> list[dict[str, Any]]:
    text = (run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def train_steps(run: Path) -> list[int]:
    return [row["step"] for row in rows(run) if row["kind"] == "train"]


def report(kills: list[Kill], seconds: float) -> None:
    print(f"uninterrupted: {seconds:.1f} s\n{'kill':>4} {'after s':>8} {'step':>6}  while")
    for number, kill in enumerate(kills, 1):
        print(f"{number:4} {kill.seconds:8.2f} {kill.steps:6}  {kill.doing}")


def differences(whole: Path, killed: Path) -> list[str]:
    """What is not the same in two finished runs, a line each."""
    last = max(folder.name for folder in (whole / "checkpoints").iterdir())
    files = ["final/config.json", "final/model.safetensors"]
    files += [f"checkpoints/{last}/{name}" for name in ("model.safetensors", "optimizer.safetensors", "state.json")]
    wrong = [f"{name} differs" for name in files if (whole / name).read_bytes() != (killed / name).read_bytes()]
    for kind in ("train", "validation"):
        expected, found = (numbers(run, kind) for run in (whole, killed))
        wrong += [f"{kind} row {a} became {b}" for a, b in zip(expected, found, strict=False) if a != b][:3]
        if len(expected) != len(found):
            wrong.append(f"{len(expected)} {kind} rows became {len(found)}")
    return wrong


def numbers(run: Path, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind without their timings."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows(run) if row["kind"] == kind]


if __name__ == "__main__":
    sys.exit(main())
