"""Jobs of Slurm, through submitit, which queues a job again that is to make room or has come to its time limit.

Of a job that is told so 90 seconds before (slurm_signal_delay_s), the first process is told to stop, and all write a
checkpoint; what is queued again goes on from there, for it is told which start of the job it is.
"""

import importlib
import os
import random
import time
from pathlib import Path
from typing import Any

from atma.launching.process import STOPPED, Place, begin, stop
from atma.launching.request import Jobs, Request, Work

DAY = 24 * 60
"""Minutes that a job may take, unless the request says."""
LOOK_SECONDS = 0.2
PORTS = (20_000, 60_000)
WARNED_SECONDS = 90.0
"""Before a job is ended, as submitit has it: two thirds are for the checkpoint, the rest for the queue."""
KILLED_SECONDS = 600.0
"""That a process which was told to stop stays for: Slurm tells it before it kills the job or queues it again, and would
do neither with a job that has ended by itself."""


class Process:
    """What a task of the job runs. It is pickled by submitit, and read again at each start of the job."""

    def __init__(self, line: list[str], where: str, patience: float, starts: int = 0) -> None:
        self.line, self.where, self.patience, self.starts = line, where, patience, starts
        self._child: Any = None

    def __call__(self) -> None:
        """Run to the end. RuntimeError: with another status than 0, which makes the job a failed one."""
        job = importlib.import_module("submitit").JobEnvironment()
        self._child = begin(self.line, self.where, place(job, self.starts))
        try:
            while self._child.poll() is None:
                time.sleep(LOOK_SECONDS)
        finally:
            stop(self._child, self.patience)
        stopped = self._child.returncode in STOPPED
        if stopped and job.cluster == "slurm":
            time.sleep(KILLED_SECONDS)
        if self._child.returncode and not (stopped and job.global_rank):  # of one that is stopped, the first tells it
            raise RuntimeError(f"process {job.global_rank} ended with status {self._child.returncode}")

    def checkpoint(self) -> Any:
        """Called by submitit in the first process when the job is to end: what to run when it is queued again."""
        stop(self._child, self.patience)
        again = Process(self.line, self.where, self.patience, self.starts + 1)
        return importlib.import_module("submitit").helpers.DelayedSubmission(again)


def place(job: Any, starts: int = 0) -> Place:
    """The place of this task, from what submitit knows of it and how often Slurm has started the job again."""
    starts = max(starts, int(os.environ.get("SLURM_RESTART_COUNT", "0")))
    address = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
    port = random.Random(job.job_id).randint(*PORTS)
    own = f"{job.cluster} {job.job_id}"
    return Place(job.global_rank, job.num_tasks, job.local_rank, address, port, own, starts)


class Submitted:
    """Jobs of submitit."""

    def __init__(self, jobs: list[Any]) -> None:
        self._jobs = jobs

    def over(self) -> bool:
        return all(job.done() for job in self._jobs)

    def cancel(self) -> None:
        for job in self._jobs:
            job.cancel()

    def failures(self) -> list[str]:
        return [f"job {job.job_id} has failed ({job.state.lower()})" for job in self._jobs if any(_errors(job))]

    def told(self) -> str:
        numbers = ", ".join(job.job_id for job in self._jobs)
        return f"job{'' if len(self._jobs) == 1 else 's'} {numbers}"

    def logs(self) -> list[Path]:
        tasks = [job.task(number) for job in self._jobs for number in range(job.num_tasks)]
        return [path for task in tasks for path in (task.paths.stderr, task.paths.stdout)]


def _errors(job: Any) -> list[Any]:
    return [job.task(number).exception() for number in range(job.num_tasks)]


def submit(request: Request, work: Work) -> Jobs:
    """Queue the jobs. ValueError: a parameter does not exist or is none, or there is no Slurm."""
    submitit = importlib.import_module("submitit")
    wanted: dict[str, Any] = {"name": work.name, "cpus_per_task": work.threads, "timeout_min": DAY}
    wanted |= {"nodes": request.nodes, "tasks_per_node": request.processes_per_node} | request.options
    cluster = wanted.pop("cluster", "slurm")
    own = {key: wanted.pop(key) for key in ("slurm_max_num_timeout",) if key in wanted}
    try:
        executor = submitit.AutoExecutor(folder=work.folder / str(cluster), cluster=cluster, **own)
        executor.update_parameters(**wanted)
    except RuntimeError as error:
        raise ValueError(f"--launch slurm: {error} --job cluster=local tries it on this machine") from None
    except (NameError, TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"--launch slurm: --job: {error}") from None
    patience = float(wanted.get("slurm_signal_delay_s", WARNED_SECONDS)) * 2 / 3
    return Submitted([executor.submit(Process(line, os.getcwd(), patience)) for line in work.lines])
