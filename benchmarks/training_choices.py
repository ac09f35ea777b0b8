"""What two choices in the trainer are worth here: Muon in float32, and computing in bfloat16.

    python benchmarks/training_choices.py
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/training_choices.py      # as on a CPU without bfloat16 instructions

One thread, processor time, both sides interleaved, medians. Refuses to print a table when the two sides disagree.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from statistics import median

import torch
from torch import nn

from atma.config import TrainConfig, preset
from atma.data.batches import Batch
from atma.model import Model
from atma.train.optim import Muon, Optimisers, parameter_groups
from atma.train.parallel import Ranks
from atma.train.precision import cpu_multiplies_bfloat16
from atma.train.step import Stepper, generator

ROWS, LENGTH = 8, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, bf16 {cpu_multiplies_bfloat16()}")
    show("Muon, one step of the nano model", muons(), repeats)
    for name in ("nano-test", "nano"):
        show(f"forward and backward of {name}, {ROWS * LENGTH} tokens", steppers(name), repeats)


def muons() -> dict[str, Callable[[], object]]:
    """One step of each Muon on the matrices of the nano model; they must agree to the precision of bfloat16."""
    settings = {"lr": 1e-3, "weight_decay": 0.0, "momentum": 0.95}
    steps, moved = {}, {}
    for name, rule in (("torch.optim.Muon", torch.optim.Muon), ("float32", Muon)):
        matrices = list(parameter_groups(Model(preset("nano"), generator(0)))["matrix"].values())
        for number, matrix in enumerate(matrices):
            nn.init.zeros_(matrix)
            matrix.grad = torch.randn(matrix.shape, generator=generator(number))
        steps[name] = rule([{"params": matrices}], **settings).step
        steps[name]()
        moved[name] = torch.cat([matrix.detach().flatten() for matrix in matrices])
    agree(*moved.values(), tolerance=15 * 2**-9)
    return steps


def steppers(name: str) -> dict[str, Callable[[], object]]:
    """The backward pass of the same batch in either compute type; gradients must agree to bfloat16's precision."""
    train, config = TrainConfig(), preset(name)
    ids = torch.randint(config.vocab_size, (ROWS, LENGTH + 1), generator=generator(1))
    segments = torch.zeros(ROWS, LENGTH, dtype=torch.int32)
    batch = Batch(ids[:, :-1], ids[:, 1:].clone(), segments)
    steps, gradients = {}, {}
    for compute in (torch.float32, torch.bfloat16):
        model = Model(config, generator(0))
        nn.init.normal_(model.head.weight, std=0.02, generator=generator(2))
        stepper = Stepper(model, Optimisers(model, train), train, compute, Ranks())
        steps[str(compute).removeprefix("torch.")] = lambda stepper=stepper: stepper.passes(0, batch)
        stepper.passes(0, batch)
        gradients[compute] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    agree(*gradients.values(), tolerance=0.05)
    return steps


def agree(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> None:
    error = ((a - b).norm() / a.norm()).item()
    if not error < tolerance:
        raise SystemExit(f"no table: the two sides differ by {error:.3f} of their size, more than {tolerance:.3f}")


def show(title: str, sides: Mapping[str, Callable[[], object]], repeats: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            began = time.process_time()
            work()
            seconds[name].append(time.process_time() - began)
    first, second = (median(values) for values in seconds.values())
    times = ", ".join(f"{name} {1e3 * median(values):.1f} ms" for name, values in seconds.items())
    print(f"{title}: {times}, ratio {first / second:.2f}")


if __name__ == "__main__":
    main()
