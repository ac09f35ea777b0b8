"""A sweep of 24 invented cells in the layout of `atma sweep run`: 3 cores × memory × window × 2 seeds, with logs."""

import itertools
import json
from pathlib import Path

import numpy as np

LENGTHS = tuple(256 * 4**i for i in range(4))
CORES, MEMORY, WINDOWS, SEEDS = ("nope", "polar", "rope"), (False, True), ("none", 64), (0, 1)
RECALL = {"nope": 20.0, "polar": 30.0, "rope": 0.0}
HOSTILE = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">"


def write_sweep(folder: Path) -> Path:
    """Write all 24 cells below `folder` and return it."""
    for core, memory, window, seed in itertools.product(CORES, MEMORY, WINDOWS, SEEDS):
        write_cell(folder, {"attention": core, "memory": memory, "window": window}, seed)
    return folder


def write_cell(folder: Path, factors: dict, seed: int) -> Path:
    name = "-".join(map(str, (*factors.values(), seed)))
    cell = folder / "cells" / name
    (cell / "run-000001").mkdir(parents=True)
    speed = 2000.0 if factors["memory"] else 4000.0
    result = {
        "cell": name,
        "factors": factors,
        "seed": seed,
        "metrics": metrics(factors, seed),
        "rows": [],
        "config": {"name": HOSTILE, "train": {"length": 256, "seed": seed}},
        "provenance": {},
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": 12.5,
    }
    (cell / "result.json").write_text(json.dumps(result), encoding="utf-8")
    (cell / "run-000001" / "metrics.jsonl").write_text(record(result["metrics"]["final_val_loss_nats"], speed), "utf-8")
    (cell / "work.log").write_text(f"{name}: 100 steps to go\n{HOSTILE}\ndone\n", encoding="utf-8")
    return cell


def metrics(factors: dict, seed: int) -> dict[str, float]:
    """Recall with an interaction of core and memory; multiples of 1.25 as of 80 digits; noise of its own per cell."""
    noise = np.random.default_rng([seed, *map(ord, "".join(map(str, factors.values())))])
    gain = (40.0 if factors["attention"] == "polar" else 5.0) * factors["memory"]
    loss = 3.0 - 0.2 * factors["memory"] + 0.1 * (factors["window"] != "none")
    found = {"final_val_loss_nats": round(loss + noise.normal(0, 0.02), 5), "params": 1000 + 100 * factors["memory"]}
    found["train_seconds"] = round(100.0 * (1 + factors["memory"]) + noise.uniform(0, 20), 3)
    for i, length in enumerate(LENGTHS):
        recall = RECALL[factors["attention"]] + gain - 4 * i + noise.normal(0, 6)
        found[f"clean_nll_{length}"] = round(loss - 0.1 * i + noise.normal(0, 0.02), 5)
        found[f"needle_token_acc_{length}"] = 1.25 * round(min(100.0, max(0.0, recall)) / 1.25)
    return found


def record(final: float, speed: float) -> str:
    """Ten steps of 1,000 tokens at `speed` tokens a second, with a validation after every second."""
    rows = []
    for step in range(1, 11):
        loss = final + 2.0 / step
        rows.append({"kind": "train", "step": step, "tokens": 1000 * step, "loss": loss, "tokens_per_second": speed})
        if step % 2 == 0:
            rows.append({"kind": "validation", "step": step, "tokens": 1000 * step, "loss": loss + 0.1})
    return "".join(json.dumps(row) + "\n" for row in rows)
