"""Groups of processes that speak by gloo, each with one thread: a script that every one of them runs."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 900
"""After which a group that hangs is ended, so that its test fails and says so."""


def group(world: int, arguments: Sequence[str], where: Path = ROOT) -> list[str]:
    """Run `python ARGUMENTS` in each of so many processes; what they have written to the error stream."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    paths = os.pathsep.join([str(ROOT), str(where), *filter(None, [os.environ.get("PYTHONPATH")])])
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            env=os.environ | shared | {"RANK": str(rank), "PYTHONPATH": paths},
            cwd=where,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        told = [process.communicate(timeout=SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    failed = [
        (rank, text) for rank, (process, text) in enumerate(zip(processes, told, strict=True)) if process.returncode
    ]
    assert not failed, f"process {failed[0][0]} of {world}: {failed[0][1][-3000:]}"
    return told
