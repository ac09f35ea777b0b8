"""Thousands of short conversations: `python benchmarks/serving.py exact --traces 5000 --other-traces 300`.

Every greedy answer is read again with its prompt in one call, alone and cold. `--other-traces` as many again for each
of four random models of the size of `nano-test`. Exit status 1: an answer of exact kernels differs, or more bytes were
held after some step than the budget has.
"""

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path

from serving_harness import Cold, Found, Traces, speaking

from atma.config import preset
from atma.loading import Loaded
from atma.model import Model
from atma.serve import Engine, EngineConfig
from atma.tokenizer import Tokenizer, byte_tokenizer

ROWS, KEPT, PAGES, FILES = 16, 28, 64, 40
"""Sizes that are short of everything: kept states and pages besides rows, and files of five pages on average."""
OTHERS = {"nope": {"core": "nope"}, "rope": {"core": "rope", "memory": False}}
OTHERS |= {"rope, window 24": {"core": "rope", "window": 24}, "polar, window 40": {"window": 40}}


def measure(loaded: Loaded, options: argparse.Namespace, corpus: str) -> int:
    """Traces with the model, then with others."""
    print(f"{options.model}:")
    failed = _report(loaded.model, loaded.tokenizer, corpus, options.traces, options.seed)
    for name, changes in OTHERS.items() if options.other_traces else ():
        model = speaking(dataclasses.replace(preset("nano-test"), **changes))
        print(f"random nano-test, {name}:")
        failed |= _report(model, byte_tokenizer(), corpus, options.other_traces, options.seed)
    return int(failed)


def short(model: Model, tokenizer: Tokenizer, folder: Path) -> EngineConfig:
    """An engine's sizes for short conversations, in which it is short of rows, pages, kept states and files."""
    sizes = {"max_rows": ROWS, "step_tokens": 144, "page_tokens": 32, "snapshot_tokens": 64, "quantum": 8}
    ample = EngineConfig(256 << 20, 0, cache_folder=folder, **sizes)
    stats = Engine(model, tokenizer, ample).stats()
    page, row = stats["page_bytes"], stats["row_bytes"]
    kept = dataclasses.replace(ample, cache_bytes=KEPT * (row + page), cache_folder_bytes=FILES * (row + 5 * page))
    spare = Engine(model, tokenizer, kept).stats()["pages"] - PAGES
    return dataclasses.replace(kept, memory_bytes=kept.memory_bytes - spare * page)


def _report(model: Model, tokenizer: Tokenizer, corpus: str, count: int, seed: int) -> bool:
    """Run and print. True for a failure."""
    cold, began = Cold(model, tokenizer.vocab_size, 32), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        config = short(model, tokenizer, Path(folder))
        traces = Traces(lambda: Engine(model, tokenizer, config), seed, tokenizer.encode(corpus), cold.differences)
        found = traces.run(count)
    _print(found)
    print(f"  exact kernels: {cold.served.exact}; {time.process_time() - began:.0f} s of processor time")
    return bool(found.exceeded) or (cold.served.exact and found.wrong_traces > 0)


def _print(found: Found) -> None:
    kept = found.cached_tokens / found.prompt_tokens
    print(f"  {found.traces:,} traces, {found.answers:,} answers, {found.tokens:,} tokens; {kept:.0%} of prompts kept")
    print(
        f"  traces with any difference from cold reads: {found.wrong_traces:,}; tokens: {found.wrong_tokens:,}; "
        f"log-probabilities: {found.wrong_logprobs:,}"
    )
    for title, names in (("turns", found.turns), ("traces with", found.traces_with), ("events", found.events)):
        print(f"  {title}: " + "; ".join(f"{name} {count:,}" for name, count in sorted(names.items())))
    most = "; ".join(f"{name} {most:,} of {bound:,}" for name, (most, bound) in found.most.items())
    print(f"  most bytes held after any of {found.steps:,} steps: {most}; exceeded: {found.exceeded or 'none'}")
