"""`atma compare`: any set of mixers, trained alike, on one table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from atma.bars import bars
from atma.compare.plan import Comparison

if TYPE_CHECKING:
    from atma.compare.board import Board
    from atma.sweep.ledger import Ledger

VERBS = {
    "run": ("compare.run", "train and measure every entrant with workers, or go on; then the table and the page"),
    "table": ("compare.table", "the table and the page of what is done so far"),
    "work": ("compare.work", "be one worker of a comparison, beside others that share the folder"),
}
GROUPS = {"text": "text", "tasks": "tasks learned alone, answers right", "cost": "what it costs"}
OPTIONS, SPEEDS, PAGE = "compare.json", "speed.json", "compare.html"


def run(
    comparison: Annotated[Comparison, tyro.conf.OmitArgPrefixes] = Comparison(),  # noqa: B008
    out: Path = Path("runs/compare"),
    workers: int = 1,
    threads: int | None = None,
    device: str | None = None,
    retry: bool = False,
    speed: bool = True,
) -> None:
    """Compare mixers: the same text, tokens and parameters for all, and the same questions.

    Stopped in whatever way, the same line goes on. Entrants, seeds and tasks can be added later in the same folder.

    Args:
        comparison: Who is compared, on what, and for how long.
        out: The folder of the comparison.
        workers: Processes that train and measure.
        threads: Threads of each; the cores divided by the workers by default.
        device: cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default.
        retry: Try again what failed before.
        speed: At the end, also time training and decoding of all entrants in turn.
    """
    from atma.compare.plan import plan
    from atma.device import device_of
    from atma.strict import to_dict
    from atma.sweep.controller import Controller, Crew
    from atma.sweep.data import check_data, prepare_data
    from atma.sweep.display import display
    from atma.sweep.files import remove_abandoned, replace
    from atma.sweep.ledger import Ledger

    device_of(device)
    crew = Crew.choose(workers, threads, device, "compare")
    made = plan(comparison)
    with bars() as progress:
        prepare_data(made.trained, progress)
    ledger = Ledger.create(out, made)
    replace(ledger.folder / OPTIONS, to_dict(comparison))
    check_data(made.trained, ledger)
    remove_abandoned(ledger.folder)
    if retry:
        print(f"{ledger.retry()} pieces to try again")
    with display() as shown:
        Controller(ledger.folder / OPTIONS, ledger, crew, shown).go()
    if speed:
        _time(comparison, ledger, str(device_of(device)))
    _show(comparison, ledger)


def table(folder: Path = Path("runs/compare"), /) -> None:
    """The table on the terminal, and the page, of what a comparison has done so far.

    Args:
        folder: The folder of the comparison.
    """
    from atma.sweep.ledger import Ledger

    _show(_options(folder / OPTIONS), Ledger.open(folder))


def work(
    options: Path,
    /,
    out: Path | None = None,
    threads: int | None = None,
    device: str | None = None,
    parent: int | None = None,
) -> None:
    """Be one worker of a comparison, on this machine or on another that shares the folder.

    Args:
        options: compare.json of the comparison's folder.
        out: The folder; that of the options by default.
        threads: Threads to compute with.
        device: cpu, cuda or a certain GPU such as cuda:1; a GPU if there is one by default.
        parent: Stop when the process of this number, which must be the one that starts this, ends.
    """
    import torch

    from atma.compare.lessons import run_piece
    from atma.compare.plan import plan
    from atma.sweep.data import check_data
    from atma.sweep.ledger import Ledger
    from atma.sweep.worker import Worker

    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads {threads}: at least 1")
        torch.set_num_threads(threads)
    made = plan(_options(options))
    ledger = Ledger.create(out or options.parent, made)
    check_data(made.trained, ledger)
    Worker(made, ledger, device, parent, lambda text: print(text, flush=True), run_piece).go()


def _options(path: Path) -> Comparison:
    from atma.strict import from_dict
    from atma.sweep.files import read

    values = read(path)
    if values is None:
        raise ValueError(f"{path}: no comparison here; begin it with `atma compare run`")
    return from_dict(Comparison, values)


def _time(comparison: Comparison, ledger: "Ledger", device: str) -> None:
    """Once for these entrants on this machine."""
    from atma.compare.speed import Pace, speeds
    from atma.config import identity
    from atma.report.content import environment
    from atma.sweep.files import read, replace

    found, pace = comparison.entrants(), Pace(comparison.length, comparison.lengths()[-1])
    stamp = {"entrants": [identity(one.model) for one in found], "machine": environment(), "device": device}
    stamp |= {"pace": list(pace)}
    if (read(ledger.folder / SPEEDS) or {}).get("stamp") == stamp:
        return
    print("timing training and decoding, all entrants in turn")
    rows = speeds(found, pace, device)
    replace(ledger.folder / SPEEDS, {"stamp": stamp, "rows": rows})


def _show(comparison: Comparison, ledger: "Ledger") -> None:
    from atma.commands.suite import print_table
    from atma.compare.board import board
    from atma.sweep.files import read

    timed = (read(ledger.folder / SPEEDS) or {}).get("rows", [])
    found = board(comparison, ledger.results(), timed, len(ledger.cells))
    for group, title in GROUPS.items():
        brief = found.table(group)
        if len(brief.header) > 1:
            print_table(title, brief.header, brief.rows)
    print(f"{found.done} of {found.of} pieces. {_caption(comparison, found)}")
    failed = ledger.failures()
    for name, failure in failed[:3]:
        print(f"failed: {name}: {failure['error']}")
    if found.results:
        print(f"page: {_page(found, comparison, ledger.folder / PAGE)}")
    if failed:
        raise ValueError(f"{len(failed)} of {found.of} pieces failed; mend the cause, then run with --retry")


def _page(found: "Board", comparison: Comparison, path: Path) -> Path:
    from atma.commands.suite import command_line
    from atma.compare.pictures import pictures, sentences
    from atma.report.content import environment
    from atma.report.plain import plain_page

    title = f"{len(found.entrants)} mixers, trained alike"
    said = sentences(found)
    note = _caption(comparison, found)
    return plain_page(path, title, pictures(found), command_line(), environment(), said, note, found.table())


def _caption(comparison: Comparison, found: "Board") -> str:
    equal = "as many parameters as the first" if comparison.parameters == "equal" else "parameters as they come"
    seeds = f"{len(comparison.seeds)} seed{'s' * (len(comparison.seeds) > 1)}"
    trained = [f"{comparison.tokens:,} tokens of text at {comparison.length} tokens"] * (comparison.tokens > 0)
    trained += [f"at most {comparison.task_tokens:,} tokens of each task"] * bool(comparison.tasks)
    hours = sum(row.get("processor_seconds", 0.0) for row in found.results) / 3600
    trials = [comparison.evaluation().trials(length) for length in comparison.lengths()]
    parts = [f"{', '.join([*trained, seeds, equal])}. This took {hours:.1f} hours of processor time."]
    if comparison.tokens:
        parts.append(
            f"Losses are of the same last tokens of {comparison.documents} documents. Needles are teacher-forced, in "
            f"the text trained on: {trials[0]} trials at 1×, {trials[-1]} at {comparison.longest}×."
        )
    asked = "± is the 95% interval over seeds, of which all are asked the same."
    return " ".join([*parts, asked])
