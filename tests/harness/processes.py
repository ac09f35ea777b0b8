"""Scripts in processes of their own, forked of one that has imported PyTorch; groups of them that speak by gloo."""

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
SECONDS = 900
"""After which a group that hangs is ended, so that its test fails and says so."""


class Ended(NamedTuple):
    """The exit status of a process, and what it has written to its output and to the error stream."""

    status: int
    out: str
    err: str


def group(world: int, arguments: Sequence[str], where: Path = ROOT) -> list[str]:
    """Run `python ARGUMENTS` in each of so many processes; what they have written to the error stream."""
    ended = forked(arguments, environments(world, where), [where, ROOT], where)
    told = [f"process {i} of {world} ({one.status}): {one.err[-3000:]}" for i, one in enumerate(ended) if one.status]
    assert not told, "\n".join(told)
    return [one.err for one in ended]


def forked(
    arguments: Sequence[str], environments: Sequence[dict[str, str]], paths: Sequence[Path] = (), where: Path = ROOT
) -> list[Ended]:
    """`python ARGUMENTS` in a process for each of the environments, which looks for modules in `paths` first. PyTorch
    and what trains are imported already, with one thread and in the environment of the first call."""
    with tempfile.TemporaryDirectory() as folder:
        written = [f"{folder}/{i}" for i in range(len(environments))]
        job = {"arguments": list(arguments), "where": str(where), "paths": [str(path) for path in paths]}
        statuses = answered(json.dumps(job | {"environments": list(environments), "written": written}))
        texts = [[Path(f"{one}.{kind}").read_text(errors="replace") for kind in ("out", "err")] for one in written]
    return [Ended(status, *both) for status, both in zip(statuses, texts, strict=True)]


def answered(job: str) -> list[int]:
    """The exit statuses of a job that was forked. AssertionError: they took too long; they are ended."""
    server = forking()
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(f"{job}\n".encode())
    server.stdin.flush()
    if select.select([server.stdout], [], [], SECONDS)[0] and (line := server.stdout.readline()):
        return json.loads(line)
    end(server)
    forking.cache_clear()
    raise AssertionError(f"no end after {SECONDS} s, or of what forks itself: {job}")


@functools.cache
def forking() -> subprocess.Popen[bytes]:
    """The process that forks, started at the first call, in a group of its own with what it forks."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.forking"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    atexit.register(end, server)
    return server


def end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.communicate()


def environments(world: int, where: Path) -> list[dict[str, str]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    paths = os.pathsep.join([str(ROOT), str(where), *filter(None, [os.environ.get("PYTHONPATH")])])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world), "OMP_NUM_THREADS": "1"}
    return [os.environ | shared | {"RANK": str(rank), "PYTHONPATH": paths} for rank in range(world)]


def begun(world: int, arguments: Sequence[str], where: Path = ROOT) -> list[subprocess.Popen[str]]:
    """Processes of `python ARGUMENTS`, started from nothing; theirs is what a test does to them."""
    return [
        subprocess.Popen([sys.executable, *arguments], env=environment, cwd=where, stderr=subprocess.PIPE, text=True)
        for environment in environments(world, where)
    ]
