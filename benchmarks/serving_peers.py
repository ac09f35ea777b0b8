"""Streams through the engine beside Hugging Face transformers' `generate` on an LFM2 of the same size.

    python benchmarks/serving.py peers --streams 1 8 32 64

Random weights of equal number: width, depth, heads, layer pattern and vocabulary are ours, the MLP's intermediate size
makes up the difference (`atma.bench.hugging_face`). All prompts have one length and all answers another, so that the
static batch of `generate` has neither padding nor rows that ended early: its best case. Both sides are warm, and take
turns in one process with the same number of threads; a figure is the median over the rounds. "First" is the time from
asking for all streams at once to a stream's first token, "next" the time between two tokens of a stream; medians over
streams. Refuses to print where a side is not equal to its own reference, or a stream differs from the same one alone.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from serving_harness import speaking

from atma.bench.hugging_face import peers
from atma.bench.models import Ours
from atma.config import ModelConfig, preset
from atma.loading import load
from atma.serve import Engine, EngineConfig, Request

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


class Ids:
    """A tokenizer of ids alone, for models that no tokenizer belongs to."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eot, self.holes = vocab_size, vocab_size - 1, np.empty(0, np.int64)

    def token_bytes(self, token: int) -> bytes:
        return b"%d " % token


class Times(NamedTuple):
    """Tokens a second of all streams together; seconds to the first and the next token."""

    rate: float
    first: float
    next: float


Clock = Callable[[], float]
Run = Callable[[], Times]


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    config, dtype, notes = preset(options.preset), getattr(torch, options.dtype), []
    found = [peer for peer in peers(config, dtype, torch.device("cpu"), notes) if peer.name == "LFM2"]
    if not found:
        raise SystemExit(f"no LFM2 to compare with: {'; '.join(notes)}")
    peer, ours = found[0], Ours(config, "auto", dtype, torch.device("cpu"))
    for contender in (peer, ours):
        contender.check("decode")
    print(_described(options, ours.parameters(), peer.parameters()))
    theirs = peer.model().to(dtype).eval()
    theirs.generation_config.eos_token_id = theirs.config.eos_token_id = None
    if options.save is not None:
        return _saved(theirs, options.save)
    model = speaking(config).to(dtype)
    clock = CLOCKS[options.clock]
    for count in options.streams:
        prompts = torch.randint(
            0, config.vocab_size, (count, options.prompt), generator=torch.Generator().manual_seed(1)
        )
        runs = {
            "atma": _engine(model, config, prompts, options.answer, clock),
            "LFM2": _generate(theirs, prompts, options.answer, clock),
        }
        _report(count, _rounds(runs, options.rounds))
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", default="wall", choices=CLOCKS, help="processor: not disturbed by other processes")
    parser.add_argument("--save", type=Path, help="write the LFM2 with nano's tokenizer to this folder, and no more")
    return parser.parse_args(arguments)


def _described(options: argparse.Namespace, ours: int, theirs: int) -> str:
    sizes = f"{options.preset}, {ours:,} parameters, LFM2 {theirs:,}; {options.dtype}"
    way = f"{options.threads} threads, {options.clock} time"
    return f"{sizes}, {way}; prompts of {options.prompt}, answers of {options.answer} tokens, {options.rounds} rounds"


def _saved(model: Any, folder: Path) -> int:
    """A folder that `transformers serve` can serve."""
    tokenizer = load("nano").tokenizer
    assert tokenizer is not None
    if model.config.vocab_size < tokenizer.vocab_size:
        raise SystemExit("the preset's vocabulary is smaller than nano's")
    model.save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return 0


def _rounds(runs: dict[str, Run], rounds: int) -> dict[str, list[Times]]:
    """Each run in turn, after one of each that does not count."""
    found: dict[str, list[Times]] = {name: [] for name in runs}
    for name in [*runs] + [*runs] * rounds:
        found[name].append(runs[name]())
    return {name: times[1:] for name, times in found.items()}


def _report(count: int, found: dict[str, list[Times]]) -> None:
    medians = {}
    for name, times in found.items():
        medians[name] = Times(*(statistics.median(column) for column in zip(*times, strict=True)))
        low, high = min(t.rate for t in times), max(t.rate for t in times)
        rate, first, after = medians[name]
        line = (
            f"{rate:8,.0f} tokens/s ({low:,.0f} to {high:,.0f}), first {1e3 * first:.1f} ms, next {1e3 * after:.2f} ms"
        )
        print(f"{count:3} streams, {name}: {line}", flush=True)
    print(f"{count:3} streams: {medians['atma'].rate / medians['LFM2'].rate:.2f} times the tokens a second", flush=True)


def _engine(model: Any, config: ModelConfig, prompts: torch.Tensor, answer: int, clock: Clock) -> Run:
    """All prompts at once through one engine. ValueError where a text differs from the same one alone."""
    count = len(prompts)
    sizes = EngineConfig(max_rows=count, step_tokens=max(512, 2 * count), memory_bytes=4 << 30)
    engine = Engine(model, Ids(config.vocab_size), sizes)  # type: ignore[arg-type]
    requests = [
        Request(prompt, max_tokens=answer, temperature=0, ignore_end=True, cache=False) for prompt in prompts.tolist()
    ]
    lone = engine.submit(requests[-1])
    while not lone.done:
        engine.step()

    def run() -> Times:
        times: dict[str, list[float]] = {}
        began = clock()
        handles = [engine.submit(request) for request in requests]
        while not all(handle.done for handle in handles):
            events, now = engine.step(), clock() - began
            for event in events:
                times.setdefault(event.id, []).append(now)
        if handles[-1].outputs[0].tokens != lone.outputs[0].tokens:
            raise ValueError(f"no figures: a text among {count} streams is not the same as alone")
        return _times(list(times.values()), answer)

    return run


def _generate(model: Any, prompts: torch.Tensor, answer: int, clock: Clock) -> Run:
    """All prompts as one static batch of `generate`."""
    from transformers import StoppingCriteria, StoppingCriteriaList

    class Noted(StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.times.append(clock())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    @torch.inference_mode()
    def run() -> Times:
        noted, began = Noted(), clock()
        told = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=answer,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([noted]),
        )
        if told.shape != (len(prompts), prompts.shape[1] + answer):
            raise ValueError(f"no figures: generate gave {tuple(told.shape)}")
        return _times([[at - began for at in noted.times]] * len(prompts), answer)

    return run


def _times(streams: list[list[float]], answer: int) -> Times:
    """Of the moments of every stream's tokens."""
    gaps = [after - before for times in streams for before, after in itertools.pairwise(times)]
    rate = len(streams) * answer / max(times[-1] for times in streams)
    return Times(rate, statistics.median(times[0] for times in streams), statistics.median(gaps))
