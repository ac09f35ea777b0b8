"""Everything that is worth knowing of a GPU, in one command of at most nine minutes.

    python benchmarks/gpu_first.py --out results --data data/stdlib-16k

Parts, each a process with its own time limit, its result written as it ends: the tests of every Triton kernel against
float64; operations and models beside their peers (`gpu.py`); neural memories beside PyTorch's (`gpu_memories.py`); a
training of the small preset at 2,048 tokens; and as many trainings of the nano preset side by side as --side-by-side
says. --only leaves the other parts out.

Results: first.md, first.json (each part's status, seconds and last lines), first.log (all
that the parts print) and parts/ (what the other scripts write), in --out, $OUT or runs/gpu.
Exit status: 0; 1 where a part failed or ran out of time; 2 without a CUDA device.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
LAST_LINES = 60
ENVIRONMENT = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # the tests ask for deterministic algorithms
}


class Part(NamedTuple):
    """One process: its name, the most seconds it may take, and its arguments after the interpreter."""

    name: str
    seconds: float
    arguments: list[str]


def main() -> int:
    options = _options()
    if options.train and options.side_by_side:
        return side_by_side(options)
    if options.train:
        return train(options.train, options.seconds, options.data, Path(options.out), options.seed)
    if not torch.cuda.is_available():
        print(
            "benchmarks/gpu_first.py: needs a CUDA device that PyTorch can use; this machine has none", file=sys.stderr
        )
        return 2
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), []
    for part in parts(options):
        left = 60 * options.minutes - (time.monotonic() - began)
        done.append(run(part, min(part.seconds, left), folder))
        write(done, folder)
    return 0 if all(result["status"] == 0 for result in done) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="folder of the results")
    parser.add_argument("--data", help="tokens of 16,384 ids from `atma prepare`, for the training of small")
    parser.add_argument("--minutes", type=float, default=9, help="when all must be done")
    parser.add_argument("--only", nargs="*", help="names of the parts to do; all by default")
    parser.add_argument("--side-by-side", type=int, default=0, help="trainings of nano at once")
    parser.add_argument("--nano-data", help="tokens for these, of 1,024 ids")
    parser.add_argument("--train", choices=["small", "nano"], help="(a part) train this preset for --seconds and end")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def parts(options: argparse.Namespace) -> list[Part]:
    """What to do, in order."""
    gpu, folder = str(HERE.with_name("gpu.py")), Path(options.out)
    processes = str(min(12, os.cpu_count() or 1))
    tests = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/ops/test_*_gpu.py"))
    pytest = ["-m", "pytest", "-W", "default", "-n", processes, "--tb=short", "--maxfail=60"]
    me, made = [str(HERE), "--out", str(folder)], [Part("tests", 180, [*pytest, *tests])]
    if options.nano_data:
        each = ["--train", "nano", "--seconds", "20", "--data", options.nano_data]
        made.append(Part("side by side", 60, [*me, "--side-by-side", str(options.side_by_side), *each]))
    if options.data:
        made.append(Part("training", 70, [*me, "--train", "small", "--seconds", "30", "--data", options.data]))
    for name in ("polar", "delta", "conv", "loss"):
        arguments = [gpu, "--operations", name, "--models", "--widths", "128", "--out", str(folder / "parts" / name)]
        made.append(Part(name, 90, arguments))
    for kind in ("train", "decode", "prefill"):
        arguments = [gpu, "--operations", "--models", kind, "--out", str(folder / "parts" / kind)]
        made.append(Part(kind, 60, arguments))
    memories = str(HERE.with_name("gpu_memories.py"))
    made.append(Part("memories", 90, [memories, "--out", str(folder / "parts" / "memories")]))
    for name in ("kda", "gla", "mamba2"):  # much of their time is Triton's compiler
        arguments = [gpu, "--operations", name, "--models", "--widths", "128", "--out", str(folder / "parts" / name)]
        made.append(Part(name, 150, arguments))
    return [part for part in made if not options.only or part.name in options.only]


def run(part: Part, seconds: float, folder: Path) -> dict:
    """Do a part in its own process, its output in a log; status 124 where the time ended it."""
    log, began = folder / "first.log", time.monotonic()
    with log.open("ab") as output:
        before = output.tell()
        command = ["timeout", "-k", "5", f"{max(1, seconds):.0f}", sys.executable, *part.arguments]
        environment = os.environ | ENVIRONMENT
        status = subprocess.call(command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
    text = log.read_bytes()[before:].decode("utf-8", "replace").splitlines()
    result = {
        "part": part.name,
        "status": status,
        "seconds": round(time.monotonic() - began),
        "end": text[-LAST_LINES:],
    }
    print(f"{part.name}: status {status}, {result['seconds']} s", *text[-8:], sep="\n  ", flush=True)
    return result


def write(done: list[dict], folder: Path) -> None:
    """The parts so far, as text and as data."""
    (folder / "first.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    shown = [f"## {r['part']}\n\nstatus {r['status']}, {r['seconds']} s\n\n" + "\n".join(r["end"]) for r in done]
    (folder / "first.md").write_text("\n\n".join(shown) + "\n", encoding="utf-8")


def train(name: str, seconds: float, data: str, out: Path, seed: int) -> int:
    """Train a preset on `data` until `seconds` are over; print loss, tokens a second, peak memory."""
    from atma.config import DataConfig, Recipe, TrainConfig, preset
    from atma.train.loop import Stopped
    from atma.train.loop import train as run_training
    from atma.train.record import read_record

    length, batch = (2048, 65_536) if name == "small" else (256, 4096)
    steps = TrainConfig(length=length, batch_tokens=batch, tokens=10**10, seed=seed, evaluate_every=0)
    folder = Path("/tmp") / f"gpu-first-{os.getpid()}"
    began = time.monotonic()
    try:
        recipe = Recipe(name, preset(name), DataConfig(path=data), replace(steps, checkpoint_every=10**9))
        run_training(recipe, folder, stop=lambda: time.monotonic() - began > seconds)
    except Stopped:
        pass
    rows = [row for row in read_record(folder) if row["kind"] == "train"]
    speeds = sorted(row["tokens_per_second"] for row in rows[len(rows) // 4 :])
    found = {"preset": name, "seed": seed, "steps": len(rows), "tokens": rows[-1]["tokens"], "loss": rows[-1]["loss"]}
    found |= {"first loss": rows[0]["loss"], "median tokens a second": speeds[len(speeds) // 2]}
    found["peak GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    print(json.dumps(found))
    return 0


def side_by_side(options: argparse.Namespace) -> int:
    """As many trainings at once, of other seeds. Returns how many failed."""
    command = [sys.executable, str(HERE), "--train", options.train, "--data", options.data]
    command += ["--seconds", str(options.seconds), "--seed"]
    started = [subprocess.Popen([*command, str(seed)]) for seed in range(options.side_by_side)]
    return sum(process.wait() != 0 for process in started)


if __name__ == "__main__":
    sys.exit(main())
