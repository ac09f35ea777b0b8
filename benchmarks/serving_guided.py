"""What a structure costs: tokens a second with and without one, in turns, and what is beside it.

python benchmarks/serving_guided.py --rounds 5
"""

import argparse
import statistics
import time

from atma.loading import load
from atma.serve import Engine, EngineConfig, Request
from atma.serve.structure import Structure

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
LIST = Structure(json={"type": "array", "items": ITEM, "minItems": 1000})


def seconds(engine: Engine, structures: list[Structure | None], tokens: int, seed: int) -> float:
    """Processor time of one answer for each of `structures`, all at once, after the prompts have been read."""
    handles = [
        engine.submit(Request(f"# {i}\n", max_tokens=tokens, seed=seed + i, structure=one, ignore_end=True))
        for i, one in enumerate(structures)
    ]
    for _ in range(6):
        engine.step()
    began = time.process_time()
    while not all(handle.done for handle in handles):
        engine.step()
    spent = time.process_time() - began
    assert all(len(handle.outputs[0].tokens) == tokens for handle in handles), [h.outputs[0] for h in handles]
    return spent / (tokens - 6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    asked = parser.parse_args()
    loaded = load(asked.model)
    assert loaded.tokenizer is not None
    engine = Engine(loaded.model, loaded.tokenizer, EngineConfig(512 << 20, 0), keep_model=False)
    print("| streams | free, tokens/s | guided, tokens/s | a step takes, times |\n|---|---|---|---|")
    for streams in asked.streams:
        free, guided = [], []
        for i in range(asked.rounds + 1):
            free.append(seconds(engine, [None] * streams, asked.tokens, i))
            guided.append(seconds(engine, [LIST] * streams, asked.tokens, i))
        ratio = statistics.median(b / a for a, b in zip(free[1:], guided[1:], strict=True))
        rates = (f"{streams / statistics.median(times[1:]):,.0f}" for times in (free, guided))
        print(f"| {streams} | {' | '.join(rates)} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
