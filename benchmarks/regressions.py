"""Is a change slower? Two checkouts of the sources, or one in two environments, take turns on one machine; medians, and
their ratios.

    python benchmarks/regressions.py base/src src --turns 9 --most 1.15
    python benchmarks/regressions.py DIR DIR --environments ATMA_NATIVE=compile ATMA_NATIVE=packaged

A child process for each checkout is warm before anything is timed, and each turn times both, in alternating order.
What is timed: tokens written by nano, a prompt of 4,096 tokens read, a training step of nano, and the command's start.
Status 1 if one of them takes more than --most times as long with the second checkout.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="*", help="two folders: before, after")
    parser.add_argument(
        "--environments", nargs=2, default=("", ""), metavar="KEY=VALUE", help="a variable of each side"
    )
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--most", type=float, default=1.15, help="the largest ratio that passes")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        return child()
    if len(asked.sources) != 2 or not all((source / "atma").is_dir() for source in asked.sources):
        parser.error("name two folders that hold atma/, such as base/src src")
    children = [start(source.resolve(), one) for source, one in zip(asked.sources, asked.environments, strict=True)]
    names = children[0].stdout.readline().split()  # pyright: ignore[reportOptionalMemberAccess]
    children[1].stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
    seconds = {name: ([], []) for name in names}
    for turn in range(asked.turns):
        for name in names:
            for side in (0, 1) if turn % 2 else (1, 0):
                seconds[name][side].append(ask(children[side], name))
    print(f"{'median of ' + str(asked.turns):24} {'before, ms':>12} {'after, ms':>12} {'ratio':>7}")
    slow = False
    for name, sides in seconds.items():
        before, after = map(statistics.median, sides)
        slow |= after > asked.most * before
        print(f"{name:24} {1e3 * before:12.2f} {1e3 * after:12.2f} {after / before:7.2f}")
    return int(slow)


def start(source: Path, variable: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    environment |= dict([variable.split("=", 1)]) if variable else {}
    command = [sys.executable, __file__, "--child"]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, bufsize=1
    )


def ask(process: subprocess.Popen, name: str) -> float:
    print(name, file=process.stdin)
    return float(process.stdout.readline())  # pyright: ignore[reportOptionalMemberAccess]


def child() -> int:
    """Time what is asked for by name, line by line."""
    measures = prepared()
    for measure in measures.values():
        measure()
    print(*measures, flush=True)
    for line in sys.stdin:
        begun = time.perf_counter()
        measures[line.strip()]()
        print(time.perf_counter() - begun, flush=True)
    return 0


def prepared() -> dict[str, Callable[[], object]]:
    import torch

    import atma
    from atma.decoding import Decoder

    model = atma.load("nano").model
    prompt = torch.randint(0, 1024, (1, 4096))
    token = prompt[:, :1]

    @torch.inference_mode()
    def decode() -> None:
        decoder = Decoder(model, model.init_state(1, 256))
        for _ in range(64):
            decoder.step(token)

    @torch.inference_mode()
    def prefill() -> None:
        model(prompt, model.init_state(1, 4096))

    rows = prompt.view(16, 256)

    def train() -> None:
        model.zero_grad()
        hidden, _ = model(rows[:, :-1])
        torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1).float(), rows[:, 1:].flatten()).backward()

    def command() -> None:
        subprocess.run([sys.executable, "-m", "atma", "--help"], stdout=subprocess.DEVNULL, check=True)

    return {"write_64_tokens": decode, "read_4096_tokens": prefill, "train_16x255": train, "atma_--help": command}


if __name__ == "__main__":
    sys.exit(main())
