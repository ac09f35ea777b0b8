"""Processes of a run that are killed or hang: the others end, a line each, and the run goes on to the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import tiny_recipe, tiny_source

from atma.train.folder import goes_on
from atma.train.loop import fit
from atma.train.parallel import Ranks
from atma.weights import load_tensors
from tests.harness.processes import ROOT, begun, group

HERE = Path(__file__).parent
NEVER = "99"
WAIT = 300


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_tensors(folder / "run" / "final" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_a_process_that_hangs_is_named_and_the_others_end(tmp_path):
    processes = begun(3, ["lost.py", str(tmp_path), "hang", "5", "1", "8"], HERE)
    try:
        ended = [processes[rank].wait(timeout=WAIT) for rank in (0, 2)]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert ended == [3, 3]
    assert "did not answer for 8 s; go on with --resume" in (tmp_path / "told-2").read_text()
    assert (
        "process 0, step 5: process 1 did not answer for 8 s; go on with --resume" in (tmp_path / "told-0").read_text()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", range(25))
def test_torchrun_goes_on_after_a_kill_to_the_same_bits(kills, tmp_path, whole):
    """Of any process, before any step; the others end by themselves, without torchrun, within the time of a test."""
    rank, step = kills % 3, kills % 12
    told = ["kill", str(step), str(rank), "60"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--max-restarts", "1"]
    command += ["--standalone", "--monitor-interval", "0.2", "lost.py", str(tmp_path), *told]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=WAIT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert same(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(3))
def test_without_torchrun_the_others_end_with_a_line_each_when_one_is_killed(rank, tmp_path):
    processes = begun(3, ["lost.py", str(tmp_path), "kill", "5", str(rank), "60"], HERE)
    try:
        ended = [process.wait(timeout=WAIT) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert ended == [-9 if i == rank else 3 for i in range(3)]
    for other in {0, 1, 2} - {rank}:
        told = (tmp_path / f"told-{other}").read_text()
        assert told.startswith(f"process {other}, step 5: ") and told.endswith("; go on with --resume")
        assert "was lost" in told or "did not answer" in told


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    group(3, ["lost.py", str(folder), "kill", NEVER, "0", "60"], HERE)
    return folder


def test_only_the_call_of_torchrun_that_began_a_run_goes_on_with_it_unasked(tmp_path, monkeypatch):
    fit(tiny_recipe(), tmp_path / "run", tiny_source())
    assert not goes_on(Ranks(), tmp_path / "run")  # started for the first time
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert goes_on(Ranks(), tmp_path / "run")
    assert not goes_on(Ranks(), tmp_path / "other")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    assert not goes_on(Ranks(), tmp_path / "run")
