"""A run from its recipe to its final model: processes, device, data and folder, then `Run`.

A run folder holds `recipe.toml`, `metrics.jsonl` (the record), `checkpoints/step-…/`, where asked for `best/`, the
model of the lowest validation loss, and at the end `final/`, a model folder, with `adapters/` beside where those were
trained.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from atma.config import Recipe
from atma.train.checks import check_fit
from atma.train.compiled import require_compiler
from atma.train.folder import claimed, goes_on
from atma.train.parallel import Ranks, join, own_device
from atma.train.progress import Progress, Silent
from atma.train.record import NAME, Record
from atma.train.run import Run, Stopped
from atma.train.source import Source, in_epochs, open_source
from atma.train.start import check_tokenizer, resolved
from atma.train.together import agreeing, answering, require_same_run


def train(
    recipe: Recipe,
    out: str | Path,
    resume: bool = False,
    progress: Progress | None = None,
    device: str | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """Run `recipe` into folder `out` and return `out/final`, a model folder.

    resume: go on from the newest good checkpoint in `out`, also where `recipe` differs in what changes no step, or asks
    for more tokens. device: "cpu", "cuda"; by default a GPU if there is one. stop: asked after each step; once it is
    true in any process the run writes a checkpoint and raises `Stopped`.
    Under `torchrun` the processes share each batch. ValueError when `out` holds a run and resume is not asked for, or
    another recipe's run, or nothing to resume, or another process trains there; when the data does not fit; when losses
    stay non-finite.
    """
    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"'device' must be cpu or cuda, not {device!r}") from error
    train = recipe.train
    ranks = join(where, train.context_ranks, train.shard_ranks, train.hang_seconds, train.offload)
    where = own_device(where)
    with agreeing(ranks):
        recipe = resolved(recipe)
        source = open_source(recipe, ranks)
    require_same_run(ranks, recipe, source.hash)
    resume = resume or goes_on(ranks, Path(out))
    return fit(recipe, Path(out), source, resume, progress, where, ranks, stop)


def fit(
    recipe: Recipe,
    out: Path,
    source: Source,
    resume: bool = False,
    progress: Progress | None = None,
    device: torch.device | None = None,
    ranks: Ranks | None = None,
    stop: Callable[[], bool] | None = None,
) -> Path:
    """`train` on batches from any `source`."""
    ranks = ranks or Ranks()
    with agreeing(ranks):
        recipe, told = in_epochs(recipe, source)
        check_fit(recipe, source, ranks)
        if recipe.train.compile:
            require_compiler(device or torch.device("cpu"))
        if not resume:
            check_tokenizer(recipe, source.tokenizer)
    with claimed(recipe, out, resume, ranks) as notes:
        run = Run(recipe, out, source, device or torch.device("cpu"), ranks)
        notes += run.restore() if resume else [*told, *run.told()]
        with agreeing(ranks):
            if ranks.rank == 0:
                run.trained.keep(source.template)
        patience = recipe.train.hang_seconds
        with (
            Record(out / NAME if ranks.rank == 0 else Path(os.devnull)) as record,
            answering(ranks, patience, lambda: run.state.step),
        ):
            run.share()
            return run.go(record, progress or Silent(), notes, stop)


__all__ = ["Stopped", "fit", "train"]
