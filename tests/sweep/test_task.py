"""Claims, leases and results: whoever races, exactly one has a task, and exactly one result is its result."""

import errno
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from atma.sweep import files
from atma.sweep.task import CLAIMS, RESULT, Limits, Task, Watch, process_is_gone, worker

RACE = """
import sys, time
from pathlib import Path
from atma.sweep.task import Limits, Task, Watch
task, watch = Task(Path(sys.argv[1]), Limits(lease=0.2)), Watch()
task.claim(watch)
print("ready", flush=True)
sys.stdin.readline()
time.sleep(0.3)
print("mine" if task.claim(watch) else "another's", flush=True)
sys.stdin.readline()
"""


def claimed_elsewhere(task: Task, number: int = 1) -> None:
    """A claim whose worker runs on a machine that is not this one."""
    files.create_once(task.folder / CLAIMS / f"{number:06}.json", worker() | {"machine": "another", "host": "far"})


def racers(folder: Path, count: int) -> list[subprocess.Popen]:
    line = [sys.executable, "-c", RACE, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    found = [subprocess.Popen(line, **pipes) for _ in range(count)]
    for process in found:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return found


def race(processes: list[subprocess.Popen]) -> list[str]:
    """What each says once all are let go together; they live until all have spoken."""
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    said = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        process.communicate("bye\n")
    return said


def test_a_claimed_task_is_nobody_elses_until_it_is_given_back(tmp_path: Path):
    task = Task(tmp_path / "t")
    first = task.claim(Watch())
    assert first is not None
    assert task.claim(Watch()) is None
    first.release("enough")
    second = task.claim(Watch())
    assert second is not None
    assert (first.number, second.number) == (1, 2)
    assert first.lost()
    assert not second.lost()


def test_of_many_processes_exactly_one_takes_over_a_dead_workers_claim(tmp_path: Path):
    for turn in range(3):
        task = Task(tmp_path / str(turn))
        claimed_elsewhere(task)
        said = race(racers(task.folder, 6))
        assert sorted(said) == ["another's"] * 5 + ["mine"]
        assert [attempt.number for attempt in task.attempts()] == [1, 2]


def test_of_many_threads_exactly_one_makes_a_file_and_it_is_whole(tmp_path: Path):
    for turn in range(20):
        start, made = threading.Barrier(8), []

        def make(number: int, turn: int = turn, start=start, made=made) -> None:
            start.wait()
            if files.create_once(tmp_path / f"{turn}.json", {"by": number, "much": "x" * 10_000}):
                made.append(number)

        threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = files.read(tmp_path / f"{turn}.json")
        assert found is not None
        assert made == [found["by"]]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{turn}.json" for turn in range(20))


def test_a_lease_ends_by_the_observers_own_clock_and_only_while_the_heart_is_still(tmp_path: Path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    task, watch = Task(tmp_path / "t", Limits(lease=60.0)), Watch()
    claimed_elsewhere(task)
    beat = task.beat_path(1)
    files.replace(beat, {"beat": 1})
    assert task.claim(watch) is None
    now += 59
    assert task.claim(watch) is None
    files.replace(beat, {"beat": 2})
    now += 59
    assert task.claim(watch) is None, "the heart has beaten since"
    now += 59
    assert task.claim(watch) is None
    now += 2
    assert task.claim(watch) is not None


@pytest.mark.parametrize("skew", [-(10**6), 10**6])
def test_clocks_that_differ_by_days_neither_end_a_lease_nor_keep_one(skew: int, tmp_path: Path):
    task, watch = Task(tmp_path / "t", Limits(lease=0.3)), Watch()
    claimed_elsewhere(task)
    files.replace(task.beat_path(1), {"beat": 1})
    os.utime(task.beat_path(1), (time.time() + skew,) * 2)
    assert task.claim(watch) is None
    assert task.claim(Watch()) is None
    time.sleep(0.4)
    assert task.claim(Watch()) is None, "a new observer has to watch for a lease's length first"
    assert task.claim(watch) is not None


def test_a_process_of_this_machine_that_is_gone_is_seen_to_be_at_once(tmp_path: Path):
    task = Task(tmp_path / "t", Limits(lease=10**6))
    process = racers(task.folder, 1)[0]
    assert task.claim(Watch()) is None
    process.kill()
    process.communicate()
    claim = task.claim(Watch())
    assert claim is not None
    assert claim.number == 2


def test_a_number_of_a_process_used_again_is_not_taken_for_it():
    me = worker()
    assert not process_is_gone(me)
    assert process_is_gone(me | {"began": "1"})
    assert not process_is_gone(me | {"began": "1", "machine": "another"})
    assert not process_is_gone(me | {"pid": 2**22 + 1, "machine": None})


def test_the_first_whole_result_stays(tmp_path: Path):
    task = Task(tmp_path / "t")
    slow = task.claim(Watch())
    assert slow is not None
    slow.release("taken for dead")
    quick = task.claim(Watch())
    assert quick is not None
    assert quick.task.publish({"by": "quick"})
    assert not slow.task.publish({"by": "slow"})
    assert task.result() == {"by": "quick"}
    assert task.claim(Watch()) is None


def test_an_attempt_that_is_done_is_believed_for_a_lease_though_its_result_is_not_seen(tmp_path: Path, monkeypatch):
    """As on a network disk whose client still remembers that there was no result."""
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    task, watch = Task(tmp_path / "t", Limits(lease=60.0)), Watch()
    claim = task.claim(watch)
    assert claim is not None
    claim.done()
    assert task.claim(watch) is None
    now += 59
    assert task.claim(watch) is None
    now += 2
    assert task.claim(watch) is not None, "somebody has removed the result"


def test_a_heartbeat_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch):
    """Network disks say of such a file that its handle is stale; of a disk that is gone they say it every time."""
    files.replace(tmp_path / "beat.json", {"beat": 1})
    whole, left = Path.read_bytes, [OSError(errno.ESTALE, "Stale file handle")]

    def read(path: Path) -> bytes:
        if left:
            raise left.pop()
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    watch = Watch()
    watch.silent(tmp_path / "beat.json")
    assert watch.seen[tmp_path / "beat.json"][0] == b'{"beat": 1}\n'
    left += [OSError(errno.ESTALE, "Stale file handle")] * 3
    with pytest.raises(OSError, match="Stale file handle"):
        watch.silent(tmp_path / "beat.json")


def test_errors_are_counted_and_the_last_is_kept(tmp_path: Path):
    task = Task(tmp_path / "t", Limits(attempts=2))
    for number in (1, 2):
        claim = task.claim(Watch())
        assert claim is not None
        claim.fail(RuntimeError(f"the {number}th time"))
    assert task.claim(Watch()) is None
    failure = task.failure()
    assert failure is not None
    assert (failure["error"], failure["attempts"]) == ("RuntimeError: the 2th time", 2)
    assert "RuntimeError" in failure["traceback"]


def test_a_failed_task_tried_again_has_all_its_attempts_again(tmp_path: Path):
    task = Task(tmp_path / "t", Limits(attempts=1))
    for number in (1, 2, 3):
        claim = task.claim(Watch())
        assert claim is not None
        assert claim.number == number
        claim.fail(RuntimeError("again"))
        assert task.claim(Watch()) is None
        assert task.retry()
    assert not task.retry()


def test_a_task_given_up_that_a_slow_worker_does_all_the_same_has_not_failed(tmp_path: Path):
    task = Task(tmp_path / "t", Limits(attempts=1))
    slow = task.claim(Watch())
    assert slow is not None
    slow.fail(RuntimeError("as of its successor"))
    assert task.claim(Watch()) is None
    assert task.failure() is not None
    assert slow.task.publish({"by": "slow"})
    assert task.failure() is None
    assert not task.retry()


def test_deaths_are_counted_apart_and_being_given_back_is_not_counted(tmp_path: Path):
    task = Task(tmp_path / "t", Limits(attempts=1, deaths=2))
    for _ in range(4):
        claim = task.claim(Watch())
        assert claim is not None
        claim.release("stopped")
    dead = worker() | {"began": "1"}
    files.create_once(task.folder / CLAIMS / "000005.json", dead)
    assert task.claim(Watch()) is not None
    (task.folder / CLAIMS / "000006.json").write_text(json.dumps(dead))
    assert task.claim(Watch()) is None
    failure = task.failure()
    assert failure is not None
    assert "died 2 times" in failure["error"]


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path: Path):
    left = tmp_path / "cells" / ".new-0123"
    left.parent.mkdir()
    left.write_text("{")
    files.remove_abandoned(tmp_path)
    assert left.exists()
    os.utime(left, (time.time() - 2 * files.ABANDONED_SECONDS,) * 2)
    files.remove_abandoned(tmp_path)
    assert not left.exists()


def test_folders_that_vanish_meanwhile_do_not_stop_the_removal(tmp_path: Path, monkeypatch):
    (tmp_path / "cells" / "run-000001").mkdir(parents=True)
    look = os.scandir

    def scan(path):
        if Path(path).name == "run-000001":
            os.rmdir(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scan)
    files.remove_abandoned(tmp_path)
    assert not list((tmp_path / "cells").iterdir())


def test_a_damaged_file_is_named(tmp_path: Path):
    (tmp_path / RESULT).write_text('{"cell": ')
    with pytest.raises(ValueError, match=r"result\.json: not JSON, damaged"):
        Task(tmp_path).result()
