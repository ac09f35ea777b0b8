"""Jobs of Ray: actors that each hold one process, placed together, and started again where one is lost.

Plain actors, for of Ray Train a process that is a whole command would use none but the placing. Ray's jobs end with the
process that asked for them, so that is where they are watched.
"""

import importlib
import os
import socket
import time
from pathlib import Path
from typing import Any, NamedTuple

from atma.launching.process import GRACE_SECONDS, STOPPED, Place, begin, stop
from atma.launching.request import Jobs, Request, Work

PATIENCE_SECONDS = 10.0
"""In which the others end by themselves when one has failed, before they are ended."""
LOOK_SECONDS = 0.2


class Actor:
    """Holds one process of a job, on the machine where Ray has placed it."""

    def __init__(self) -> None:
        self._child: Any = None

    def here(self) -> tuple[str, int]:
        """Address of this machine, and a port that is free on it."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return str(importlib.import_module("ray").util.get_node_ip_address()), probe.getsockname()[1]

    def run(self, line: list[str], where: str, place: Place, log: str) -> int:
        """Run the process to its end, while `stop` may be called; returns its status."""
        with open(log, "ab") as file:
            self._child = begin(line, where, place, file)
        while self._child.poll() is None:
            time.sleep(LOOK_SECONDS)
        return self._child.returncode

    def stop(self, seconds: float) -> None:
        """Tell the process to stop, and end it if it has not in so long."""
        if self._child is not None:
            stop(self._child, seconds)
            self._child.kill()


class Asked(NamedTuple):
    """What a job asks Ray for."""

    resources: dict[str, float]
    """Of each process, as a placement has them."""
    options: dict[str, Any]
    """Of each process, as an actor has them; it can be told to stop while it runs."""
    processes: int
    max_failures: int


class Job:
    """One job: its processes now, and how often it may lose one."""

    def __init__(self, ray: Any, asked: Asked, line: list[str], folder: Path, number: int) -> None:
        self._ray, self._asked, self._line, self._folder, self._number = ray, asked, line, folder, number
        self._name = f"ray {socket.gethostname()} {os.getpid()} {time.time():.0f} {number}"
        self._starts, self._failed_at = 0, 0.0
        self.ends = False
        """Whether it has come to its end, which `failure` tells where it is a bad one."""
        self.failure: str | None = None
        self._statuses: list[int | None] = []
        self._place()

    def logs(self) -> list[Path]:
        """A file for each process."""
        own = f"ray-{os.getpid()}-{self._number}"
        return [self._folder / f"{own}-{rank}.log" for rank in range(self._asked.processes)]

    def over(self) -> bool:
        """Whether it has come to its end, good or bad; starts what is to be started."""
        if self.ends:
            return True
        if not self._running:
            self._run()
            return self.ends
        self._look()
        if any(self._statuses) and not self._failed_at:
            self._failed_at = time.monotonic()
        ended = None not in self._statuses
        if ended or (self._failed_at and time.monotonic() - self._failed_at > PATIENCE_SECONDS):
            self._judge()
        return self.ends

    def stop(self) -> None:
        """Tell its processes to stop."""
        for actor in self._actors:
            actor.stop.remote(GRACE_SECONDS)

    def end(self, seconds: float) -> None:
        """Tell its processes to stop, end them if they have not in so long, and give their places back."""
        tasks = [actor.stop.remote(seconds) for actor in self._actors]
        if self._running:
            self._ray.wait(tasks, num_returns=len(tasks), timeout=seconds + PATIENCE_SECONDS)
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.util.remove_placement_group(self._group)

    def _place(self) -> None:
        """Ask for a place for every process, all or none of them."""
        ray, asked = self._ray, self._asked
        self._group = ray.util.placement_group([asked.resources] * asked.processes, strategy="PACK")
        within = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        actor = ray.remote(**asked.options)(Actor)
        places = [within(self._group, placement_group_bundle_index=i) for i in range(asked.processes)]
        self._actors = [actor.options(scheduling_strategy=place).remote() for place in places]
        self._found = [one.here.remote() for one in self._actors]
        self._running: list[Any] = []

    def _run(self) -> None:
        """Once all are placed: the processes, those of one machine beside each other."""
        if self._ray.wait(self._found, num_returns=len(self._found), timeout=0)[1]:
            return
        try:
            found = self._ray.get(self._found)
        except self._ray.exceptions.RayError:
            self._statuses = [-9]
            self._judge()
            return
        machines = list(dict.fromkeys(address for address, _ in found))
        order = sorted(range(len(found)), key=lambda i: machines.index(found[i][0]))
        self._actors = [self._actors[i] for i in order]
        (address, port), seen = found[order[0]], dict.fromkeys(machines, 0)
        for rank, i in enumerate(order):
            own = found[i][0]
            place = Place(rank, len(found), seen[own], address, port, self._name, self._starts)
            seen[own] += 1
            log = str(self.logs()[rank])
            self._running.append(self._actors[rank].run.remote(self._line, os.getcwd(), place, log))
        self._statuses = [None] * len(found)

    def _look(self) -> None:
        """Take note of who has ended, and how: by its status, or with its actor, as if it were killed.

        ValueError: one has not begun, as where its machine does not see the folders.
        """
        for rank, task in enumerate(self._running):
            if self._statuses[rank] is None and self._ray.wait([task], timeout=0)[0]:
                try:
                    self._statuses[rank] = self._ray.get(task)
                except self._ray.exceptions.RayTaskError as error:
                    raise ValueError(f"process {rank} could not be started: {error.cause}") from None
                except self._ray.exceptions.RayError:
                    self._statuses[rank] = -9

    def _judge(self) -> None:
        """At the end of a start: over for good, or once more. A process that is lost is no fault of the command's."""
        statuses = [status or 0 for status in self._statuses]
        lost = [rank for rank, status in enumerate(statuses) if status < 0]
        self.end(0.0)
        again = (lost or (self._starts and any(statuses))) and self._starts < self._asked.max_failures
        if again and not all(status in STOPPED for status in statuses):
            self._starts, self._failed_at = self._starts + 1, 0.0
            self._place()
            return
        self.ends = True
        if lost:
            self.failure = f"process {lost[0]} was lost; max_failures={self._asked.max_failures} allows no other start"
        elif any(statuses):
            rank, status = next((rank, status) for rank, status in enumerate(statuses) if status)
            self.failure = f"process {rank} ended with status {status}"


