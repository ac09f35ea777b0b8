"""`atma train --launch`: what is run, what is shown of it, how it ends; and the real launchers on this machine."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atma.cli import main
from atma.data.prepare import Preparation, prepare
from atma.launching import by_slurm
from atma.launching.process import Place, begin
from atma.train.launched import Tail, follow
from atma.train.progress import Silent
from atma.train.record import Record, cut_record, read_record

TINY = """
name = "tiny"
[model]
preset = "nano-test"
width = 16
head_width = 8
[data]
path = "data"
[train]
length = 32
batch_tokens = 128
tokens = 1280
checkpoint_every = 4
evaluate_every = 5
evaluation_tokens = 128
"""
STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """With a recipe and its data."""
    folder = tmp_path_factory.mktemp("launched")
    (folder / "text").mkdir()
    for number in range(8):
        (folder / "text" / f"{number}.txt").write_text(f"the cat of number {number} sat on the mat\n" * 30)
    prepare(folder / "text", folder / "data", Preparation(tokenizer="bytes"))
    (folder / "tiny.toml").write_text(TINY)
    return folder


class Here:
    """A job whose processes run on this machine, started without a cluster."""

    def __init__(self, line, log, world=1):
        self.line, self.log, self.cancelled = line, log, False
        places = [Place(rank, world, rank, "127.0.0.1", 29_500, "here 1") for rank in range(world)]
        with log.open("ab") as file:
            self.children = [begin(line, os.getcwd(), place, file) for place in places]

    def over(self):
        going = [child for child in self.children if child.poll() is None]
        return not going

    def cancel(self):
        self.cancelled = True
        for child in self.children:
            child.terminate()
            child.wait()

    def failures(self):
        return [f"status {child.returncode}" for child in self.children if child.returncode]

    def told(self):
        return "job 1"

    def logs(self):
        return [self.log]


@pytest.fixture
def jobs(folder, tmp_path, monkeypatch) -> list[Here]:
    """The jobs that were started, in place of Slurm's; the working folder has the recipe."""
    started: list[Here] = []

    def submit(request, work):
        assert work.name == "atma-train" and len(work.lines) == 1
        started.append(Here(work.lines[0], work.folder / "log", request.processes))
        return started[-1]

    monkeypatch.setattr(by_slurm, "submit", submit)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    for name in ("data", "tiny.toml"):
        (tmp_path / name).symlink_to(folder / name)
    return started


def test_the_same_command_runs_elsewhere_and_its_record_is_shown_here(jobs, capfd):
    words = ["--out", "my run", "--set", "train.seed=3", "name=mine", "--device", "cpu", "--threads", "1"]
    assert main(["train", "tiny.toml", *words, "--launch", "slurm"]) == 0
    assert jobs[0].line == ["train", "tiny.toml", *words]
    told = capfd.readouterr().out.splitlines()
    assert told[0] == "job 1: 1 process, logs in my run/.jobs"
    assert told[1] == f"mine: {STEPS} steps to go"
    assert [line for line in told if re.match(f"mine: step (5|10)/{STEPS} validation loss", line)] != []
    assert told[-1].startswith("trained: my run: loss ") and told[-1].endswith("model in my run/final")
    assert main(["train", "--resume", "--out", "my run", "--launch", "slurm", "--set", "train.tokens=2560"]) == 0
    assert jobs[1].line == ["train", "--out", "my run", "--resume", "--set", "train.tokens=2560"]
    assert f"mine: {STEPS} steps to go, {STEPS} already done" in capfd.readouterr().out.splitlines()
    assert read_record(Path("my run"))[-1]["step"] == 2 * STEPS


def test_what_is_wrong_with_the_recipe_is_told_before_anything_is_asked_of_a_cluster(jobs, capfd):
    assert main(["train", "tiny.toml", "--set", "train.seeds=3", "--launch", "slurm"]) == 2
    assert jobs == [] and "train.seeds" in capfd.readouterr().err


def test_a_job_that_fails_is_told_with_what_its_process_said(jobs, capfd):
    words = ["--out", "r", "--set", "data.path=none", "--device", "cpu", "--threads", "1", "--launch", "slurm"]
    assert main(["train", "tiny.toml", *words]) == 2
    said = capfd.readouterr().err
    assert said.startswith("atma: error: job 1: none") and said.endswith("(logs: r/.jobs)\n")
    assert said.count("\n") == 1


def test_ctrl_c_cancels_the_job_and_says_how_to_go_on(jobs, capfd, monkeypatch):
    def look(tail):
        raise KeyboardInterrupt

    monkeypatch.setattr(Tail, "rows", look)
    monkeypatch.setattr(Tail, "__init__", lambda self, run: None)
    assert main(["train", "tiny.toml", "--out", "a b", "--device", "cpu", "--launch", "slurm"]) == 130
    assert jobs[0].cancelled
    wanted = "atma: job 1: told to stop; go on, here or anywhere, with: atma train --resume --out 'a b'"
    assert wanted in capfd.readouterr().err.splitlines()


