"""The data of a sweep, made once before any worker starts, however many sweeps are started at the same time."""

import time
from collections.abc import Callable
from pathlib import Path

from atma.config import EvaluationConfig
from atma.data.dataset import MANIFEST, TokenSet
from atma.data.prepare import Progress, prepare
from atma.data.remote import is_remote
from atma.eval.lengths import check_recipe, check_without_data
from atma.sweep.cells import Sweep
from atma.sweep.ledger import Ledger
from atma.sweep.recipe import Source
from atma.sweep.suites import check_suites
from atma.sweep.task import Heart, Limits, Task, Watch
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer

LEASE = 60.0


def data_paths(sweep: Sweep) -> list[str]:
    """Every `data.path` of the sweep's cells."""
    return sorted({cell.recipe.data.path for cell in sweep.cells})


def prepare_data(sweep: Sweep, progress: Progress | None = None, say: Callable[[str], None] = print) -> None:
    """Make what data is missing as `[sweep.prepare]` says. ValueError where it does not say, or the source is bad."""
    paths = [Path(path) for path in data_paths(sweep) if not is_remote(path)]
    missing = [path for path in paths if not path.exists()]
    if missing and sweep.source is None:
        raise ValueError(
            f"{missing[0]}: no such data; make it with `atma prepare`, or add [sweep.prepare] with a source"
        )
    if missing and len(paths) > 1:
        raise ValueError(
            f"{missing[0]}: no such data; [sweep.prepare] serves one data.path, and the cells have {len(paths)}"
        )
    for path in missing:
        assert sweep.source is not None
        say(f"preparing {path} from {sweep.source.source}")
        _prepare_once(path, sweep.source, progress)


def check_data(sweep: Sweep, ledger: Ledger) -> None:
    """ValueError unless every data set is there, and is the one that the sweep began with."""
    for path in data_paths(sweep):
        ledger.require_data(path, TokenSet.open(path).hash)


def check_evaluations(sweep: Sweep) -> list[str]:
    """What cells cannot measure, told before any is trained. ValueError names the first cell that would fail."""
    seen: dict[tuple[str, EvaluationConfig, str], list[str]] = {}
    for cell in sweep.cells:
        key = (cell.recipe.data.path, cell.recipe.evaluation, repr(cell.suites))
        if key in seen:
            continue
        try:
            if is_remote(key[0]) or Path(key[0]).exists():
                seen[key] = check_recipe(cell.recipe, True)
                check_suites(cell.suites, key[0])
            else:
                check_without_data(cell.recipe.evaluation, _tokenizer_to_be(sweep.source))
                told = "[evaluation] and [suites] are" if cell.suites else "[evaluation] is"
                seen[key] = [f"{key[0]}: not made yet; {told} checked on it before any cell is trained"]
        except ValueError as error:
            raise ValueError(f"cell {cell.label}: {error}") from None
    return sorted({line for lines in seen.values() for line in lines})


def _tokenizer_to_be(source: Source | None) -> Tokenizer | None:
    """The tokenizer that data will be made with, where that is known before they are."""
    if source is None or source.preparation.tokenizer == "bpe":
        return None
    name = source.preparation.tokenizer
    return byte_tokenizer() if name == "bytes" else load_tokenizer(name)


def _prepare_once(path: Path, source: Source, progress: Progress | None) -> None:
    """By whichever process gets the claim; the others wait for it, or for its death."""
    limits = Limits(attempts=10**6, deaths=10**6, lease=LEASE)
    task, watch = Task(path.parent / f".{path.name}.preparing", limits), Watch()
    while not (path / MANIFEST).is_file():
        claim = task.claim(watch)
        if claim is None:
            time.sleep(0.5)
            continue
        try:
            with Heart(claim):
                if not (path / MANIFEST).is_file():
                    prepare(source.source, path, source.preparation, progress)
            claim.release("prepared")
        except BaseException as error:
            claim.release(repr(error))
            raise
