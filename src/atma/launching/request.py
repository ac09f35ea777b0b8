"""What to ask a cluster for, what to run there, and what became of it."""

import importlib
import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from atma.strict import read_value

Kind = Literal["slurm", "ray"]
NEEDS = {"slurm": "submitit", "ray": "ray"}
FAILURES = 3
"""Times that Ray starts a job again which has lost a process, unless max_failures says otherwise."""


@dataclass(frozen=True)
class Request:
    """What to ask a cluster for."""

    kind: Kind
    nodes: int = 1
    processes_per_node: int = 1
    max_failures: int = FAILURES
    """Of Ray: times that a job is started again because it has lost a process."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of Slurm: parameters of a job as submitit names them, such as timeout_min, gpus_per_node or slurm_partition, and
    cluster = "local" to try it without Slurm. Of Ray: address, and num_gpus or resources of a process."""

    @property
    def processes(self) -> int:
        """Of each job."""
        return self.nodes * self.processes_per_node


class Work(NamedTuple):
    """What to run: a job for each line."""

    name: str
    lines: list[list[str]]
    """What stands after `atma` on the command line of each job, all of whose processes run it."""
    folder: Path
    """For what the cluster and the processes write: logs."""
    threads: int = 1
    """Cores of each process, unless the request has them."""


class Jobs(Protocol):
    """Jobs that were started somewhere."""

    def over(self) -> bool:
        """Whether none of them is waiting or running any more. To be asked every few seconds, for that is when what is
        to be started again is."""
        ...

    def cancel(self) -> None:
        """Tell all of them to stop, as SIGTERM does, and return at once or when they have."""
        ...

    def failures(self) -> list[str]:
        """Of jobs that are over: a line for each that came to no good end."""
        ...

    def told(self) -> str:
        """Which jobs these are, in words."""
        ...

    def logs(self) -> list[Path]:
        """What their processes have written, the first of each job first."""
        ...


def read(kind: Kind | Literal["here"], assignments: tuple[str, ...]) -> Request | None:
    """The request that options written as KEY=VALUE make, whose values are TOML or else text; None for "here".

    ValueError: one is written wrongly, is no count, or nothing is launched that it could be for.
    """
    options: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"--job {assignment}: write KEY=VALUE, such as timeout_min=600")
        if key.strip() in options:
            raise ValueError(f"--job {assignment}: '{key.strip()}' is given twice; keep the one that you mean")
        options[key.strip()] = read_value(text)
    if kind == "here":
        if assignments:
            raise ValueError(f"--job {assignments[0]}: what to ask a cluster for; add --launch slurm or --launch ray")
        return None
    if "tasks_per_node" in options:
        raise ValueError("--job tasks_per_node: say processes_per_node, which is what it counts here")
    gpus = options.get("gpus_per_node") if kind == "slurm" else None
    own = {"nodes": 1, "processes_per_node": gpus if isinstance(gpus, int) else 1}
    own |= {"max_failures": FAILURES} if kind == "ray" else {}
    counts = {key: _count(key, options.pop(key, default), key == "max_failures") for key, default in own.items()}
    return Request(kind, **counts, options=options)


def _count(key: str, value: Any, none: bool) -> int:
    least = 0 if none else 1
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"--job {key}={value}: write a whole number, {least} or more")
    return value


def start(request: Request, work: Work) -> Jobs:
    """Start the jobs. ValueError: the package for it is missing, an option does not exist, or there is no cluster."""
    if importlib.util.find_spec(NEEDS[request.kind]) is None:
        raise ValueError(f"--launch {request.kind} needs a package more: pip install 'atma-lm[cluster]'")
    engine = importlib.import_module(f"atma.launching.by_{request.kind}")
    work.folder.mkdir(parents=True, exist_ok=True)
    return engine.submit(request, work._replace(folder=work.folder.resolve()))
