"""A report of invented numbers: what pages and figures are tested with."""

import math

import pytest

from atma.config import DataConfig, Recipe, TrainConfig, preset
from atma.report import Report, Run, Section
from atma.report.content import Answer, Recall
from atma.report.opening import opening

LENGTHS = tuple(256 * 2**i for i in range(7))
PROVENANCE = {"weights_sha256": "ab" * 32, "tokenizer_sha256": "cd" * 32, "data_hash": "ef" * 32, "seed": 1234}


def evaluation_rows(start: float, rise: float, recall: float) -> list[dict]:
    rows = []
    for i, length in enumerate(LENGTHS):
        documents = [start + rise * i + 0.01 * (j % 3 - 1) * (i + 1) for j in range(8)]
        loss = {
            "document_losses": documents,
            "loss": start + rise * i,
            "loss_low": start + rise * i - 0.1,
            "loss_high": start + rise * i + 0.1,
        }
        rows += [{"kind": kind, "length": length, "documents": 8} | loss for kind in ("fixed", "nested", "junk")]
        rows.append({"kind": "position", "start": length // 2, "end": length, "documents": 8} | loss)
        rows.append({"kind": "needle", "length": length, "trials": 32} | accuracies(max(0.0, recall - 0.1 * i)))
    rows += [summary(measure, rise) for measure in ("fixed", "nested", "junk")]
    return [row | {"provenance": PROVENANCE} for row in rows]


def accuracies(recall: float) -> dict:
    row: dict = {}
    for name, value in (("token", recall), ("exact", recall**5), ("absent_token", 0.1), ("absent_exact", 0.0)):
        low, high = max(0.0, value - 0.08), min(1.0, value + 0.08)
        row |= {f"{name}_accuracy": value, f"{name}_low": low, f"{name}_high": high}
    return row


def summary(measure: str, rise: float) -> dict:
    change = rise * (len(LENGTHS) - 1)
    return {
        "kind": "summary",
        "measure": measure,
        "lengths": list(LENGTHS),
        "documents": 8,
        "slope": rise,
        "slope_low": rise - 0.01,
        "slope_high": rise + 0.01,
        "change": change,
        "change_low": change - 0.05,
        "change_high": change + 0.05,
    }


def log_rows(final: float) -> list[dict]:
    steps = range(1, 1001)
    rows = [
        {"kind": "train", "step": s, "tokens": s * 8192, "loss": final + 4 * math.exp(-s / 90) + 0.05 * math.sin(s)}
        for s in steps
    ]
    rows += [{"kind": "validation", "step": s, "tokens": s * 8192, "loss": final + 0.1} for s in steps if s % 100 == 0]
    return [*rows, {"kind": "event", "step": 5, "event": "skipped"}]


def invented_run(name: str, core: str, start: float, rise: float, recall: float, seed: int = 0) -> Run:
    recipe = Recipe(name, preset("nano"), DataConfig(recall_share=0.3), TrainConfig(tokens=8_192_000, seed=seed))
    recipe = Recipe(name, type(recipe.model)(core=core, memory=core == "polar"), recipe.data, recipe.train)
    text = "def f(x):\n    return x </script><script>alert('no')</script> " + "word " * 200
    return Run(name, recipe, log_rows(start), evaluation_rows(start, rise, recall), text, prompt="import os\n")


@pytest.fixture(scope="module")
def report() -> Report:
    trained = Section(
        "Trained here, just now",
        [invented_run("ATMA", "polar", 2.91, -0.002, 0.2), invented_run("RoPE control", "rope", 2.95, 0.19, 0.1)],
        "A small model and its control, trained on the same tokens.",
    )
    packaged = Section(
        "The packaged pair",
        [invented_run("nano", "polar", 2.31, -0.01, 1.0), invented_run("nano-rope", "rope", 2.35, 0.2, 0.7)],
    )
    environment = {"Python": "3.13", "processor": "invented <one>", "threads": "2"}
    recall = Recall(
        "mine.txt",
        9_000,
        256,
        [
            Answer(name, length, trial, f"record {trial} is 12345", length - 51, "12345", trial < right)
            for trial in range(4)
            for length in (256, 16_384)
            for name, right in (("nano", 4 if length == 256 else 3), ("nano-rope", 0))
        ],
    )
    told = opening(["nano", "nano-rope"], 256, recall)
    cuts = ["Training: 9 steps and not 12."]
    command = "atma demo --out runs/demo"
    return Report("ATMA & control", command, environment, [trained, packaged], told, recall, cuts)
