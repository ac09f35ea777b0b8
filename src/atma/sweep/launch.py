"""Workers on a cluster: Slurm or Ray starts `atma sweep work` there (atma.launching), and that is all either does.

The ledger is the only thing that workers share, so its folder and the data must lie on a disk that all of them see, at
the same path. A job that ends early, for whatever reason, needs nobody: start more workers, or the same line again.
"""

import time
from pathlib import Path

from atma.launching import Jobs, Request, Work, start
from atma.sweep.controller import Crew, Display
from atma.sweep.ledger import Ledger
from atma.sweep.status import Follower, result_line

LOOK_SECONDS = 2.0


def launch(request: Request, crew: Crew, recipe: Path, folder: Path) -> Jobs:
    """Start the workers. ValueError as in `start`, or for several processes of one worker."""
    if request.processes > 1:
        raise ValueError(f"--job: a worker is one process, not {request.processes}; set how many with --workers")
    lines = [crew.arguments(recipe.resolve(), folder.resolve()) for _ in range(crew.workers)]
    return start(request, Work("atma-sweep", lines, folder / "logs", crew.threads))


def run_jobs(request: Request, crew: Crew, recipe: Path, ledger: Ledger, display: Display) -> None:
    """Start the workers and show the sweep until it is finished; Ctrl-C cancels those that are left.

    ValueError as in `launch` and `follow`.
    """
    jobs = launch(request, crew, recipe, ledger.folder)
    try:
        follow(ledger, jobs, display)
    except KeyboardInterrupt:
        jobs.cancel()
        raise


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
