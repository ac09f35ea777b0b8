"""Checkpoints written while training goes on: what they hold, who waits for them, and what becomes of failures."""

import errno
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from test_loop import same, weights
from tiny_run import rows, tiny_recipe, tiny_source

from atma import folders
from atma.folders import verify_folder
from atma.train.loop import Stopped, fit
from atma.train.record import read_record
from atma.train.saving import Copies
from atma.weights import TensorWriter
from tests.harness.processes import begun

HERE = Path(__file__).parent
WAIT = 300
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FIRST = "step-00000004"


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("writes ")]


def seen(run: Path) -> list[str]:
    return sorted(entry.name for entry in (run / "checkpoints").iterdir())


@pytest.fixture
def disk(monkeypatch):
    """What is called before a file of the first checkpoint is forced to the disk."""
    calls, sync = [], folders.sync

    def before(path: Path) -> None:
        if FIRST in str(path):
            for call in calls:
                call()
        sync(path)

    monkeypatch.setattr(folders, "sync", before)
    return calls


def refuse() -> None:
    raise FULL


def stopped_after(count: int, out: Path, keep: int = 2) -> None:
    made = []
    source = tiny_source(lambda step: made.append(step) or rows(step))
    with pytest.raises(Stopped):
        fit(tiny_recipe(keep_checkpoints=keep), out, source, stop=lambda: len(made) == count)


def test_a_checkpoint_holds_what_was_when_it_was_begun_though_steps_go_on_meanwhile(tmp_path, disk):
    moved = threading.Event()
    disk.append(lambda: moved.wait(WAIT))

    def make(step: int):
        if step == 6:  # two steps have been made meanwhile
            assert not (tmp_path / "run" / "checkpoints" / FIRST).exists()
            moved.set()
        return rows(step)

    fit(tiny_recipe(keep_checkpoints=9), tmp_path / "run", tiny_source(make))
    assert moved.is_set() and seen(tmp_path / "run") == [FIRST, "step-00000008", "step-00000012"]
    stopped_after(4, tmp_path / "four", keep=9)
    for name in ("model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"):
        found, wanted = (tmp_path / run / "checkpoints" / FIRST / name for run in ("run", "four"))
        assert found.read_bytes() == wanted.read_bytes(), name
    assert not writers()


def test_memory_of_copies_is_used_again_and_is_theirs_alone():
    value, copies = torch.arange(6.0), Copies()
    files = {"x": TensorWriter({"a": value.view(2, 3).T}, {"note": "kept"}), "text": print}
    made = copies.of(files)
    first, writer = made["x"], made["text"]
    assert isinstance(first, TensorWriter) and writer is print and first.notes == {"note": "kept"}
    held = first.tensors["a"]
    value.add_(1)
    torch.testing.assert_close(held, torch.arange(6.0).view(2, 3).T, rtol=0, atol=0)
    second = copies.of(files)["x"]
    assert isinstance(second, TensorWriter) and second.tensors["a"] is held and held.is_contiguous()
    torch.testing.assert_close(held, value.view(2, 3).T, rtol=0, atol=0)


