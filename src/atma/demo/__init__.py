"""The demonstration: recall at length of the packaged models, live; then a small set of models trained here and now,
measured with the packaged ones far beyond their length; then a report.

It ends in the minutes given, on a quiet machine and on a busy one: every stage has a share of the time that is left
when it begins, measures as it goes, and does less where less fits. What was cut, and Ctrl-C, are told in the report.
"""

import math
from pathlib import Path

from atma.demo.pace import Pace
from atma.demo.plan import CONTENDERS, Contender, Packaged, Plan
from atma.demo.stages import Demo, packaged_section, recall_stage, report_stage, trained_section
from atma.demo.training import training_speed

__all__ = ["CONTENDERS", "Contender", "Demo", "Pace", "Plan", "demo", "training_speed"]


def demo(
    out: str | Path = Path("runs/demo"),
    minutes: float = 11.0,
    seeds: int = 1,
    text: Path | None = None,
    plan: Plan | None = None,
    threads: int = 0,
    pace: Pace | None = None,
) -> Path:
    """Run the demonstration into folder `out`; returns the path of its report.html.

    minutes: what it may take in all; seeds: how many models of each kind to train in that time; text: a file to hide
    facts in, by default Python's language reference; threads: 0 to measure them; pace: a clock of one's own.
    ValueError at once if a packaged model is missing.
    """
    if not 0 < minutes < math.inf or seeds < 1:
        raise ValueError(f"a demonstration needs time and a seed, not {minutes} minutes and {seeds} seeds")
    plan = plan or Plan()
    packaged = [Packaged.open(contender) for contender in plan.contenders]
    run = Demo(Path(out), plan, pace or Pace(minutes * 60), seeds, packaged, text, threads)
    command = f"atma demo --out {out} --minutes {minutes:g} --seeds {seeds}"
    command += f" --text {text}" if text else ""
    with run.interruptible():
        recalled = recall_stage(run)
        sections = [section for section in (trained_section(run), packaged_section(run)) if section.runs]
        return report_stage(run, command, recalled, sections)
