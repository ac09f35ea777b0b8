"""Several processes of one run: the same bits as one, rows that they share, and stops that all make."""

import socket
from pathlib import Path

import pytest
import torch
from moving import moved

from atma.train.owners import shared_out
from atma.train.parallel import Ranks, join, sum_over
from atma.weights import load_tensors
from tests.harness.processes import group

HERE = Path(__file__).parent
MESHES = [(3, 1, 3, 1, False), (4, 1, 2, 3, False), (4, 2, 2, 1, False), (4, 4, 2, 2, False), (4, 2, 4, 1, False)]
MESHES += [(2, 1, 1, 3, True), (2, 1, 2, 1, True), (4, 2, 2, 2, True)]
"""Processes, those that share a row, those that share the weights, micro-batches, and whether weights lie elsewhere."""


def test_one_process_alone_sums_nothing():
    ranks = join(torch.device("cpu"))
    assert ranks == Ranks() and ranks.replicas == 1 and list(ranks.peers) == [0]
    assert torch.equal(sum_over(ranks, torch.ones(2)), torch.ones(2))


def test_processes_that_cannot_be_in_groups_are_told():
    with pytest.raises(ValueError, match="'context_ranks' 2: 1 process cannot be in groups of 2; start a multiple"):
        join(torch.device("cpu"), 2)


def test_a_port_in_use_is_told_in_one_line(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": "0"}
        for name, value in settings.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=rf"process 0 does not meet the others at 127.0.0.1:{port}: ") as told:
            join(torch.device("cpu"), hang_seconds=5)
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match="'shard_ranks' 3: 1 process cannot be in groups of 3; start a multiple"):
        monkeypatch.setenv("WORLD_SIZE", "1")
        join(torch.device("cpu"), 1, 3)


def test_who_moves_what_is_shared_equally_by_what_it_costs():
    assert shared_out([5, 4, 3, 3, 3], 2) == [0, 1, 1, 0, 1]
    assert shared_out([1, 1], 4) == [0, 1]
    assert shared_out([], 2) == []


def by_processes(
    world: int,
    folder: Path,
    context: int = 1,
    shard: int = 1,
    dtype: str = "float64",
    accumulation: int = 1,
    offload: bool = False,
) -> dict[str, torch.Tensor]:
    """What `moving` tells of so many processes, which is the same of each but for what it holds."""
    group(world, ["moving.py", *map(str, (folder, context, shard, dtype, accumulation, offload))], HERE)
    told = [load_tensors(folder / f"{rank}.safetensors") for rank in range(world)]
    states = [int(one.pop("state")) for one in told]
    for other in told[1:]:
        assert all(torch.equal(value, other[name]) for name, value in told[0].items())
    return told[0] | {"state": torch.tensor(states)}


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_processes_move_to_the_bits_of_one_with_as_many_micro_batches(world, tmp_path):
    """And each holds its share of the optimisers' state alone."""
    found, whole = by_processes(world, tmp_path, dtype="float32"), moved(Ranks(), world)
    held, all_of_it = found.pop("state"), whole.pop("state")
    for name, value in whole.items():
        assert torch.equal(found[name], value), name
    assert int(held.sum()) == int(all_of_it) and int(held.max()) < 1.5 * int(all_of_it) / world


@pytest.mark.slow
@pytest.mark.parametrize(("world", "context"), [(2, 2), (4, 2), (4, 4), (3, 1)])
def test_processes_that_share_rows_make_the_steps_of_one(world, context, tmp_path):
    found, whole = by_processes(world, tmp_path, context), moved(Ranks(), 1, dtype=torch.float64)
    for name in whole.keys() - {"state"}:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("world", "context", "shard", "accumulation", "offload"),
    [(2, 1, 2, 3, False), *(pytest.param(*one, marks=pytest.mark.slow) for one in MESHES)],
)
def test_processes_that_share_weights_make_the_steps_of_one(world, context, shard, accumulation, offload, tmp_path):
    found = by_processes(world, tmp_path, context, shard, "float64", accumulation, offload)
    whole = moved(Ranks(), 1, dtype=torch.float64)
    held, all_of_it = found.pop("state"), whole.pop("state")
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)
    assert int(held.sum()) == int(all_of_it) and int(held.max()) < 1.5 * int(all_of_it) / world


def test_processes_that_share_weights_in_bfloat16_move_to_the_bits_of_one(tmp_path):
    """With as many micro-batches, of whose gradients there is one sum of two in either order."""
    found, whole = by_processes(2, tmp_path, 1, 2, "bfloat16"), moved(Ranks(), 2, dtype=torch.bfloat16)
    for name in whole.keys() - {"state"}:
        assert torch.equal(found[name], whole[name]), name


STOPPING = """
import sys
from pathlib import Path
import torch
from tiny_run import rows, tiny_recipe, tiny_source
from atma.train.loop import Stopped, fit
from atma.train.parallel import join
ranks, done, out = join(torch.device("cpu")), [0], Path(sys.argv[1]) / "run"
def make(step):
    done[0] = step + 1
    whole = rows(step)
    return type(whole)(*(part.chunk(2)[ranks.rank] for part in whole))
told = []
for stop in (lambda: ranks.rank == 1 and done[0] >= 6, None):
    try:
        fit(tiny_recipe(evaluate_every=0), out, tiny_source(make), ranks=ranks, stop=stop)
    except (Stopped, ValueError) as error:
        told.append(str(error))
(Path(sys.argv[1]) / f"told-{ranks.rank}").write_text("\\n".join(told))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_what_one_process_is_told_stops_all_at_one_step_and_what_one_refuses_all_refuse(tmp_path):
    group(2, ["-c", STOPPING, str(tmp_path)], HERE)
    first, second = ((tmp_path / f"told-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == second[0] == "stopped at step 6 of 12"
    assert first[1] == second[1] and "holds a run already" in first[1]
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000006"
