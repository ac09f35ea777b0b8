"""Threads and waiting on a quiet and on a busy machine: seconds of a training step of nano, of reading, of decoding.

    nice -n -15 python benchmarks/threads.py --loads 0 1 4

A child process for each setting of threads and of how a thread waits (libgomp's, read once when it is loaded); the
children take turns, A B C A B C …, beside so many processes that count. Medians, and ratios to one thread.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

WAITS: dict[str, dict[str, str]] = {
    "as it is": {},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "1,000 spins": {"GOMP_SPINCOUNT": "1000"},
    "3,000 spins": {"GOMP_SPINCOUNT": "3000"},
    "10,000 spins": {"GOMP_SPINCOUNT": "10000"},
    "30,000 spins": {"GOMP_SPINCOUNT": "30000"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loads", type=int, nargs="+", default=[0, 1, 4], help="processes that count beside it")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="compared with one")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return work()
    settings = {"1 thread": {"OMP_NUM_THREADS": "1"}}
    for name, extra in WAITS.items():
        settings[f"{asked.threads} threads, {name}"] = {"OMP_NUM_THREADS": str(asked.threads)} | extra
    children = {name: start(extra) for name, extra in settings.items()}
    try:
        for load in asked.loads:
            with counting(load):
                show(load, {name: [] for name in settings}, children, asked.rounds)
    finally:
        for child in children.values():
            assert child.stdin is not None
            child.stdin.close()
            child.wait()


def start(extra: dict[str, str]) -> subprocess.Popen:
    """A child that has warmed up."""
    command = [sys.executable, __file__, "--child"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | extra, bufsize=1
    )
    assert child.stdout is not None
    child.stdout.readline()
    return child


@contextmanager
def counting(load: int) -> Iterator[None]:
    """So many processes beside it that never rest."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(load)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def show(load: int, found: dict[str, list[list[float]]], children: dict[str, subprocess.Popen], rounds: int) -> None:
    """One table: medians of each kind of work in milliseconds, and times faster than with the first setting."""
    for _ in range(rounds):
        for name, child in children.items():
            print("go", file=child.stdin, flush=True)
            assert child.stdout is not None
            found[name].append([float(x) for x in child.stdout.readline().split()])
    print(f"\n{load} busy processes beside it ({os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}), {rounds} rounds")
    print(f"{'':24}{'training step':>22}{'1,024 tokens read':>22}{'token written':>22}")
    first: list[float] = []
    for name, samples in found.items():
        medians = [statistics.median(column) for column in zip(*samples, strict=True)]
        first = first or medians
        cells = [f"{1e3 * x:.1f} ms ({base / x:.2f}×)" for x, base in zip(medians, first, strict=True)]
        print(f"{name:24}{''.join(f'{cell:>22}' for cell in cells)}", flush=True)


def work() -> None:
    """The child: do each kind of work once a line, and write its seconds."""
    import torch

    from atma.config import TrainConfig, preset
    from atma.data.batches import Batch
    from atma.decoding import Decoder
    from atma.model import Model
    from atma.train.optim import Optimisers
    from atma.train.parallel import Ranks
    from atma.train.step import Stepper, generator

    config, train = preset("nano"), TrainConfig(batch_tokens=4096)
    model = Model(config, generator(2))
    ids = torch.randint(config.vocab_size, (16, 257), generator=generator(1))
    batch = Batch(ids[:, :-1], ids[:, 1:].clone(), torch.zeros(16, 256, dtype=torch.int32))
    stepper = Stepper(model, Optimisers(model, train), train, torch.bfloat16, Ranks())
    reader = Model(config, generator(2))
    long = torch.randint(config.vocab_size, (1, 4096), generator=generator(3))

    def read() -> None:
        with torch.inference_mode():
            state = reader.init_state(1, 4096)
            for chunk in long.split(1024, 1):
                _, state = reader(chunk, state)

    decoder = Decoder(reader, reader.init_state(1, 65_536))

    def write() -> None:
        for _ in range(32):
            decoder.step(ids[:1, :1])

    jobs = ((lambda: stepper(0, batch, 1.0), 1), (read, 4), (write, 32))
    for job, _ in jobs:
        job()
        job()
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds = []
        for job, count in jobs:
            began = time.perf_counter()
            job()
            seconds.append((time.perf_counter() - began) / count)
        print(*seconds, flush=True)


if __name__ == "__main__":
    main()
