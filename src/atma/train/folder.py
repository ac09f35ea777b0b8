"""The folder of a run: which recipe it is for, which one process writes in it, and what may change when it goes on."""

import contextlib
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from atma.config import Recipe, dump_toml, load_recipe
from atma.disk import content, destination, lock, sync
from atma.strict import to_dict
from atma.train.parallel import Ranks, any_of
from atma.train.together import agreeing

RECIPE = "recipe.toml"
_LOCK = ".lock"
PEEK_SECONDS = 0.3
"""That a lock may be held by somebody who only looks whether there is a run (`atma runs`)."""
_FREE = (
    "name",
    "data.path",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.evaluate_every",
    "train.evaluation_tokens",
    "train.init_from",
    "train.epochs",
    "train.checkpointing",
    "train.checkpointing_every",
    "train.compile",
    "train.context_ranks",
    "train.context_shares",
    "train.shard_ranks",
    "train.offload",
    "train.hang_seconds",
    "train.early_stopping",
    "train.keep_best",
    "train.sample_every",
    "train.sample_prompts",
    "train.sample_tokens",
)
"""Settings that change nothing of the training, as all of `evaluation`: the data, and the weights that a run starts
from, are known by their hash, epochs by the tokens that they are."""
_TOKENS = "train.tokens"


@contextmanager
def claimed(recipe: Recipe, out: Path, resume: bool, ranks: Ranks | None = None) -> Iterator[list[str]]:
    """Hold `out` as the folder of this recipe's run, for these processes alone; gives what there is to tell about it.

    ValueError, in every process, when another one is training there, it holds another run or something else, or there
    is nothing to resume.
    """
    ranks, notes = ranks or Ranks(), []
    with contextlib.ExitStack() as held:
        with agreeing(ranks):
            if ranks.rank == 0:
                notes = held.enter_context(_held(recipe, destination(out), resume))
        yield notes


def recipe_of(out: Path) -> Recipe:
    """The recipe of the run in a folder. ValueError where there is none."""
    if not (out / RECIPE).is_file():
        raise ValueError(f"{out}: nothing to resume: no {RECIPE} there; start the run without resuming")
    return load_recipe(out / RECIPE)


def goes_on(ranks: Ranks, out: Path) -> bool:
    """Whether torchrun has started these processes again, one having failed (--max-restarts), and it is they who began
    the run in the folder: a run of somebody else is to be resumed by name."""
    again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    return any_of(ranks, ranks.rank == 0 and again and (out / RECIPE).is_file() and _launched(out) == _launch())


def _launch() -> str:
    """By which call of torchrun this process runs: its name for the call, or it itself."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return name if name != "none" else f"{socket.gethostname()} {os.getppid()}"


def _launched(out: Path) -> str:
    """By which call the process ran that was the last to train in the folder; "" where that is not known."""
    try:
        return str(json.loads((out / _LOCK).read_text(encoding="utf-8"))["launch"])
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def write_recipe(recipe: Recipe, out: Path) -> None:
    """Make `recipe` that of the run in `out`."""
    path, text = out / RECIPE, dump_toml(recipe)
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    new = out / f".{RECIPE}.new"
    new.write_text(text, encoding="utf-8")
    sync(new)
    new.rename(path)
    sync(out)


def changes(found: Recipe, wanted: Recipe, path: Path) -> list[str]:
    """What differs, in words, where a run of `found` may go on as `wanted`. ValueError names what may not differ."""
    told = []
    now = _flat(to_dict(wanted))
    for key, before in _flat(to_dict(found)).items():
        if key in now and before == now[key]:
            continue
        if key not in now:
            raise ValueError(f"{path}: another recipe: '{key}' is {before!r} there and not set here")
        if key == _TOKENS and now[key] > before:
            text = (
                f"goes on to {now[key]:,} tokens instead of {before:,}; from here on the rate is that of the new total"
            )
            told.append(text)
        elif key in _FREE or key.startswith("evaluation."):
            told.append(f"{key} is now {now[key]!r}, not {before!r}")
        else:
            raise ValueError(
                f"{path}: another recipe: '{key}' is {before!r} there and {now[key]!r} here; choose another folder, or "
                "resume with the folder alone, --resume --out"
            )
    return told


@contextmanager
def _held(recipe: Recipe, out: Path, resume: bool) -> Iterator[list[str]]:
    try:
        notes = _check(recipe, out, resume)
    except ValueError:
        _require_free(out)  # it may be refused for what a living one has written there
        raise
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        mine = lock(handle, PEEK_SECONDS)
        if mine is False:
            raise ValueError(f"{out}: {_holder(handle)} is training in it; wait for its end, or choose another folder")
        if mine is None:
            notes.append("this disk has no file locks: nothing keeps a second process out of the run folder")
        os.ftruncate(handle, 0)
        own = {"process": os.getpid(), "host": socket.gethostname(), "launch": _launch()}
        os.pwrite(handle, json.dumps(own).encode(), 0)
        _check(recipe, out, resume)  # again, for another may have come and gone
        if not resume:
            write_recipe(recipe, out)
        yield notes
    finally:
        os.close(handle)


def _require_free(out: Path) -> None:
    """ValueError: somebody is training in the folder."""
    if not (out / _LOCK).is_file():
        return
    handle = os.open(out / _LOCK, os.O_RDWR)
    try:
        if lock(handle) is False:
            raise ValueError(f"{out}: {_holder(handle)} is training in it; wait for its end, or choose another folder")
    finally:
        os.close(handle)


def _check(recipe: Recipe, out: Path, resume: bool) -> list[str]:
    """What there is to tell about a folder that may be taken; ValueError where it may not."""
    if resume:
        return changes(recipe_of(out), recipe, out / RECIPE)
    if (out / RECIPE).is_file():
        raise ValueError(f"{out}: holds a run already; resume it (--resume) or choose another folder")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file; name a folder")
    if content(out):
        raise ValueError(f"{out}: not empty and not a run; choose another folder")
    return []


def _holder(handle: int) -> str:
    try:
        said: Any = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(said['process'])} on {said['host']}"
    except (ValueError, TypeError, KeyError, OSError):
        return "another process"


def _flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
    return flat
