"""Workers on a cluster: Slurm (through submitit) or Ray starts `atma sweep work` there, and that is all either does.

The ledger is the only thing that workers share, so its folder and the data must lie on a disk that all of them see, at
the same path. A job that ends early, for whatever reason, needs nobody: start more workers, or the same line again.
"""

import importlib
import importlib.util
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from atma.strict import read_value
from atma.sweep.controller import Crew, Display
from atma.sweep.ledger import Ledger
from atma.sweep.status import Follower, result_line

Kind = Literal["slurm", "ray"]
NEEDS = {"slurm": "submitit", "ray": "ray"}
LOOK_SECONDS = 2.0


@dataclass(frozen=True)
class Request:
    """What to ask a cluster for."""

    kind: Kind
    crew: Crew
    options: dict[str, Any] = field(default_factory=dict)
    """Of Slurm: parameters of a job as submitit names them, such as timeout_min, gpus_per_node or slurm_partition, and
    cluster = "local" to try it without Slurm. Of Ray: address, and num_gpus or resources of a worker."""


class Jobs(Protocol):
    """Workers that were started somewhere."""

    def over(self) -> bool:
        """Whether none of them is waiting or running any more."""
        ...

    def cancel(self) -> None: ...


def launch(request: Request, recipe: Path, folder: Path) -> Jobs:
    """Start the workers. ValueError when the package for it is missing, or an option does not exist."""
    if importlib.util.find_spec(NEEDS[request.kind]) is None:
        raise ValueError(f"--launch {request.kind} needs a package more: pip install 'atma-lm[cluster]'")
    crew = request.crew
    commands = [crew.command(recipe.resolve(), folder.resolve(), number, None) for number in range(crew.workers)]
    start = _slurm if request.kind == "slurm" else _ray
    return start(request, commands, folder)


def run_jobs(request: Request, recipe: Path, ledger: Ledger, display: Display) -> None:
    """Start the workers and show the sweep until it is finished; Ctrl-C cancels those that are left.

    ValueError as in `launch` and `follow`.
    """
    jobs = launch(request, recipe, ledger.folder)
    try:
        follow(ledger, jobs, display)
    except KeyboardInterrupt:
        jobs.cancel()
        raise


def read_options(assignments: tuple[str, ...]) -> dict[str, Any]:
    """Options written as KEY=VALUE; a value is TOML, or else text."""
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--job {assignment}: write KEY=VALUE, such as timeout_min=600")
        if key.strip() in options:
            raise ValueError(f"--job {assignment}: '{key.strip()}' is given twice; keep the one that you mean")
        options[key.strip()] = read_value(text)
    return options


def follow(ledger: Ledger, jobs: Jobs, display: Display) -> None:
    """Show the sweep until it is finished. ValueError when all workers have ended and cells are left."""
    follower = Follower(ledger)
    follower.look()
    while True:
        over = jobs.over()
        for result in follower.look():
            display.line(result_line(result, ledger.cells[result["cell"]]))
        display.show(follower)
        if ledger.finished():
            return
        if over:
            raise ValueError(f"every worker has ended, with {follower.line()}; start the sweep again for the rest")
        time.sleep(LOOK_SECONDS)


class _Submitted:
    """Jobs of submitit."""

    def __init__(self, jobs: list[Any]) -> None:
        self._jobs = jobs

    def over(self) -> bool:
        return all(job.done() for job in self._jobs)

    def cancel(self) -> None:
        for job in self._jobs:
            job.cancel()


class _Remote:
    """Tasks of Ray."""

    def __init__(self, ray: Any, tasks: list[Any]) -> None:
        self._ray, self._tasks = ray, tasks

    def over(self) -> bool:
        return not self._ray.wait(self._tasks, num_returns=len(self._tasks), timeout=0)[1]

    def cancel(self) -> None:
        for task in self._tasks:
            self._ray.cancel(task)


def _slurm(request: Request, commands: list[list[str]], folder: Path) -> Jobs:
    submitit = importlib.import_module("submitit")
    wanted: dict[str, Any] = {"name": "atma-sweep", "cpus_per_task": request.crew.threads, "timeout_min": 24 * 60}
    wanted |= request.options
    cluster = wanted.pop("cluster", "slurm")
    try:
        executor = submitit.AutoExecutor(folder=folder.resolve() / "logs" / cluster, cluster=cluster)
        executor.update_parameters(**wanted)
    except (NameError, TypeError, RuntimeError) as error:
        raise ValueError(f"--launch slurm: {error}") from None
    functions = [submitit.helpers.CommandFunction(command, cwd=Path.cwd()) for command in commands]
    return _Submitted([executor.submit(function) for function in functions])


def _ray(request: Request, commands: list[list[str]], folder: Path) -> Jobs:
    ray = importlib.import_module("ray")
    options = dict(request.options)
    address = options.pop("address", None)
    own = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **own)
        start = ray.remote(**{"num_cpus": request.crew.threads, "max_retries": 0} | options)(in_ray)
    except (ConnectionError, TypeError, ValueError) as error:
        raise ValueError(f"--launch ray: {error}") from None
    logs = folder.resolve() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    names = [str(logs / f"ray-{number}.log") for number in range(len(commands))]
    here = str(Path.cwd())
    return _Remote(ray, [start.remote(line, here, name) for line, name in zip(commands, names, strict=True)])


def in_ray(command: list[str], cwd: str, log: str) -> int:
    """Run one worker as a child of a Ray task, with which it ends; returns its status."""
    with open(log, "ab") as file:
        line = [*command, "--parent", str(os.getpid())]
        process = subprocess.Popen(line, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait()
        finally:
            process.terminate()
            process.wait()