def test_a_write_that_fails_ends_the_run_at_the_next_step(tmp_path, disk):
    asked = []

    def make(step: int):
        asked.append(step)
        for thread in writers():
            thread.join(WAIT)
        return rows(step)

    disk.append(refuse)
    with pytest.raises(OSError, match=r"step-00000004: cannot be written, what was there stays .*: No space left"):
        fit(tiny_recipe(), tmp_path / "run", tiny_source(make))
    assert asked[-1] == 4 and seen(tmp_path / "run") == [] and not writers()
    assert [row["step"] for row in read_record(tmp_path / "run") if row["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_neither_a_stop_nor_the_end_passes_over_a_write_that_fails(tmp_path, disk):
    disk.append(refuse)
    with pytest.raises(OSError, match="No space left"):
        stopped_after(4, tmp_path / "stopped")
    with pytest.raises(OSError, match="No space left"):
        fit(tiny_recipe(tokens=4 * 64), tmp_path / "ended", tiny_source())
    assert not (tmp_path / "ended" / "final").exists() and not writers()


@pytest.mark.parametrize("fails", [False, True])
def test_who_is_interrupted_waits_for_the_checkpoint_and_leaves_no_thread(fails, tmp_path, disk):
    interrupted = threading.Event()
    disk.append(lambda: interrupted.wait(WAIT))
    if fails:
        disk.append(refuse)

    def make(step: int):
        if step == 5:
            assert writers()
            interrupted.set()
            raise KeyboardInterrupt
        return rows(step)

    with pytest.raises(KeyboardInterrupt) as ended:
        fit(tiny_recipe(), tmp_path / "run", tiny_source(make))
    assert not writers()
    assert seen(tmp_path / "run") == ([] if fails else [FIRST])
    notes = getattr(ended.value, "__notes__", [])
    assert len(notes) == fails and all("besides: " in note and "No space left" in note for note in notes)
    disk.clear()
    if not fails:
        verify_folder(tmp_path / "run" / "checkpoints" / FIRST)
        fit(tiny_recipe(), tmp_path / "run", tiny_source(), resume=True)
        fit(tiny_recipe(), tmp_path / "whole", tiny_source())
        assert same(weights(tmp_path / "run" / "final"), weights(tmp_path / "whole" / "final"))


def test_a_disk_that_does_not_answer_is_found(tmp_path, disk):
    answers = threading.Event()
    disk.append(lambda: answers.wait(WAIT))
    left = []

    def make(step: int):
        if step == 4:
            left.extend(writers())
        return rows(step)

    with pytest.raises(ValueError, match=r"step-00000004: not written after 0.5 s: does its disk answer\?"):
        fit(tiny_recipe(hang_seconds=0.5), tmp_path / "run", tiny_source(make))
    answers.set()
    assert left and left[0].daemon  # or the process would not end
    left[0].join(WAIT)
    assert not (tmp_path / "run" / "checkpoints" / "step-00000004").exists()  # what was given up changes nothing later


def two(folder: Path, how: str, shard: int, rank: int, seconds: int) -> list[str]:
    """What each of two processes tells when the disk of one is full or hangs, or it is killed while it writes."""
    processes = begun(2, ["disks.py", str(folder), how, *map(str, (shard, rank, seconds))], HERE)
    try:
        ended = [process.wait(timeout=WAIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert ended == [-signal.SIGKILL if (how, i) == ("kill", rank) else 3 for i in range(2)]
    return [(folder / f"told-{i}").read_text() if code == 3 else "" for i, code in enumerate(ended)]


@pytest.mark.parametrize(
    ("how", "shard", "rank"),
    [
        ("full", 2, 1),
        pytest.param("limit", 2, 1, marks=pytest.mark.slow),
        pytest.param("full", 2, 0, marks=pytest.mark.slow),
        pytest.param("full", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_a_full_disk_of_one_process_ends_all_with_its_line(how, shard, rank, tmp_path):
    told = two(tmp_path, how, shard, rank, 120)
    reason = "File too large" if how == "limit" else "No space left on device"
    assert told[0].startswith("" if rank == 0 else f"process {rank}: ") and reason in told[0]
    assert told[1] == f"silent {told[0]}"
    assert seen(tmp_path / "run") == [FIRST]


@pytest.mark.slow
@pytest.mark.parametrize(("shard", "rank"), [(2, 1), (2, 0), (1, 0)])
def test_a_disk_that_hangs_in_one_process_is_found_by_all(shard, rank, tmp_path):
    told = two(tmp_path, "hang", shard, rank, 8)
    named = "process 1 did not answer for 8 s" if rank else "step-00000008: not written after 8 s: does its disk answer"
    assert named in told[0]
    assert seen(tmp_path / "run") == [".step-00000008.staging", FIRST] or seen(tmp_path / "run") == [FIRST]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_while_it_writes_a_part_leaves_the_checkpoint_before(rank, tmp_path):
    told = two(tmp_path, "kill", 2, rank, 60)[1 - rank]
    assert told.startswith(f"process {1 - rank}, step ") and told.endswith("; go on with --resume")
    assert "was lost" in told or "did not answer" in told
    assert [name for name in seen(tmp_path / "run") if not name.startswith(".")] == [FIRST]
