"""A tiny run of two processes, whose second checkpoint the disk of one refuses: disks.py FOLDER HOW SHARD RANK SECONDS.

HOW: "full", "limit" (files may not be larger), "hang"; "kill" ends the process while it writes.
"""

import errno
import os
import resource
import signal
import sys
import threading
from pathlib import Path

import torch
from tiny_run import Rows, rows, tiny_recipe, tiny_source

from atma import folders
from atma.train.loop import fit
from atma.train.parallel import join

folder, how, shard, who, seconds = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
torch.set_num_threads(1)
ranks = join(torch.device("cpu"), 1, shard, seconds)
sync = folders.sync


def refuse(path: Path) -> None:
    if ".step-00000008.staging" in str(path) and ranks.rank == who:
        if how == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if how == "hang":
            threading.Event().wait()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
    sync(path)


def make(step: int) -> Rows:
    if step == 7 and how == "limit" and ranks.rank == who:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    return Rows(*(part.chunk(ranks.replicas)[ranks.replica] for part in rows(step)))


folders.sync = refuse
recipe = tiny_recipe(evaluate_every=0, shard_ranks=shard, hang_seconds=float(seconds))
try:
    fit(recipe, folder / "run", tiny_source(make), ranks=ranks)
except (ValueError, OSError) as error:
    silent = "silent " if getattr(error, "silent", False) else ""
    (folder / f"told-{ranks.rank}").write_text(f"{silent}{error}")
    os._exit(3)