class Placed:
    """Jobs of Ray."""

    def __init__(self, jobs: list[Job]) -> None:
        self._jobs = jobs

    def over(self) -> bool:
        going = [job for job in self._jobs if not job.over()]  # every one is asked
        return not going

    def cancel(self) -> None:
        going = [job for job in self._jobs if not job.ends]
        for job in going:  # all at once, and then each is waited for
            job.stop()
        for job in going:
            job.end(GRACE_SECONDS)

    def failures(self) -> list[str]:
        return [job.failure for job in self._jobs if job.failure is not None]

    def told(self) -> str:
        return "job of Ray" if len(self._jobs) == 1 else f"{len(self._jobs)} jobs of Ray"

    def logs(self) -> list[Path]:
        return [log for job in self._jobs for log in job.logs()]


def submit(request: Request, work: Work) -> Jobs:
    """Start the jobs. ValueError: an option does not exist, or there is no Ray at its address."""
    ray = importlib.import_module("ray")
    for module in ("placement_group", "scheduling_strategies"):
        importlib.import_module(f"ray.util.{module}")
    options: dict[str, Any] = {"num_cpus": work.threads} | request.options | {"max_concurrency": 2}
    address = options.pop("address", None)
    own = {} if address else {"include_dashboard": False}
    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, **own)
        ray.remote(**options)(Actor)
    except (ConnectionError, TypeError, ValueError) as error:
        raise ValueError(f"--launch ray: {error}") from None
    resources = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0), **options.get("resources", {})}
    asked = Asked(
        {name: many for name, many in resources.items() if many}, options, request.processes, request.max_failures
    )
    return Placed([Job(ray, asked, line, work.folder, number) for number, line in enumerate(work.lines)])
