"""Training and decoding speed of a preset beside what the machine can do, float32 and bfloat16.

The machine's rate is the best of square matrix products; a training token costs 6 operations a parameter. Decoding
reads from a state filled to each context length with random keys, values and memory: its time does not depend on them.

    python benchmarks/speed.py --preset nano --contexts 1024 65536
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from atma.config import TrainConfig, preset
from atma.model import Model
from atma.state import transform
from atma.train.optim import Optimisers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def median_seconds(call: Callable[[], object], repeats: int) -> float:
    """Median wall time of `call` after one warm-up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def product_rate(dtype: torch.dtype, repeats: int) -> float:
    """Operations per second of the fastest of three square products."""
    best = 0.0
    for size in (1024, 2048, 3072):
        a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
        best = max(best, 2 * size**3 / median_seconds(lambda a=a, b=b: a @ b, repeats))
    return best


def training_seconds(name: str, dtype: torch.dtype, length: int, rows: int, repeats: int) -> float:
    """Seconds of a whole optimiser step on rows × length tokens."""
    config = preset(name)
    model = Model(config, torch.Generator().manual_seed(0))
    optimisers = Optimisers(model, TrainConfig(length=length, batch_tokens=rows * length))
    tokens = torch.randint(0, config.vocab_size, (rows, length + 1))
    ids = torch.zeros(rows, length, dtype=torch.int32)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            hidden, _ = model(tokens[:, :-1], segment_ids=ids)
            loss = model.loss(hidden, tokens[:, 1:]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimisers.step(1.0)

    return median_seconds(step, repeats)


@torch.inference_mode()
def decoding_seconds(name: str, dtype: torch.dtype, context: int, repeats: int) -> float:
    """Seconds per token at a context of `context` tokens, greedy choice included."""
    model = Model(preset(name), torch.Generator().manual_seed(0)).to(dtype)
    state = transform(model.init_state(1, context + repeats + 2), lambda field, x: fill(field, x, context))
    held = [torch.zeros(1, 1, dtype=torch.long), state]

    def step() -> None:
        hidden, held[1] = model(held[0], held[1])
        held[0] = model.logits(hidden[:, -1:]).argmax(-1)

    return median_seconds(step, repeats)


def fill(field: str, x: torch.Tensor, context: int) -> torch.Tensor:
    return torch.full_like(x, context) if field == "length" else torch.randn_like(x) * 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    parameters = sum(p.numel() for p in Model(preset(options.preset)).parameters())
    print(f"{options.preset}: {parameters:,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for name, dtype in DTYPES.items():
        rate = product_rate(dtype, options.repeats)
        seconds = training_seconds(options.preset, dtype, options.length, options.rows, options.repeats)
        speed = options.rows * options.length / seconds
        share = 6 * parameters * speed / rate
        print(f"{name:9} products {rate / 1e9:6.0f} GFLOP/s · training {speed:7,.0f} tokens/s, {share:.0%} of them")
    for name, dtype in DTYPES.items():
        for context in options.contexts:
            seconds = decoding_seconds(options.preset, dtype, context, 20 * options.repeats)
            print(f"{name:9} decoding at {context:7,} tokens: {1 / seconds:6.1f} tokens/s ({seconds * 1e3:.2f} ms)")


if __name__ == "__main__":
    main()
