"""One process of a job: told where it is, a child that ends with its parent, its errors found again."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from atma.launching import by_slurm, process
from atma.launching.by_slurm import Process
from atma.launching.process import Place, begin, last_error, stop

ALONE = Place(0, 1, 0, "127.0.0.1", 29500, "job 1")


def test_a_process_is_told_its_place_in_the_words_of_torchrun(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    told = Place(9, 16, 1, "node-a", 20001, "slurm 12", 2).environment()
    assert (told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"]) == ("9", "16", "1")
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("node-a", "20001")
    assert (told["TORCHELASTIC_RUN_ID"], told["TORCHELASTIC_RESTART_COUNT"]) == ("slurm 12", "2")


@pytest.mark.parametrize(("shown", "own"), [("", "3"), ("0,1,2,3", "3"), ("5", "0"), ("4,6", "1")])
def test_its_gpu_is_one_of_those_that_the_cluster_shows_it(shown, own, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert ALONE._replace(local_rank=3).environment()["LOCAL_RANK"] == own


def test_it_is_the_command_itself_and_its_error_is_found_in_its_log(tmp_path):
    log = tmp_path / "log"
    with log.open("ab") as file:
        child = begin(["train", "no.toml"], str(tmp_path), ALONE, file)
        assert child.wait() == 2
    assert last_error([tmp_path / "none", log]).startswith("no.toml: no such recipe")
    log.write_text("all is well\n")
    assert last_error([log]) is None


def test_it_is_told_to_stop_when_its_parent_is_gone():
    inner = "import os, sys, threading, time\nfrom atma.launching import process\n"
    inner += "threading.Thread(target=process._follow, args=(os.getppid(),), daemon=True).start()\n"
    inner += "print(os.getpid(), flush=True)\ntime.sleep(600)\n"
    outer = f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {inner!r}])\n"
    parent = subprocess.Popen([sys.executable, "-c", outer], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.kill()
    parent.communicate(timeout=60)  # the child holds the pipe too: at its end it is gone
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(child, 0)
            time.sleep(0.1)


def test_a_child_is_told_to_stop_and_waited_for_for_so_long():
    stubborn = (
        "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(1, flush=True)\ntime.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
    child.stdout.readline()
    began = time.monotonic()
    stop(child, 0.5)
    assert child.poll() is None and time.monotonic() - began < 30
    child.kill()
    stop(child, 60.0)
    assert child.wait() == -signal.SIGKILL
    stop(child, 60.0)
    child.stdout.close()


def job(**changes) -> SimpleNamespace:
    """What submitit tells a task of its job."""
    own = {"cluster": "local", "job_id": "7", "global_rank": 0, "num_tasks": 2, "local_rank": 0, "num_nodes": 1}
    return SimpleNamespace(**(own | {"hostnames": ["node-a", "node-b"]} | changes))


def test_tasks_of_a_job_agree_on_where_the_first_is_and_other_jobs_take_other_ports(monkeypatch):
    first = by_slurm.place(job(num_nodes=2, cluster="slurm"))
    last = by_slurm.place(job(num_nodes=2, cluster="slurm", global_rank=1))
    assert first.address == last.address == "node-a" and first.port == last.port
    assert first.job == last.job == "slurm 7"
    assert by_slurm.place(job(job_id="8")).port != first.port
    assert by_slurm.place(job()).address == "127.0.0.1"
    assert by_slurm.place(job(), starts=1).starts == 1
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    assert by_slurm.place(job(), starts=1).starts == 3


@pytest.fixture
def submitit(monkeypatch):
    """Stands for submitit, whose job this process is a task of: `told` is what it knows."""
    found = SimpleNamespace(told=job())
    found.JobEnvironment = lambda: found.told
    found.helpers = SimpleNamespace(DelayedSubmission=lambda function: function)
    monkeypatch.setitem(sys.modules, "submitit", found)
    return found


@pytest.mark.parametrize(
    ("rank", "status", "told"), [(0, 0, ""), (0, 143, "143"), (1, 143, ""), (1, 2, "2"), (0, -9, "-9")]
)
def test_a_task_fails_with_its_process_but_of_one_that_is_stopped_the_first_alone(
    submitit, monkeypatch, tmp_path, rank, status, told
):
    submitit.told = job(global_rank=rank)
    ended = f"import os, signal\n{f'os.kill(os.getpid(), {-status})' if status < 0 else f'os._exit({status})'}"
    monkeypatch.setattr(by_slurm, "begin", lambda *_: subprocess.Popen([sys.executable, "-c", ended]))
    task = Process(["train"], str(tmp_path), 1.0)
    fails = pytest.raises(RuntimeError, match=f"process {rank} ended with status {told}")
    with fails if told else contextlib.nullcontext():
        task()


def test_a_job_that_is_to_end_stops_its_process_and_is_to_go_on(submitit, monkeypatch, tmp_path):
    """As submitit asks for it: in a handler of a signal, while the process is waited for."""
    waits = [sys.executable, "-c", "import time\ntime.sleep(600)"]
    monkeypatch.setattr(by_slurm, "begin", lambda *_: subprocess.Popen(waits))
    task, after = Process(["train"], str(tmp_path), 60.0), []
    monkeypatch.setattr(by_slurm, "STOPPED", (-signal.SIGTERM,))
    submitit.told = job(global_rank=1)
    before = signal.signal(signal.SIGALRM, lambda *_: after.append(task.checkpoint()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        task()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(after) == 1 and (after[0].line, after[0].starts, after[0].patience) == (["train"], 1, 60.0)


def test_signals_for_the_cluster_s_own_process_are_not_for_the_child(monkeypatch):
    heard, ran = {}, []
    monkeypatch.setattr(process.signal, "signal", heard.__setitem__)
    monkeypatch.setattr(process.threading, "Thread", lambda **_: SimpleNamespace(start=lambda: None))
    monkeypatch.setattr(process.runpy, "run_module", lambda name, run_name: ran.append((name, run_name)))
    monkeypatch.setattr(sys, "argv", ["x"])
    process.main(["1", "train", "r.toml"])
    assert heard[signal.SIGUSR2] == signal.SIG_IGN and ran == [("atma", "__main__")]
    assert sys.argv == ["atma", "train", "r.toml"]
