import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_run import rows, tiny_model, tiny_recipe

from atma.model import Model
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, join, sum_gradients, sum_over
from atma.train.step import Stepper, generator
from atma.weights import load_tensors

TWO = """
import sys
import torch
from safetensors.torch import save_file
from test_parallel import moved_weights
from atma.train.parallel import join
ranks = join(torch.device("cpu"))
loss, weights = moved_weights(ranks)
save_file(weights | {"loss": loss}, f"{sys.argv[1]}/{ranks.rank}.safetensors")
torch.distributed.destroy_process_group()
"""


def moved_weights(ranks: Ranks) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of the second step, and the weights after two, of this process's share of the rows."""
    train = tiny_recipe().train
    model = Model(tiny_model(), generator(1)).double()
    stepper = Stepper(model, Optimisers(model, train), train, torch.float32, ranks)
    for step in range(2):
        whole = rows(step)
        share = type(whole)(*(part.chunk(ranks.world)[ranks.rank] for part in whole))
        outcome = stepper(step, share, 1.0)
    return torch.tensor(outcome.loss, dtype=torch.float64), model.state_dict()


def test_one_process_alone_sums_nothing():
    ranks, value = join(torch.device("cpu")), torch.ones(2, requires_grad=True)
    value.grad = torch.ones(2)
    sum_gradients(ranks, [value])
    assert ranks == (0, 1) and torch.equal(sum_over(ranks, torch.ones(2)), torch.ones(2))
    assert torch.equal(value.grad, torch.ones(2))


@pytest.mark.slow
def test_two_processes_make_the_step_of_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO, str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, cwd=Path(__file__).parent)
        for rank in range(2)
    ]
    assert [process.wait(timeout=600) for process in processes] == [0, 0]
    first, second = (load_tensors(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    loss, weights = moved_weights(Ranks())
    # Gradients travel in float32, 6e-8 of their size; AdamW's first steps are near the sign of the gradient.
    torch.testing.assert_close(first["loss"], loss, rtol=1e-6, atol=0)
    for name, value in weights.items():
        torch.testing.assert_close(first[name], value, rtol=0, atol=2e-5)


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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", STOPPING, str(tmp_path)]
    processes = [
        subprocess.Popen(command, env=os.environ | group | {"RANK": str(rank)}, cwd=Path(__file__).parent)
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    first, second = ((tmp_path / f"told-{rank}").read_text().splitlines() for rank in range(2))
    assert first[0] == second[0] == "stopped at step 6 of 12"
    assert "holds a run already" in first[1] and "the first process could not take the run folder" in second[1]
    assert sorted(entry.name for entry in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step-00000006"
