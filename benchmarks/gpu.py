"""The GPU kernels on a CUDA machine: are they right, and how fast are they beside PyTorch's and others'.

    python benchmarks/gpu.py --out results

Builds nothing. First every kernel is compared with the float64 references on small shapes, forward and backward; an
operation that is wrong is told and not timed. Then, in turn with their peers: polar attention (beside SDPA and its
flash kernel), linear recurrences (beside transformers and flash-linear-attention, where installed), the convolution,
the loss, a training step of the base preset at 2,048 tokens in bfloat16 autocast, and decoding at batch 1. Results are
written after every part, as gpu.md and gpu.json, into --out, $OUT or runs/gpu. Exit status: 0; 1 where a kernel is
wrong or a part failed; 2 without a CUDA device.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atma.bench.machine import describe, settled
from atma.bench.measure import OPERATIONS, bench
from atma.bench.models import Ours
from atma.bench.plan import KINDS, Plan
from atma.bench.table import markdown
from atma.config import preset

SMALL = Plan(lengths=(1, 65, 200), heads=4, key_value_heads=2, vocabulary=1000, batch=2, device="cuda")


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        print("benchmarks/gpu.py: needs a CUDA device that PyTorch can use; this machine has none", file=sys.stderr)
        return 2
    device = torch.device("cuda")
    report = Report(Path(options.out), describe(device))
    right = [
        name
        for name in options.operations
        if report.part(f"parity of {name}", lambda name=name: parity(name, options.widths))
    ]
    for name in right:
        for plan in operation_plans(name, options):
            report.part(f"{name}, batch {plan.batch}", lambda plan=plan: measured("ops", plan))
    if options.models:
        report.part("parity of the model", model_parity)
    for kind, plan in model_plans(options):
        if kind in options.models:
            report.part(f"{kind} of {plan.preset}", lambda kind=kind, plan=plan: measured(kind, plan))
    return 1 if report.failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=os.environ.get("OUT", "runs/gpu"), help="folder of gpu.md and gpu.json")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--models", nargs="*", default=list(KINDS[1:]), choices=KINDS[1:], help="what models do")
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 128], help="head widths to check")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 32_768])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--preset", default="base", help="configuration of the model")
    parser.add_argument("--rows", type=int, default=8, help="rows of 2,048 tokens in a training step")
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 32_768])
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


class Report:
    """Parts as they are done, each at once on the terminal and in the files."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        self.folder, self.failed = folder, 0
        self.text = ["# Measurements on a GPU", "\n".join(f"- {name}: {value}" for name, value in machine.items())]
        self.found: dict[str, Any] = {"machine": machine, "parts": []}
        folder.mkdir(parents=True, exist_ok=True)

    def part(self, title: str, make: Callable[[], tuple[str, Any]]) -> bool:
        """Do a part and write down what came of it, whether it worked or not."""
        began, held = time.perf_counter(), True
        try:
            text, data = make()
        except Exception as error:  # one part that fails must not take the time of the others
            text, data, held = f"FAILED: {type(error).__name__}: {error}", {"error": str(error)}, False
            self.failed += 1
        torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        self.text.append(f"## {title}\n\n{text}\n\n{seconds:.0f} s")
        self.found["parts"].append({"title": title, "held": held, "seconds": seconds, "found": data})
        print(f"\n{self.text[-1]}", flush=True)
        (self.folder / "gpu.md").write_text("\n\n".join(self.text) + "\n", encoding="utf-8")
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        return held


def parity(name: str, widths: list[int]) -> tuple[str, Any]:
    """Every case of an operation on small shapes; ValueError at the first that is wrong or without a GPU kernel."""
    count = 0
    for width in widths:
        for dtype in ("float32", "bfloat16"):
            notes: list[str] = []
            plan = dataclasses.replace(SMALL, head_width=width, dtypes=(dtype,))
            jobs = OPERATIONS[name](plan, torch.device("cuda"), notes)
            with settled(0):
                for job in jobs:
                    job.check()
                    if "atma gpu" not in {entry.name for entry in job.build().entries}:
                        raise ValueError(f"the gpu kernel of {name} does not take this: {'; '.join(notes)}")
            count += len(jobs)
    return f"{count} cases are right (head widths {', '.join(map(str, widths))}; float32, bfloat16)", {"cases": count}


def model_parity() -> tuple[str, Any]:
    """The cut base model, trained, decoded and prefilled with every operation through `use_backend("gpu")`."""
    for dtype in (torch.float32, torch.bfloat16):
        for kind in ("train", "decode", "prefill"):
            Ours(preset("base"), "gpu", dtype, torch.device("cuda")).check(kind)
    return "training, decoding and prefill are right in float32 and bfloat16", {}


def operation_plans(name: str, options: argparse.Namespace) -> list[Plan]:
    """Batch 4 at the shortest length and 1 at the others, with the heads of the base preset."""
    config = preset("base")
    shared = Plan(
        operations=(name,),
        heads=config.query_heads,
        key_value_heads=config.key_value_heads,
        head_width=config.head_width,
        vocabulary=config.vocab_size,
        dtypes=tuple(options.dtypes),
        repeats=options.repeats,
        device="cuda",
    )
    first, *rest = options.lengths
    if name == "loss":
        return [dataclasses.replace(shared, lengths=(first, *rest[:1]))]
    plans = [dataclasses.replace(shared, lengths=(first,), batch=4)]
    return [*plans, dataclasses.replace(shared, lengths=tuple(rest))] if rest else plans


def model_plans(options: argparse.Namespace) -> list[tuple[str, Plan]]:
    """Training at 2,048 tokens and decoding at batch 1 on the GPU kernels, with peers; and prefill."""
    shared = Plan(preset=options.preset, dtypes=("bfloat16",), backends=("gpu",), device="cuda")
    shared = dataclasses.replace(shared, repeats=options.repeats)
    return [
        ("train", dataclasses.replace(shared, lengths=(2048,), batch=options.rows)),
        ("decode", dataclasses.replace(shared, contexts=tuple(options.contexts))),
        ("prefill", dataclasses.replace(shared, lengths=(2048, 8192))),
    ]


def measured(kind: str, plan: Plan) -> tuple[str, Any]:
    """A measurement as Markdown and as data."""
    result = bench(kind, plan)
    return markdown(result), result.as_dict()


if __name__ == "__main__":
    sys.exit(main())
