"""What it costs and saves to compile blocks, and to compute some of them again.

    python benchmarks/blocks.py --presets nano small --threads 1

Both passes of one micro-batch in float32, all sides in turns, medians: seconds by the clock and of the processor, the
ratio to blocks as they are (of processor time with one thread, else by the clock), and the MiB that autograd keeps
between the passes. Compiling counts apart: seconds of the first turn. Prints nothing where losses or gradients differ.
"""

import argparse
import time
from statistics import median

import torch
from torch import nn

from atma.config import TrainConfig, preset
from atma.data.batches import Batch
from atma.model import Model
from atma.plan.activations import saved_bytes
from atma.train.optim import Optimisers
from atma.train.parallel import Ranks
from atma.train.step import Stepper, generator

SIDES = {
    "blocks as they are": {},
    "`compile`": {"compile": True},
    "`checkpointing`": {"checkpointing": True},
    "`checkpointing`, `checkpointing_every = 2`": {"checkpointing": True, "checkpointing_every": 2},
    "`checkpointing`, `checkpointing_every = 4`": {"checkpointing": True, "checkpointing_every": 4},
}


class Side:
    """Both passes of one batch, over and over."""

    def __init__(self, name: str, rows: int, length: int, changes: dict) -> None:
        train, model = (
            TrainConfig(length=length, batch_tokens=rows * length, **changes),
            Model(preset(name), generator(0)),
        )
        nn.init.normal_(model.head.weight, std=0.02, generator=generator(2))
        for block in model.blocks:
            for number, weight in enumerate(block.parameters()):
                weight.data.add_(0.02 * torch.randn(weight.shape, generator=generator(3, number)))
        ids = torch.randint(model.config.vocab_size, (rows, length + 1), generator=generator(1))
        self.batch = Batch(ids[:, :-1], ids[:, 1:].clone(), torch.zeros(rows, length, dtype=torch.int32))
        self.stepper = Stepper(model, Optimisers(model, train), train, torch.float32, Ranks())
        self.wall, self.processor = list[float](), list[float]()
        began = time.perf_counter()
        self.loss = float(self.stepper.passes(0, self.batch)["loss"])
        self.first = time.perf_counter() - began
        self.gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        self.kept = saved_bytes(lambda: self.stepper.hidden(self.batch.tokens, self.batch.segment_ids), model)

    def turn(self) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.stepper.passes(0, self.batch)
        self.wall.append(time.perf_counter() - wall)
        self.processor.append(time.process_time() - processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "small"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.presets:
        sides = {side: Side(name, given.rows, given.length, changes) for side, changes in SIDES.items()}
        plain = next(iter(sides.values()))
        for side, one in sides.items():
            error = float((one.gradients - plain.gradients).norm() / plain.gradients.norm())
            if not (abs(one.loss - plain.loss) < 1e-4 and error < 1e-4):
                raise SystemExit(f"{side}: loss {one.loss}, not {plain.loss}; gradients differ by {error:.1e}")
        for one in sides.values():
            one.gradients = torch.empty(0)
        for _ in range(given.rounds):
            for one in sides.values():
                one.turn()
        show(f"{name}, {given.rows} × {given.length} tokens, {given.threads} thread(s)", sides, given.threads)


def show(title: str, sides: dict[str, Side], threads: int) -> None:
    print(f"\n{title}\n\n| side | clock | processor | ratio | kept between the passes | first turn |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    plain = next(iter(sides.values()))
    for name, one in sides.items():
        times, before = (one.processor, plain.processor) if threads == 1 else (one.wall, plain.wall)
        ratio = median(a / b for a, b in zip(times, before, strict=True))
        clock, processor = median(one.wall), median(one.processor)
        mib = one.kept / 2**20
        print(
            f"| {name} | {clock:.3f} s | {processor:.3f} s | {ratio:.2f} | {mib:.0f} MiB | {one.first:.1f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
