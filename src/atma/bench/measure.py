"""One measurement from its plan to its rows: every parity check, then the rates of the machine, then the times."""

from functools import partial

import torch

from atma.bench import attention, contests, conv, loss, recurrence
from atma.bench.machine import describe, measure_rates, settled
from atma.bench.plan import KINDS, Plan
from atma.bench.rows import Job, Result, Row, measure
from atma.narrow import home_of, width_of

OPERATIONS = {"polar": attention.jobs, "conv": conv.jobs, "loss": loss.jobs}
OPERATIONS |= {kind: partial(recurrence.jobs, kind) for kind in recurrence.RECURRENCES}
NOTES = {
    "ops": [
        "Sizes that fit into a cache can be faster than the floor, whose bytes move at the rate of the memory.",
    ],
    "train": ["Ours steps with Muon and AdamW, the peers with AdamW alone; tokens, width and depth are the same."],
    "decode": ["The peers' cache is the one that `generate` uses by default; it copies its keys at every token."],
    "prefill": ["Ours reads in chunks as `atma generate` does, the peers in one pass."],
}


def bench(kind: str, plan: Plan) -> Result:
    """Measure. ValueError for sizes that nothing here supports, and, before any time is taken, for a wrong result."""
    if kind not in KINDS:
        raise ValueError(f"no measurement '{kind}'; known: {', '.join(KINDS)}")
    widths = plan.weights if kind in ("decode", "prefill") else ()
    device, notes = home_of(width_of(widths[0]) if widths else None, plan.device), list(NOTES[kind])
    with settled(plan.threads):
        jobs = _jobs(kind, plan, device, notes)
        for job in jobs:
            job.check()
        rates = measure_rates(plan.dtypes, device, plan.repeats)
        rows: list[Row] = []
        for job in jobs:
            rows += measure(job.build(), plan.repeats, device, rates)
        return Result(kind, plan.command(kind), describe(device), rates, notes, rows)


def _jobs(kind: str, plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    if kind != "ops":
        return contests.jobs(kind, plan, device, notes)
    return [job for name in plan.operations for job in OPERATIONS[name](plan, device, notes)]
