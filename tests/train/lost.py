"""A tiny run of several processes in which one is killed or stops answering: lost.py FOLDER HOW STEP RANK SECONDS."""

import os
import signal
import sys
from pathlib import Path

import torch
from tiny_run import LENGTH, Rows, rows, tiny_recipe, tiny_source

from atma.train.folder import goes_on
from atma.train.loop import fit
from atma.train.parallel import join

folder, how, at, who, seconds = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
sizes = {"batch_tokens": 12 * LENGTH, "tokens": 12 * 12 * LENGTH}
recipe = tiny_recipe(evaluate_every=0, checkpoint_every=2, hang_seconds=float(seconds), **sizes)
ranks = join(torch.device("cpu"), hang_seconds=seconds)
begun = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def make(step: int) -> Rows:
    if step == at and ranks.rank == who and not begun:
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "hang": signal.SIGSTOP}[how])
    return Rows(*(part.chunk(ranks.world)[ranks.rank] for part in rows(step, 12)))


try:
    fit(
        recipe,
        folder / "run",
        tiny_source(make),
        goes_on(ranks, folder / "run"),
        ranks=ranks,
        stop=bool,
    )
except ValueError as error:
    (folder / f"told-{ranks.rank}").write_text(str(error))
    os._exit(3)
