"""`atma sweep` as typed: plan, status, run, mistakes, data made once, and workers that a cluster starts."""

import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atma.cli import main
from atma.commands.sweep import VERBS
from atma.data.dataset import MANIFEST, TokenSet
from atma.data.prepare import Preparation
from atma.launching import Request
from atma.sweep.cells import load_sweep
from atma.sweep.controller import Crew
from atma.sweep.data import prepare_data
from atma.sweep.display import Lines
from atma.sweep.launch import launch, run_jobs
from atma.sweep.ledger import Ledger, Standing
from atma.sweep.recipe import Source
from atma.sweep.status import Follower, share_done
from tests.sweep.conftest import tiny_sweep
from tests.sweep.test_worker import write_recipe

FACTORS = "factors.attention = { field = 'model.core', values = ['polar', 'rope'] }"


@pytest.fixture
def recipe(corpus, tmp_path) -> Path:
    return write_recipe(tmp_path / "tiny.toml", corpus, FACTORS)


def test_the_whole_command_line_runs_a_sweep_and_shows_it(recipe, tmp_path, capfd):
    out = str(tmp_path / "s")
    assert main(["sweep", "plan", str(recipe), "--out", out]) == 0
    assert re.search(r"2 cells \(2 × 1 seeds\)\n1,280 tokens to train on", capfd.readouterr().out)
    assert main(["sweep", "run", str(recipe), "--out", out, "--threads", "1", "--device", "cpu"]) == 0
    said = capfd.readouterr().out
    assert re.search(r"attention=polar seed=0: \d+:\d\d, validation \d", said)
    assert main(["sweep", "status", out]) == 0
    assert "2/2 done" in capfd.readouterr().out
    assert main(["sweep", "status", str(recipe), "--out", out]) == 0
    assert "2/2 done" in capfd.readouterr().out
    assert main(["sweep", "plan", str(recipe), "--out", out]) == 0
    assert "2 done in" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["begin"], "no verb 'begin'; known: run, work, status, plan"),
        (["run", "no.toml"], "no.toml: no such recipe"),
        (["status", "no.toml"], "no.toml: no such recipe"),
        (["run", "RECIPE", "--workers", "0"], "--workers 0"),
        (["run", "RECIPE", "--workers", "2", "--threads", "1000"], "more than this machine's"),
        (["run", "RECIPE", "--launch", "ray", "--threads", "-1"], "--threads -1: at least 1 of each"),
        (["work", "RECIPE", "--threads", "0"], "--threads 0: at least 1"),
        (["run", "RECIPE", "--device", "abacus"], "no such kind of device"),
        (["run", "RECIPE", "--launch", "slurm", "--job", "partition"], "--job partition: write KEY=VALUE"),
        (["run", "RECIPE", "--job", "nodes=2"], "--job nodes=2: what to ask a cluster for; add --launch"),
    ],
)
def test_mistakes_are_said_in_one_line(arguments, said, recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *(str(recipe) if word == "RECIPE" else word for word in arguments)]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert main(["sweep"]) == 0
    assert re.search(r"usage: atma sweep VERB.*\n  run .*\n  work .*\n  status ", capsys.readouterr().out, re.S)


@pytest.mark.parametrize("part", VERBS)
def test_every_part_explains_itself(part, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["sweep", part, "--help"])
    assert ended.value.code == 0
    assert f"usage: atma sweep {part}" in capsys.readouterr().out


