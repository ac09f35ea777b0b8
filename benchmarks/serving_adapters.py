"""What adapters cost: tokens a second of texts with and without them, in turns, by processor time; ratios of a step.

    python benchmarks/serving_adapters.py --rounds 6

Adapters of random numbers on every projection of every block. Of `mixed` each text has one of four, in turn.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

import torch
from serving_harness import begin, option_parser
from torch import nn

from atma.model import Model
from atma.ops.low_rank import Factors
from atma.serve import Engine, EngineConfig, Request
from atma.serve.adapters import Adapter
from atma.tokenizer import Tokenizer

BEGUN = 6
"""Steps that are not timed: prompts are read, and a step is recorded."""
KINDS = {"none loaded": (), "4, none named": (None,), "1, all name it": ("a0",), "4, mixed": ("a0", "a1", "a2", "a3")}
"""What texts name in turn; without anything to name the engine has no adapters."""
COMPARED = list(KINDS)[1:]


def drawn(model: Model, name: str, rank: int, seed: int) -> Adapter:
    generator, found = torch.Generator().manual_seed(seed), dict[str, Factors]()
    layers = {n: m for n, m in model.blocks.named_modules(prefix="blocks") if isinstance(m, nn.Linear)}
    for layer, module in layers.items():
        a = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
        found[layer] = Factors(a, torch.randn(module.out_features, rank, generator=generator) * 0.01)
    return Adapter(name, found, name)


def engine_of(model: Model, tokenizer: Tokenizer, kind: str, rank: int) -> Engine:
    count = {"none loaded": 0, "1, all name it": 1}.get(kind, 4)
    adapters = [drawn(model, f"a{i}", rank, i) for i in range(count)]
    return Engine(model, tokenizer, EngineConfig(512 << 20, 0), adapters=adapters)


def seconds(engine: Engine, kind: str, options: argparse.Namespace, streams: int, seed: int) -> float:
    """Processor time of a step that writes so many answers."""
    asked = Request("", max_tokens=options.tokens, ignore_end=True)
    worn = KINDS[kind] or (None,)
    each = [
        dataclasses.replace(asked, prompt=f"# {i}\n", seed=seed + i, adapter=worn[i % len(worn)])
        for i in range(streams)
    ]
    handles = [engine.submit(request) for request in each]
    for _ in range(BEGUN):
        engine.step()
    began = time.process_time()
    while not all(handle.done for handle in handles):
        engine.step()
    return (time.process_time() - began) / (options.tokens - BEGUN)


def reading(engine: Engine, kind: str, tokens: int, streams: int) -> float:
    """Processor time of reading so many prompts of random tokens."""
    generator, worn = torch.Generator().manual_seed(0), KINDS[kind] or (None,)
    began = time.process_time()
    prompts = torch.randint(0, engine.tokenizer.vocab_size, (streams, tokens), generator=generator).tolist()
    handles = [
        engine.submit(Request(prompt, max_tokens=1, adapter=worn[i % len(worn)])) for i, prompt in enumerate(prompts)
    ]
    while not all(handle.done for handle in handles):
        engine.step()
    return time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=150, help="of each answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args(arguments)
    loaded = begin(options, f"rank {options.rank}")
    assert loaded.tokenizer is not None
    engines = {kind: engine_of(loaded.model, loaded.tokenizer, kind, options.rank) for kind in KINDS}
    rows: dict[str, dict[str, list[float]]] = {}
    for streams in options.streams:
        found = {kind: list[float]() for kind in KINDS}
        for seed in range(options.rounds + 1):  # the first is not counted
            for kind, engine in engines.items():
                found[kind].append(seconds(engine, kind, options, streams, seed))
        rows[f"writing, {streams} streams"] = {kind: times[1:] for kind, times in found.items()}
    found = {kind: list[float]() for kind in KINDS}
    for _ in range(options.rounds + 1):
        for kind, engine in engines.items():
            found[kind].append(reading(engine, kind, 512, 4))
    rows["reading 4 prompts of 512 tokens"] = {kind: times[1:] for kind, times in found.items()}
    print(f"| a step takes, times | {' | '.join(COMPARED)} |\n|---|---|---|---|")
    for told, times in rows.items():
        plain = times["none loaded"]
        ratios = [statistics.median(b / a for a, b in zip(plain, times[kind], strict=True)) for kind in COMPARED]
        print(f"| {told} | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
