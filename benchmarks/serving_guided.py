"""What a structure costs: tokens a second with and without one, in turns, by processor time, and the ratio of a step.

    python benchmarks/serving_guided.py --rounds 8

Answers are lists of small objects by a JSON schema, as long as they are let be; free ones are drawn alike.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence

from serving_harness import begin, option_parser

from atma.serve import Engine, EngineConfig, Request, Structure

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "count": {"type": "integer"},
        "kind": {"enum": ["small", "large", "none"]},
    },
    "required": ["name", "count", "kind"],
    "additionalProperties": False,
}
LIST = Structure(json={"type": "array", "items": ITEM, "minItems": 10_000})
BEGUN = 6
"""Steps that are not timed: prompts are read, and the first masks of a structure take longer."""


def seconds(engine: Engine, structure: Structure | None, options: argparse.Namespace, streams: int, seed: int) -> float:
    """Processor time of a step that writes so many answers."""
    asked = Request("", max_tokens=options.tokens, structure=structure, ignore_end=True)
    each = [dataclasses.replace(asked, prompt=f"# {i}\n", seed=seed + i) for i in range(streams)]
    handles = [engine.submit(request) for request in each]
    for _ in range(BEGUN):
        engine.step()
    began = time.process_time()
    while not all(handle.done for handle in handles):
        engine.step()
    spent = time.process_time() - began
    if any(len(handle.outputs[0].tokens) != options.tokens for handle in handles):
        raise SystemExit("an answer ended before its time")
    return spent / (options.tokens - BEGUN)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args(arguments)
    loaded = begin(options)
    assert loaded.tokenizer is not None
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(512 << 20, 0), keep_model=False)
    print("| streams | free, tokens/s | guided, tokens/s | a step, times |\n|---|---|---|---|")
    for streams in options.streams:
        free, guided = [], []
        for seed in range(options.rounds + 1):  # the first is not counted
            free.append(seconds(engine, None, options, streams, seed))
            guided.append(seconds(engine, LIST, options, streams, seed))
        ratio = statistics.median(b / a for a, b in zip(free[1:], guided[1:], strict=True))
        rates = [f"{streams / statistics.median(times[1:]):,.0f}" for times in (free, guided)]
        print(f"| {streams} | {rates[0]} | {rates[1]} | {ratio:.2f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