def test_data_is_made_once_however_many_ask_for_it(corpus, tmp_path):
    (tmp_path / "text").mkdir()
    for number in range(8):
        (tmp_path / "text" / f"{number}.txt").write_text(f"a line of text, number {number}\n" * 40)
    sweep = tiny_sweep(tmp_path / "data")
    source = Source(str(tmp_path / "text"), Preparation(tokenizer="bytes"))
    object.__setattr__(sweep, "source", source)
    starts = []
    told = lambda stage, done, total: starts.append(stage) if stage == "write train" else None  # noqa: E731
    threads = [threading.Thread(target=prepare_data, args=(sweep, told, lambda text: None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert TokenSet.open(tmp_path / "data", verify=True).tokens > 0
    assert starts == ["write train"]
    prepare_data(sweep, told)
    assert starts == ["write train"]


def test_data_that_takes_longer_than_a_lease_and_tells_nothing_is_made_once(tmp_path, monkeypatch):
    started = []

    def slowly(source, out, options, progress):
        started.append(out)
        time.sleep(5)
        out.mkdir(exist_ok=True)
        (out / MANIFEST).write_text("{}")

    monkeypatch.setattr("atma.sweep.data.LEASE", 2)
    monkeypatch.setattr("atma.sweep.data.prepare", slowly)
    sweep = tiny_sweep(tmp_path / "data")
    object.__setattr__(sweep, "source", Source("text", Preparation()))
    threads = [threading.Thread(target=prepare_data, args=(sweep, None, lambda text: None)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert started == [tmp_path / "data"]


def test_data_that_is_missing_and_that_nobody_can_make_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such data; make it with `atma prepare`"):
        prepare_data(tiny_sweep(tmp_path / "nowhere"))


def test_time_left_comes_from_finished_cells_and_present_workers(tmp_path):
    ledger = Ledger(tmp_path, Ledger.create(tmp_path / "s", tiny_sweep(tmp_path)).limits, {})
    follower = Follower(ledger, {"a": 100.0, "b": 140.0})
    doing = {"stage": "training", "done": 5, "of": 10}
    states = ["done", "done", "failed", "running", "running", "stale", "waiting", "waiting"]
    follower.standings = [
        Standing(str(number), "", state, 1, doing if state == "running" else {}, {})
        for number, state in enumerate(states)
    ]
    assert share_done(follower.standings[3]) == pytest.approx(0.375)
    assert follower.seconds_left() == pytest.approx(120 * (5 - 2 * 0.375) / 2)
    assert follower.line() == "2/8 done, 2 running, 1 stale, 1 failed, 2 waiting, about 4:15 left"


def test_threads_divide_the_cores_among_the_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert Crew.choose(2, None, None) == Crew(2, 4, None)
    assert Crew.choose(16, None, "cpu") == Crew(16, 1, "cpu")
    assert Crew.choose(2, 3, None).environment()["OMP_NUM_THREADS"] == "3"
    with pytest.raises(ValueError, match="3 workers × 3 threads are more than this machine's 8 cores"):
        Crew.choose(3, 3, None)
    assert Crew.choose(16, 1, None).threads == 1


def test_gpus_are_dealt_out_here_and_left_to_the_cluster_elsewhere(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    crew = Crew(3, 1, "cuda")
    here = [" ".join(crew.command(Path("r.toml"), Path("s"), number, 7)) for number in range(3)]
    assert [re.search("--device ([^ ]*)", line)[1] for line in here] == ["cuda:0", "cuda:1", "cuda:0"]
    assert crew.arguments(Path("r.toml"), Path("s"))[-2:] == ["--device", "cuda"]


class Executor:
    """What submitit's executor does, in processes of this machine."""

    def __init__(self):
        self.jobs: list[subprocess.Popen] = []

    def submit(self, line):
        self.jobs.append(subprocess.Popen([sys.executable, "-m", "atma", *line]))

    def over(self):
        return all(job.poll() is not None for job in self.jobs)

    def cancel(self):
        for job in self.jobs:
            job.terminate()
            job.wait()


def test_workers_started_elsewhere_do_the_sweep(recipe, tmp_path, monkeypatch, capfd):
    jobs = Executor()

    def start(request, work):
        for line in work.lines:
            jobs.submit(line)
        return jobs

    monkeypatch.setattr("atma.sweep.launch.start", start)
    ledger = Ledger.create(tmp_path / "s", load_sweep(recipe))
    run_jobs(Request("slurm"), Crew(2, 1, "cpu"), recipe, ledger, Lines())
    jobs.cancel()
    assert ledger.finished()
    assert len(ledger.results()) == 2
    assert capfd.readouterr().out.count("validation") >= 2


def test_workers_that_all_end_early_are_an_error(recipe, tmp_path, monkeypatch):
    jobs = Executor()
    jobs.submit(["--version"])
    monkeypatch.setattr("atma.sweep.launch.start", lambda *_: jobs)
    ledger = Ledger.create(tmp_path / "s", load_sweep(recipe))
    with pytest.raises(ValueError, match="every worker has ended, with 0/2 done"):
        run_jobs(Request("ray"), Crew(), recipe, ledger, Lines())


def test_a_worker_is_one_process(recipe, tmp_path):
    with pytest.raises(ValueError, match="a worker is one process, not 4; set how many with --workers"):
        launch(Request("slurm", nodes=2, processes_per_node=2), Crew(), recipe, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "ray"])
def test_the_real_launchers_do_a_sweep_on_this_machine(kind, recipe, tmp_path):
    if importlib.util.find_spec({"slurm": "submitit", "ray": "ray"}[kind]) is None:
        pytest.skip(f"the package for {kind} is not installed (pip install 'atma-lm[cluster]')")
    line = [sys.executable, "-m", "atma", "sweep", "run", str(recipe), "--out", str(tmp_path / "s"), "--device", "cpu"]
    line += ["--workers", "2", "--launch", kind]
    line += ["--job", "cluster=local", "timeout_min=10"] if kind == "slurm" else []
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}  # else Ray's workers get what others leave
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert len(Ledger.open(tmp_path / "s").results()) == 2
    shutil.rmtree(tmp_path / "s")


@pytest.mark.parametrize("verb", ["plan", "work", "run"])
def test_an_evaluation_that_can_never_work_is_told_before_any_cell_is_trained(verb, corpus, tmp_path, capsys):
    recipe = write_recipe(tmp_path / "s.toml", corpus, "factors.'evaluation.needle_trials' = [0, 1]")
    options = [] if verb == "plan" else ["--out", str(tmp_path / "s")]
    assert main(["sweep", verb, str(recipe), *options]) == 2
    said = capsys.readouterr().err
    assert "cell evaluation.needle_trials=1 seed=0: [evaluation] cannot work: length 32 has no room" in said
    assert not (tmp_path / "s").exists()


def test_data_that_are_yet_to_be_made_are_told_and_their_known_tokenizer_is_asked(tmp_path, capsys):
    prepared = "prepare = {{ source = 'x.txt', tokenizer = '{}' }}\n".format
    recipe = write_recipe(tmp_path / "s.toml", tmp_path / "none", prepared("bpe"))
    assert main(["sweep", "plan", str(recipe)]) == 0
    assert "not made yet; [evaluation] is checked on it before any cell is trained" in capsys.readouterr().out
    needles = "factors.'evaluation.needle_trials' = [1]\n"
    write_recipe(recipe, tmp_path / "none", needles + prepared("bytes"))
    assert main(["sweep", "plan", str(recipe)]) == 2
    assert "has no room for a needle" in capsys.readouterr().err


def test_a_sweep_that_one_may_not_write_is_read_all_the_same(recipe, tmp_path, capfd, monkeypatch):
    """A disk that is read-only or full, as far as a test that may run as root can have one."""
    folder = tmp_path / "s"
    assert main(["sweep", "work", str(recipe), "--out", str(folder), "--threads", "1", "--device", "cpu"]) == 0
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def refuses(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("touch", "mkdir", "rename", "replace", "unlink", "write_text"):
        monkeypatch.setattr(Path, name, refuses)
    capfd.readouterr()
    for verb, said in (("status", "2/2 done"), ("analyse", "2 cells, judged by")):
        assert main(["sweep", verb, str(folder)]) == 0
        assert said in capfd.readouterr().out
    assert main(["sweep", "plan", str(recipe), "--out", str(folder)]) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
