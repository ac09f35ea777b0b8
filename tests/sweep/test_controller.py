"""The controller's judgement of workers that end: killed, by an error, with cells left; and when it starts no other."""

from pathlib import Path

import pytest

from atma.sweep.controller import PATIENCE, Controller, Crew
from atma.sweep.ledger import Ledger
from atma.sweep.task import Limits

PUBLISH = """
cd {folder} && mkdir -p cells/{cell}
echo '{{"cell": "{cell}", "seconds": 1, "metrics": {{}}, "provenance": {{"worker": {{"pid": '$$'}}}}}}' > {cell}.new
mv {cell}.new cells/{cell}/result.json
"""


class Said:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    def show(self, follower) -> None:
        pass


class Scripted(Crew):
    """Workers that are each a list of shell scripts, one a start; the last again and again."""

    scripts: list[list[str]]

    def command(self, recipe, folder, number, parent):
        script = self.scripts[number]
        return ["sh", "-c", script.pop(0) if len(script) > 1 else script[0]]


@pytest.fixture
def controlled(tmp_path: Path, monkeypatch):
    """Makes a controller of scripted workers and of cells "a" and "b"."""
    monkeypatch.setattr("atma.sweep.controller.LOOK_SECONDS", 0.02)

    def make(*scripts: list[str]) -> Controller:
        crew = Scripted(len(scripts), 1)
        object.__setattr__(crew, "scripts", list(scripts))
        return Controller(tmp_path / "r.toml", Ledger(tmp_path, Limits(), {"a": "A", "b": "B"}), crew, Said())

    return make


def test_workers_that_only_fail_end_the_run_with_their_last_word(controlled):
    controller = controlled(["echo no such GPU; exit 1"])
    with pytest.raises(ValueError, match=r"workers fail to work: no such GPU \(more in .*worker-0\.log"):
        controller.go()
    assert len(controller.display.lines) == PATIENCE
    assert controller.display.lines[-1] == "worker 0 ended with status 1; it is not started again"


def test_workers_that_end_well_with_cells_left_end_the_run_too(controlled):
    controller = controlled(["echo nothing is left to do"])
    with pytest.raises(ValueError, match=r"nothing is left to do; has .*r\.toml changed since this run began"):
        controller.go()


def test_one_sick_worker_is_left_out_and_the_others_end_the_sweep(controlled, tmp_path):
    a, b = (PUBLISH.format(folder=tmp_path, cell=cell) for cell in "ab")
    controller = controlled(["exit 2"], [f"{a} sleep 0.5; {b}"])
    controller.go()
    assert len(controller.ledger.results()) == 2
    sick = [line for line in controller.display.lines if line.startswith("worker 0 ended")]
    assert len(sick) == PATIENCE


def test_a_result_of_its_own_gives_a_worker_all_patience_again(controlled, tmp_path):
    a, b = (PUBLISH.format(folder=tmp_path, cell=cell) for cell in "ab")
    fails = ["exit 2"] * (PATIENCE - 1)
    controller = controlled([*fails, f"{a} sleep 0.3; exit 2", *fails[1:], b])
    controller.go()
    assert len(controller.ledger.results()) == 2


def test_a_worker_that_is_killed_is_started_again_for_ever(controlled, tmp_path):
    b = "".join(PUBLISH.format(folder=tmp_path, cell=cell) for cell in "ab")
    controller = controlled([*["kill -9 $$"] * (PATIENCE + 1), b])
    controller.go()
    assert controller.display.lines[0] == "worker 0 was killed (SIGKILL); starting another"
