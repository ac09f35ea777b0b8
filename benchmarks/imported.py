"""An imported checkpoint beside transformers: how long it takes to load, and how fast it writes, alone and in company.

    python benchmarks/imported.py --dtype bfloat16 --streams 1 8 --out imported.json

A random Qwen2 of 0.5B parameters (or --layers fewer) is made with transformers, imported, loaded by both sides, and
asked for the same greedy tokens, both sides in one process and by turns. With one stream ours is `Decoder`; with more
it is the engine, which reads each prompt as a request of its own, and transformers' side is one batch through its own
cache. It refuses to print when the two sides' logits differ by more than the type allows.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from atma.decoding import Decoder
from atma.eval.transformers_cache import cache_argument, cache_of
from atma.layouts import import_checkpoint
from atma.loading import load
from atma.model import Model
from atma.serve.engine import Engine
from atma.serve.request import Request
from atma.serve.settings import MIB, EngineConfig
from atma.tokenizer import byte_tokenizer

QWEN2 = {
    "vocab_size": 151_936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
SLACK = {torch.float32: 1e-3, torch.bfloat16: 0.25}


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def theirs_alone(model: Any, prompt: Tensor, tokens: int) -> Callable[[], float]:
    """Seconds a step (all rows at once), greedy, from a prompt (B, T) already read."""
    argument = cache_argument(model)
    out = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
    held = {"cache": cache_of(out), "next": out.logits[:, -1:].argmax(-1)}

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            out = model(input_ids=held["next"], use_cache=True, logits_to_keep=1, **{argument: held["cache"]})
            held["cache"], held["next"] = cache_of(out), out.logits[:, -1:].argmax(-1)
        return (time.perf_counter() - began) / tokens

    return turn


def ours_alone(model: Model, prompt: Tensor, tokens: int, turns: int) -> Callable[[], float]:
    hidden, state = model(prompt, model.init_state(1, prompt.shape[1] + tokens * (turns + 1) + 1))
    assert state is not None
    decoder = Decoder(model, state)
    held = {"next": decoder.step(model.logits(hidden[:, -1]).argmax(-1, keepdim=True)).argmax(-1, keepdim=True)}

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            held["next"] = decoder.step(held["next"]).argmax(-1, keepdim=True)
        return (time.perf_counter() - began) / tokens

    return turn


def ours_served(model: Model, prompts: Tensor, tokens: int, turns: int) -> Callable[[], float]:
    """Seconds a step of the engine that writes a token of every stream."""
    streams, length = prompts.shape
    room = EngineConfig(memory_bytes=2048 * MIB, cache_bytes=0, max_rows=streams, recorded_bytes=256 * MIB)
    engine = Engine(model, byte_tokenizer(), room)
    for prompt in prompts.tolist():
        request = Request(prompt, max_tokens=tokens * (turns + 1) + 8, temperature=0.0, ignore_end=True)
        engine.submit(request, engine.prepare(request))
    while any(len(sequence.tokens) < length + 2 for sequence in engine.scheduler.running) or engine.scheduler.waiting:
        engine.step()

    def turn() -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            engine.step()
        return (time.perf_counter() - began) / tokens

    return turn


def contest(ours: Callable[[], float], theirs: Callable[[], float], turns: int, streams: int) -> dict[str, float]:
    """Medians of turns made alternately."""
    pairs = [(ours(), theirs()) for _ in range(turns)]
    ratios = [b / a for a, b in pairs]
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
    told = {"ours_tokens_per_second": streams / first, "theirs_tokens_per_second": streams / second}
    return told | {"ratio": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}


@torch.inference_mode()
def measure(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    dtype = getattr(torch, options.dtype)
    config = transformers.AutoConfig.for_model("qwen2", num_hidden_layers=options.layers, **QWEN2)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder / "theirs")
    imported, _ = timed(lambda: import_checkpoint(folder / "theirs", folder / "ours"))
    loading, ours = timed(lambda: load(folder / "ours").model.to(dtype))
    library = transformers.AutoModelForCausalLM
    theirs_loading, theirs = timed(lambda: library.from_pretrained(folder / "theirs", dtype=dtype).eval())
    prompts = torch.randint(0, 256, (max(options.streams), options.prompt))
    difference = (ours.logits(ours(prompts[:1])[0]) - theirs(prompts[:1]).logits).abs().max().item()
    if difference > SLACK[dtype]:
        raise SystemExit(f"the logits differ by {difference}: nothing is measured")
    rows: list[dict[str, Any]] = [{"what": "import", "seconds": imported}]
    rows += [{"what": "load", "ours_seconds": loading, "theirs_seconds": theirs_loading, "difference": difference}]
    for streams in options.streams:
        some, counts = prompts[:streams], (options.tokens, options.turns)
        mine = ours_alone(ours, some, *counts) if streams == 1 else ours_served(ours, some, *counts)
        told = contest(mine, theirs_alone(theirs, some, options.tokens), options.turns, streams)
        rows.append({"what": "write", "streams": streams, "dtype": options.dtype, **told})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options)
    for row in rows:
        print(json.dumps(row | {"threads": options.threads, "layers": options.layers}))
    if options.out:
        options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
