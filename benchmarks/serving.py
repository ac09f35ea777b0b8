"""Serving, measured: are answers those of a cold read, and how many tokens a second come out of how many streams.

    python benchmarks/serving.py exact --model nano --answers 2000
    python benchmarks/serving.py exact --traces 5000 --other-traces 300
    python benchmarks/serving.py throughput --model nano --streams 1 8 32
    python benchmarks/serving.py invariance --requests 1000
    python benchmarks/serving.py reuse | turns | chats | readers | peers | http | overload | clients | lm_eval  # --help

`exact` holds random conversations with an engine short of memory and counts the answers whose tokens or
log-probabilities differ from those of a cold read in one call; with `--traces` it holds many short ones at once, and
counts the bytes that are held after every step. With ATMA_NATIVE=off it counts how often the engine in plain PyTorch,
which is equal up to rounding alone, differs. `throughput` compares the engine's streams with `atma.generation`, one
text at a time, interleaved. `invariance` answers the same requests alone and in changing batches up to 32, for a random
`nano-test` and for `nano`.
Times are processor times of one process, in its own threads; a run on one thread is not disturbed by other processes.
Exit status: 0; 1 where an exact engine's answer differs.
"""

import argparse
import dataclasses
import importlib
import statistics
import sys
import tempfile
import time
from pathlib import Path

from serving_harness import (
    Cold,
    Trace,
    alone,
    begin,
    differences,
    option_parser,
    own_source,
    random_requests,
    speaking,
    together,
)

from atma.config import preset
from atma.generation import Generation
from atma.loading import Loaded
from atma.serve import Engine, EngineConfig, Request
from atma.settings import Settings
from atma.tokenizer import byte_tokenizer

ELSEWHERE = ("reuse", "turns", "chats", "readers", "peers", "http", "overload", "clients", "lm_eval")
PROMPT = "def main():\n    import os\n"


def main() -> int:
    if len(sys.argv) > 1 and sys.argv[1] in ELSEWHERE:
        return importlib.import_module(f"serving_{sys.argv[1]}").main(sys.argv[2:])
    options = _options()
    loaded = begin(options)
    parts = {"exact": exact, "throughput": throughput, "invariance": invariance}
    return parts[options.part](loaded, options)


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("part", choices=["exact", "throughput", "invariance", *ELSEWHERE])
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--traces", type=int, default=0, help="of exact: so many short conversations instead")
    parser.add_argument("--other-traces", type=int, default=0, help="of exact: and so many with each random model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tokens", type=int, default=200, help="tokens of each stream")
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def exact(loaded: Loaded, options: argparse.Namespace) -> int:
    """Answers of random conversations beside cold reads."""
    if options.traces:
        return importlib.import_module("serving_traces").measure(loaded, options, own_source())
    tokenizer, model = loaded.tokenizer, loaded.model
    config = EngineConfig(16 << 20, 6 << 20, max_rows=4, step_tokens=96, page_tokens=32, snapshot_tokens=64, quantum=32)
    corpus = tokenizer.encode(own_source())
    cold, found = Cold(model, tokenizer.vocab_size, config.page_tokens), []
    cached = read = 0
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, cache_folder=Path(folder), cache_folder_bytes=32 << 20)
        seed = options.seed
        while len(found) < options.answers:
            check = lambda prompt, output: found.append((*cold.differences(prompt, output), len(output.tokens)))  # noqa: E731
            trace = Trace(lambda: Engine(model, tokenizer, config), seed, corpus, 400, check)
            trace.run(12)
            seed, cached, read = seed + 1, cached + trace.cached, read + trace.read
    tokens, wrong = sum(row[2] for row in found), sum(row[0] > 0 for row in found)
    other = sum(row[1] for row in found)
    print(f"{len(found)} answers of {seed - options.seed} traces, {tokens} tokens; {cached / read:.0%} of prompts kept")
    print(f"answers with another token than a cold read: {wrong} ({sum(row[0] for row in found)} tokens)")
    print(
        f"log-probabilities that differ in any bit: {other} ({other / tokens:.2%}); exact kernels: {cold.served.exact}"
    )
    return int(cold.served.exact and (wrong or other) > 0)


def throughput(loaded: Loaded, options: argparse.Namespace) -> int:
    """Tokens a second of one text by `Generation`, and of streams through the engine."""
    single: list[float] = []
    streams: dict[int, list[float]] = {count: [] for count in options.streams}
    for _ in range(options.repeats):
        single.append(_generation(loaded, options.tokens))
        for count in options.streams:
            streams[count].append(_engine(loaded, count, options.tokens))
    base = statistics.median(single)
    print(f"generation, one text: {base:.0f} tokens a second")
    for count, speeds in streams.items():
        print(
            f"engine, {count} streams: {statistics.median(speeds):.0f} ({statistics.median(speeds) / base:.1f} times)"
        )
    return 0


def _generation(loaded: Loaded, tokens: int) -> float:
    generation = Generation(loaded.model, loaded.tokenizer, Settings(tokens, temperature=0, ignore_end=True))
    generation.feed(PROMPT)
    began = time.process_time()
    for _ in generation.write():
        pass
    return tokens / (time.process_time() - began)


def _engine(loaded: Loaded, count: int, tokens: int) -> float:
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(max_rows=count, step_tokens=count + 512))
    prompts = [f"{PROMPT}x = {i}\n" for i in range(count)]
    requests = [Request(prompt, max_tokens=tokens, temperature=0, ignore_end=True) for prompt in prompts]
    began = time.process_time()
    handles = [engine.submit(request) for request in requests]
    while not all(handle.done for handle in handles):
        engine.step()
    return count * tokens / (time.process_time() - began)


def invariance(loaded: Loaded, options: argparse.Namespace) -> int:
    """Requests alone, then in batches: another text, token or log-probability is a failure."""
    tokenizers = {"random nano-test": byte_tokenizer(), options.model: loaded.tokenizer}
    models, wrong = {"random nano-test": speaking(preset("nano-test")), options.model: loaded.model}, 0
    for name, model in models.items():
        tokenizer = tokenizers[name]
        asked = random_requests(options.requests, tokenizer.encode(own_source()), options.seed)
        one = alone(Engine(model, tokenizer, EngineConfig(64 << 20, 0, max_rows=1)), asked)
        engine = Engine(model, tokenizer, EngineConfig(64 << 20, 16 << 20))
        other, rows = together(engine, asked, options.seed)
        found = differences(one, other)
        written = [count for count in rows if count]
        print(
            f"{name}: {len(asked)} requests, {sum(len(output.tokens) for output in one)} tokens; in batches of "
            f"{min(written)} to {max(written)}, mean {statistics.mean(written):.1f}"
        )
        print(f"  other texts: {found.texts}; other tokens: {found.tokens}; other log-probabilities: {found.logprobs}")
        print(f"  exact kernels: {engine.served.exact}")
        wrong += found.texts + found.tokens + (found.logprobs if engine.served.exact else 0)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