class Over:
    """A job that has ended."""

    def __init__(self, *failures):
        self._failures = list(failures)

    over = staticmethod(lambda: True)
    told = staticmethod(lambda: "job 1")
    logs = staticmethod(list)

    def failures(self):
        return self._failures


def test_a_job_without_a_model_at_its_end_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="job 1: it has ended, and there is no model"):
        follow(Over(), tmp_path, Silent())
    (tmp_path / "final").mkdir()
    assert follow(Over(), tmp_path, Silent()) == tmp_path / "final"
    with pytest.raises(ValueError, match=re.escape(f"job 1: job 1 has failed (oom) (logs: {tmp_path / '.jobs'})")):
        follow(Over("job 1 has failed (oom)"), tmp_path, Silent())


def steps(tail: Tail) -> list[int]:
    return [row["step"] for row in tail.rows()]


def write(run: Path, *steps: int, pace: float = 1.0) -> None:
    with Record(run / "metrics.jsonl") as record:
        for step in steps:
            record.write("train", step, {"loss": pace})


def test_a_record_is_followed_row_by_row_from_where_it_stands(tmp_path):
    assert Tail(tmp_path).before == 0
    tail = Tail(tmp_path)
    write(tmp_path, 1, 2)
    assert steps(tail) == [1, 2] and steps(tail) == []
    assert Tail(tmp_path).before == 2
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st')
        file.flush()
        assert steps(tail) == []
        file.write(b'ep": 3}\n')
    assert steps(tail) == [3]


@pytest.mark.parametrize("more", [0, 1, 5, 50])
def test_a_record_that_is_cut_back_is_followed_from_there_however_far_it_has_grown_again(more, tmp_path):
    tail = Tail(tmp_path)
    write(tmp_path, *range(1, 10))
    assert len(steps(tail)) == 9
    for start in (4, 6, 2):  # the last drops what was told of the others
        cut_record(tmp_path, start)
        assert steps(tail) == [], "it is not told yet where it goes on"
        with Record(tmp_path / "metrics.jsonl") as record:
            record.write("event", start, {"event": f"resumed at step {start}"})
        write(tmp_path, *range(start + 1, start + 1 + more), pace=2.0 + start)
        assert steps(tail) == [start, *range(start + 1, start + 1 + more)]
        write(tmp_path, *range(start + 1 + more, start + 10))
        steps(tail)


def launched(kind: str, *words: str) -> subprocess.Popen:
    """`atma train` of the tiny recipe on two processes that a real launcher starts on this machine."""
    line = [sys.executable, "-m", "atma", "train", "tiny.toml", "--out", "run", "--device", "cpu", "--threads", "1"]
    line += ["--launch", kind, "--job", "processes_per_node=2", *words]
    line += ["cluster=local", "timeout_min=10"] if kind == "slurm" else []
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else Ray's workers get what others leave
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | own)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_the_real_launchers_train_on_two_processes_and_lose_nothing_when_one_is_to_make_room_or_is_lost(
    kind, folder, tmp_path, monkeypatch
):
    """The bits of one process with two micro-batches, which nobody has disturbed."""
    if importlib.util.find_spec({"slurm": "submitit", "ray": "ray"}[kind]) is None:
        pytest.skip(f"the package for {kind} is not installed (pip install 'atma-lm[cluster]')")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(folder / "data")
    (tmp_path / "tiny.toml").write_text(TINY.replace("tokens = 1280\n", "tokens = 25600\n"))
    command = launched(kind)
    record, until = Path("run/metrics.jsonl"), time.monotonic() + 300
    while not (record.is_file() and record.read_bytes().count(b"\n") > 20):
        assert command.poll() is None and time.monotonic() < until, command.communicate()
        time.sleep(0.1)
    first = json.loads(Path("run/.lock").read_text())["process"]
    if kind == "slurm":  # as Slurm tells it, to submitit's own process
        os.kill(int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1]), signal.SIGUSR2)
    else:
        os.kill(first, signal.SIGKILL)
    out, err = command.communicate(timeout=600)
    assert command.returncode == 0, (out, err)
    resumed = [row for row in read_record(Path("run")) if row["kind"] == "event"]
    assert [row["event"] for row in resumed] == [f"resumed at step {resumed[0]['step']}"]
    assert f"resumed at step {resumed[0]['step']}" in out
    alone = ["--out", "alone", "--set", "train.accumulation=2", "--device", "cpu", "--threads", "1"]
    assert main(["train", "tiny.toml", *alone]) == 0
    assert losses(Path("run")) == losses(Path("alone"))


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_record(run) if row["kind"] == "train"]
