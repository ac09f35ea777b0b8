"""What several processes gain: the optimisers' step shared by who owns what, and long rows shared by a context.

    torchrun --nproc-per-node 2 benchmarks/processes.py --preset nano --length 16384

One thread a process, both sides in turns. *Update*: summing gradients at their owners, moving, and spreading, beside
summing them everywhere and the whole update in each process. *Row*: forward and backward pass of one row of --length
tokens, by all and by the first process alone (the others wait). Medians, and their ratio. Losses are compared first,
to 1e-4; nothing is printed where they differ.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from atma.config import TrainConfig
from atma.mixers.stretches import stretch_of
from atma.model import Model
from atma.presets import preset
from atma.train.allocator import keep_freed_memory
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks, join, sum_over
from atma.train.step import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument(
        "--shares", type=float, nargs="*", default=[], help="of a row for each process (default: equal)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    ranks = join(torch.device("cpu"))
    if ranks.world == 1:
        raise SystemExit("start it by torchrun, with two processes or more")
    model = Model(preset(given.preset), generator(1))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(2)))
    keep_freed_memory()
    update = compared(ranks, given.rounds, *updates(model, ranks))
    alone, together = rows(model, ranks, given.length, given.shares)
    row = compared(ranks, given.rounds, alone if ranks.rank == 0 else lambda: None, together)
    if ranks.rank == 0:
        print(f"{given.preset}, {ranks.world} processes of one thread each, medians of {given.rounds} rounds in turns")
        print(told("update", ("each the whole", "shared"), update))
        print(told(f"row of {given.length:,} tokens", ("alone", "together"), row), flush=True)
    dist.destroy_process_group()


def updates(model: Model, ranks: Ranks) -> tuple[Callable[[], None], Callable[[], None]]:
    train = TrainConfig()
    whole, shared = Optimisers(model, train), Optimisers(model, train, ranks)
    parameters = list(model.parameters())
    gradients = [0.01 * torch.randn(p.shape, generator=generator(3)) for p in parameters]
    owners = shared.owners
    assert owners is not None

    def each() -> None:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in parameters])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
        whole.step(1.0)

    def together() -> None:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        owners.reduce()
        shared.step(1.0)

    return each, together


def rows(model: Model, ranks: Ranks, length: int, shares: list[float]) -> tuple[Callable[[], None], Callable[[], None]]:
    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator(4))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    stretch = stretch_of(ranks.rank, range(ranks.world), None, (1, length), shares)
    some = slice(stretch.start, stretch.seen)
    losses: dict[str, float] = {}

    def alone() -> None:
        model.zero_grad(set_to_none=True)
        loss = model.loss(model(inputs)[0], targets).sum() / length
        loss.backward()
        losses["alone"] = float(loss.detach())

    def together() -> None:
        model.zero_grad(set_to_none=True)
        loss = model.loss(model(inputs[:, some], stretch=stretch)[0], targets[:, some]).sum() / length
        loss.backward()
        total = float(sum_over(ranks, loss.detach()))
        if abs(total - losses.get("alone", total)) > 1e-4:
            raise SystemExit(f"losses differ: {losses['alone']} alone, {total} together")

    return alone, together


def compared(ranks: Ranks, rounds: int, one: Callable[[], None], other: Callable[[], None]) -> tuple[float, float]:
    """Median seconds of each, as the first process finds them."""
    times: list[tuple[float, float]] = []
    for turn in range(rounds + 1):
        both = (seconds(one), seconds(other))
        if turn:  # the first warms up
            times.append(both)
    return statistics.median(x for x, _ in times), statistics.median(x for _, x in times)


def seconds(run: Callable[[], None]) -> float:
    dist.barrier()
    start = time.perf_counter()
    run()
    dist.barrier()
    return time.perf_counter() - start


def told(what: str, names: tuple[str, str], times: tuple[float, float]) -> str:
    first, second = times
    return f"{what}: {names[0]} {1e3 * first:.1f} ms, {names[1]} {1e3 * second:.1f} ms, ratio {second / first:.2f}"


if __name__ == "__main__":
    main()
