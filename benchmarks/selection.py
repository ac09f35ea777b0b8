"""What selection policies cost: a decoded token at any length, and reading a prompt, each beside reading every key.

    python benchmarks/selection.py decode --lengths 4096 65536 1048576 --policies top_pages shadows int8
    python benchmarks/selection.py prefill --lengths 16384 65536 --policies top_pages "top_pages page=64 k=8"

A long state is that of a real text of 4,096 tokens told over and over: its keys are real, its cost is that of its
length, and what the model says of it is not looked at. Steps are recorded ones. Every policy takes turns with reading
all keys, on the same text; medians, and the ratio of the two. `--model` as elsewhere; threads by OMP_NUM_THREADS.
"""

import argparse
import statistics
import sysconfig
import time
from pathlib import Path

import torch

import atma
from atma import state as states
from atma.decoding import Decoder
from atma.display import bytes_text

REAL = 4096


def text_of(model: str, count: int) -> torch.Tensor:
    """So many tokens (1, count) of the standard library."""
    loaded = atma.load(model)
    assert loaded.tokenizer is not None
    tokens: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if len(tokens) < count:
            tokens += loaded.tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore"))
    tokens *= -(-count // len(tokens))
    return torch.tensor([tokens[:count]])


def read(model: atma.Model, tokens: torch.Tensor, chunk: int) -> atma.ModelState:
    """The state after the tokens."""
    state = model.init_state(1, tokens.shape[1])
    for part in tokens.split(chunk, 1):
        _, after = model(part, state)
        assert after is not None
        state = after
    return state


def told_over(state: atma.ModelState, length: int, room: int) -> atma.ModelState:
    """The state of a text so long, made of one of REAL tokens told again and again, with `room` for more."""

    def change(leaf: states.Leaf) -> torch.Tensor:
        x = leaf.tensor
        if leaf.name == states.LENGTH:
            return torch.full_like(x, length)
        if leaf.axis is None:
            return x.clone()
        shape = list(x.shape)
        shape[leaf.axis] = length + room
        found = x.new_zeros(shape)
        for at in range(0, length, REAL):
            count = min(REAL, length - at)
            found.narrow(leaf.axis, at, count).copy_(x.narrow(leaf.axis, 0, count))
        return found

    return states.replaced(state, change)


class Side:
    """A model read through one policy, or None."""

    def __init__(self, name: str, policy: str | None) -> None:
        self.policy = policy
        self.model = atma.load(name, select=policy).model

    def decoder(self, tokens: torch.Tensor, length: int, room: int) -> Decoder:
        """Where a token is decoded after so many."""
        with torch.inference_mode():
            return Decoder(self.model, told_over(read(self.model, tokens[:, :REAL], 1024), length, room))


def seconds(work) -> float:
    """What it takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(whole: Decoder, other: Decoder, token: torch.Tensor, turns: int) -> tuple[float, float]:
    """Median seconds of a step of each, after three that are not counted."""
    times = [(seconds(lambda: whole.step(token)), seconds(lambda: other.step(token))) for _ in range(turns + 3)][3:]
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return first, second


def decode(arguments: argparse.Namespace) -> None:
    """The table of decoded tokens."""
    tokens = text_of(arguments.model, REAL)
    plain, token = Side(arguments.model, None), tokens[:, :1]
    print("| keys | policy | ms a token | all keys, in turns | ratio | held | step |")
    print("| ---: | --- | ---: | ---: | ---: | ---: | --- |")
    for length in arguments.lengths:
        whole = plain.decoder(tokens, length, (arguments.turns + 3) * len(arguments.policies))
        for policy in arguments.policies:
            other = Side(arguments.model, policy).decoder(tokens, length, arguments.turns + 3)
            all_keys, own = in_turns(whole, other, token, arguments.turns)
            held = bytes_text(states.nbytes(other.state))
            cells = f"{own * 1e3:.2f} | {all_keys * 1e3:.2f} | {all_keys / own:.2f} | {held} | {other.how}"
            print(f"| {length:,} | `{policy}` | {cells} |", flush=True)


def prefill(arguments: argparse.Namespace) -> None:
    """The table of prompts."""
    sides = [Side(arguments.model, policy) for policy in (None, *arguments.policies)]
    print("| tokens | policy | seconds | tokens a second | ratio |\n| ---: | --- | ---: | ---: | ---: |")
    for length in arguments.lengths:
        tokens = text_of(arguments.model, length)
        times: dict[str | None, list[float]] = {side.policy: [] for side in sides}
        for _ in range(arguments.turns):
            for side in sides:
                with torch.inference_mode():
                    times[side.policy].append(seconds(lambda: read(side.model, tokens, arguments.chunk)))  # noqa: B023
        first = statistics.median(times[None])
        for policy, found in times.items():
            own = statistics.median(found)
            told = "all keys" if policy is None else f"`{policy}`"
            print(f"| {length:,} | {told} | {own:.1f} | {length / own:,.0f} | {first / own:.2f} |", flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("decode", "prefill"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 65_536])
    parser.add_argument("--policies", nargs="+", default=["top_pages", "shadows", "int8"])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--chunk", type=int, default=1024)
    arguments = parser.parse_args()
    {"decode": decode, "prefill": prefill}[arguments.what](arguments)


if __name__ == "__main__":
    main()
