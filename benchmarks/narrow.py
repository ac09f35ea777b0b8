"""What weights in 8 and 4 bits cost in loss and save in time, beside float32 and bfloat16.

    python benchmarks/narrow.py quality                        # nano, held-out files of the standard library
    python benchmarks/narrow.py speed --presets nano base      # random weights, one thread

`quality` reads whole documents, and as much of each in pieces of the training length, and tells the change of bits per
byte against the first side for the same documents: mean and 95% interval of Student over documents; and how far the
weights of the layers in 4 bits are off, as a share of their root mean square. `speed` takes a token (or a prompt) of
each side in turn, and tells the median of processor time and its ratio to the side `--to`, with those between which
half of the rounds are.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from narrow_rounding import PIECE, WAYS, large, round_weights

from atma.bench.models import Ours
from atma.config import preset
from atma.data.dataset import TokenSet
from atma.eval.held_out import open_text
from atma.loading import load
from atma.model import Model
from atma.narrow import narrow_bytes, narrow_layers
from atma.ops.narrow import Width, widened
from atma.statistics import mean_interval

SIDES: dict[str, tuple[torch.dtype, Width | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8": (torch.float32, "int8"),
    "int4": (torch.float32, "int4"),
}
CPU = torch.device("cpu")


def documents(texts: TokenSet, length: int, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first tokens of as many documents, those that are long enough; and of the other documents."""
    all_ = [np.asarray(texts.document(i))[: length + 1] for i in range(texts.documents)]
    whole = [tokens for tokens in all_ if len(tokens) > length]
    if len(whole) < count:
        raise ValueError(f"only {len(whole)} documents have more than {length} tokens, not {count}")
    read = whole[:count]
    return read, [tokens for tokens in all_ if len(tokens) >= PIECE and not any(tokens is one for one in read)]


def made(path: str, side: str, others: list[np.ndarray]) -> tuple[Model, int, float]:
    """The model of a side, the bytes that it holds, and how far its weights are off."""
    dtype, width = SIDES.get(side, (torch.float32, None))
    model = load(path, dtype, weights=width).model
    held = narrow_bytes(model) + sum(one.nbytes for one in model.parameters())
    if side in WAYS:
        held = round_weights(model, WAYS[side], others)
    now = {name: one.weight.detach() for name, one in large(model).items()}
    now |= {name: widened(one.codes_held) for name, one in narrow_layers(model).items()}
    off = of = 0.0
    for name, layer in large(load(path, torch.float32).model).items():
        off += float((now[name].float() - layer.weight.detach()).square().sum())
        of += float(layer.weight.detach().square().sum())
    return model, held, math.sqrt(off / of)


@torch.inference_mode()
def nats(model: Model, tokens: np.ndarray, piece: int) -> float:
    """Of a document, in pieces that know nothing of each other; one piece is the whole."""
    row, total = torch.from_numpy(tokens.astype(np.int64)), 0.0
    for first in range(0, len(row) - 1, piece):
        state = model.init_state(1, piece)
        for start in range(first, min(first + piece, len(row) - 1), 1024):
            stop = min(start + 1024, first + piece, len(row) - 1)
            hidden, state = model(row[None, start:stop], state)
            total += float(model.loss(hidden, row[None, start + 1 : stop + 1]).double().sum())
    return total


def quality(arguments: argparse.Namespace) -> None:
    loaded = load(arguments.model)
    trained, tokenizer = arguments.trained or loaded.trained_length, loaded.tokenizer
    if trained is None or tokenizer is None:
        raise SystemExit(f"{arguments.model}: says no training length or has no tokenizer; give --trained, or another")
    length = trained * arguments.times
    texts, others = documents(open_text(loaded, arguments.data), length, arguments.documents)
    size = [len(tokenizer.decode(tokens[1:].tolist()).encode()) for tokens in texts]
    before: dict[int, list[float]] = {}
    for name in arguments.sides:
        model, held, off = made(arguments.model, name, others)
        told = [f"{held:,} bytes, weights off by {100 * off:.2f}%"]
        for piece in (trained, length):
            bits = [nats(model, one, piece) / math.log(2) / count for one, count in zip(texts, size, strict=True)]
            start = before.setdefault(piece, bits)
            change = [100 * (after / b - 1) for after, b in zip(bits, start, strict=True)]
            mean, low, high = interval(change)
            told.append(f"{statistics.mean(bits):.4f} bits a byte, {mean:+.3f}% ({low:+.3f} to {high:+.3f})")
        print(f"{name}: {told[0]}; 1×: {told[1]}; {arguments.times}×: {told[2]}", flush=True)


def interval(change: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval of Student."""
    found = mean_interval(change)
    assert found.t_low is not None and found.t_high is not None
    return found.value, found.t_low, found.t_high


def speed(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    for name in arguments.presets:
        config = preset(name)
        for kind in arguments.kinds:
            calls: dict[str, Callable[[], object]] = {}
            for side in arguments.sides:
                dtype, width = SIDES[side]
                ours = Ours(config, "auto", dtype, CPU, width)
                make = ours.decoder if kind == "decode" else ours.prefill
                calls[side] = make(1, arguments.tokens)[0]
            found = timed(calls, arguments.rounds)
            _told(f"{name} {kind}", found, 1 if kind == "decode" else arguments.tokens, arguments.to)


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of processor time of each call in each round, after two that are not told."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 2):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if round_ > 1:
                found[name].append(time.process_time() - began)
    return found


def _told(what: str, found: dict[str, list[float]], tokens: int, to: str) -> None:
    for name, seconds in found.items():
        ratios = sorted(b / a for a, b in zip(seconds, found[to], strict=True))
        quarter = len(ratios) // 4
        middle, spread = statistics.median(ratios), f"{ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}"
        rate = tokens / statistics.median(seconds)
        print(f"{what}, {name}: {rate:,.1f} tokens/s, × {to} {middle:.2f} (half of the rounds {spread})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    one = kinds.add_parser("quality", help="loss at the training length and far beyond")
    one.add_argument("--model", default="nano", help="a packaged model or a model folder")
    one.add_argument("--data", type=Path, help="made by `atma prepare`; by default as `atma eval lengths`")
    one.add_argument("--trained", type=int, help="the training length, where the folder does not say: a checkpoint's")
    one.add_argument("--times", type=int, default=64, help="how many training lengths a document is read for")
    one.add_argument("--documents", type=int, default=8)
    one.set_defaults(run=quality)
    one = kinds.add_parser("speed", help="a token at a context, and a prompt")
    one.add_argument("--presets", nargs="+", default=["nano", "base"])
    one.add_argument("--kinds", nargs="+", default=["decode", "prefill"], choices=["decode", "prefill"])
    one.add_argument("--tokens", type=int, default=1024, help="of the context, and of the prompt")
    one.add_argument("--rounds", type=int, default=30)
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--to", default="bfloat16", choices=SIDES, help="the side that the ratios are to")
    one.set_defaults(run=speed)
    for name, one in kinds.choices.items():
        ways = WAYS if name == "quality" else {}
        one.add_argument("--sides", nargs="+", default=list(SIDES), choices=[*SIDES, *ways])
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
