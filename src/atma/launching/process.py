"""One process of a job: the command line as a child of what a cluster started, which ends when that does.

`python -m atma.launching.process PARENT ARGUMENTS` is the child: `atma ARGUMENTS`, told to stop once PARENT is gone.
Signals that a cluster sends to all processes of a job for its own process to hear are not for the child.
"""

import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

LOOK_SECONDS = 0.5
GRACE_SECONDS = 30.0
"""For the last words of a process whose parent is gone."""
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGHUP)
"""Statuses of a process that was told to stop, and did."""


class Place(NamedTuple):
    """Which process of its job this is, and where the first is found."""

    rank: int
    world: int
    local_rank: int
    """Among those of its machine."""
    address: str
    port: int
    job: str
    """The same in all processes and starts of a job, and in no other job."""
    starts: int = 0
    """How often the job was started before."""

    def environment(self) -> dict[str, str]:
        """All of it as torchrun says it, for a process of this machine.

        Where the cluster shows each process some of the GPUs, the local rank counts among these.
        """
        shown = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank % len(shown) if shown else self.local_rank),
            "MASTER_ADDR": self.address,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_RUN_ID": self.job,
            "TORCHELASTIC_RESTART_COUNT": str(self.starts),
        }


def begin(line: Sequence[str], where: str, place: Place, log: IO[bytes] | None = None) -> subprocess.Popen[Any]:
    """Start `atma LINE` in the folder `where`, as a child of this process; it writes into `log`, or where we do."""
    words = [sys.executable, "-m", "atma.launching.process", str(os.getpid()), *line]
    return subprocess.Popen(
        words, cwd=where, env=os.environ | place.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
    )


def stop(child: subprocess.Popen[Any], seconds: float) -> None:
    """Tell a child to stop and wait until it has, or so long; also within a handler of signals."""
    child.terminate()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:  # not Popen.wait, whose lock is held where the signal came while it was asked
            if os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
        except ChildProcessError:
            return
        time.sleep(0.05)


def last_error(logs: Sequence[Path]) -> str | None:
    """The first of the logs' last lines in which `atma` tells an error; None where there is none."""
    for path in logs:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
        told = [line for line in lines if line.startswith("atma: error: ")]
        if told:
            return told[-1].removeprefix("atma: error: ")
    return None


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os._exit(STOPPED[0])


def main(arguments: Sequence[str]) -> None:
    """Be the child."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    threading.Thread(target=_follow, args=(int(arguments[0]),), daemon=True).start()
    sys.argv = ["atma", *arguments[1:]]
    runpy.run_module("atma", run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
