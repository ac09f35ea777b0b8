"""What drafts of a text's own repetitions bring: tokens a second with and without, in turns, and how many are right.

    python benchmarks/speculation.py --rounds 8
    python benchmarks/speculation.py --answers 1000   # are answers the same, to the bit?

`edit` writes a file of this package again that stands in the prompt, after a change in its first lines; `list` goes on
with lines that are all alike; `prose` draws a new text at temperature 1, in which drafts cost and bring nothing. Times
are processor times of one process; recording of steps and passes is not in them, but for what the first round leaves.
Every answer is compared: exit status 1 where one differs, or with `--answers` a log-probability does in any bit.
"""

import argparse
import dataclasses
import random
import statistics
import time
from collections.abc import Sequence

from serving_harness import begin, option_parser, own_source

from atma.loading import Loaded
from atma.serve import Engine, EngineConfig, Request
from atma.serve.handle import Output

LISTED = "    entries.append((name, count, True))\n"
PROSE = "The library at the end of the road has been closed for a year, and nobody remembers why. "


def requests(kind: str, source: str, tokens: int, streams: int, seed: int) -> list[Request]:
    """One for each stream."""
    chance, found = random.Random(seed), []
    for stream in range(streams):
        at = source.find("\n\n\n", chance.randrange(len(source) - 20_000)) + 3
        file = source[at : at + 8 * tokens]
        changed = file[:200].replace("the", "that").replace("self", "this")
        prompt = {
            "edit": f"{file}\n\n\n{changed}",
            "list": "entries = []\nfor name, count in found:\n" + LISTED * 4,
            "prose": f"{PROSE}\n\n{file[:40]}",
        }[kind]
        drawn = 1.0 if kind == "prose" else 0.0
        found.append(Request(prompt, tokens, temperature=drawn, seed=seed + stream, ignore_end=True))
    return found


def answered(engine: Engine, asked: Sequence[Request]) -> tuple[list[Output], float]:
    """Answers at once, and the processor time from when all have begun."""
    handles = [engine.submit(request) for request in asked]
    while not all(handle.outputs[0].tokens for handle in handles):
        engine.step()
    began, written = time.process_time(), sum(len(handle.outputs[0].tokens) for handle in handles)
    while not all(handle.done for handle in handles):
        engine.step()
    spent = time.process_time() - began
    outputs = [handle.outputs[0] for handle in handles]
    return outputs, spent / (sum(len(output.tokens) for output in outputs) - written)


def speeds(loaded: Loaded, options: argparse.Namespace) -> bool:
    """A table. Whether all answers were the same."""
    engines = [_engine(loaded, count) for count in (0, options.drafted)]
    source, same = own_source(), True
    print("| text | streams | without, tokens/s | with | times | drafted tokens that were right |")
    print("|---|---|---|---|---|---|")
    for kind in options.kinds:
        for streams in options.streams:
            taken: list[list[float]] = [[], []]
            before = engines[1].stats()
            for seed in range(options.rounds + 1):  # the first is not counted
                asked = requests(kind, source, options.tokens, streams, seed)
                order = [0, 1] if seed % 2 else [1, 0]
                found = {i: answered(engines[i], asked) for i in order}
                same = same and all(a.tokens == b.tokens for a, b in zip(found[0][0], found[1][0], strict=True))
                for i in order if seed else ():
                    taken[i].append(found[i][1])
            told = {name: count - before[name] for name, count in engines[1].stats().items() if "_tokens" in name}
            ratio = statistics.median(a / b for a, b in zip(*taken, strict=True))
            rates = [f"{1 / statistics.median(times):,.0f}" for times in taken]
            right, drafted = told["accepted_tokens"], told["draft_tokens"]
            share = f"{100 * right / drafted:.0f}% of {drafted:,}" if drafted else "none drafted"
            print(f"| {kind} | {streams} | {rates[0]} | {rates[1]} | {ratio:.2f} | {share} |", flush=True)
    return same


def compared(loaded: Loaded, options: argparse.Namespace) -> bool:
    """So many answers of all kinds, with drafts up to four at once. Whether all are the same to the bit."""
    plain, engine, source = _engine(loaded, 0), _engine(loaded, options.drafted), own_source()
    chance, wrong, tokens = random.Random(0), 0, 0
    for first in range(0, options.answers, 4):
        kinds = [chance.choice(options.kinds) for _ in range(min(4, options.answers - first))]
        asked = [
            requests(kind, source, chance.randint(1, options.tokens), 1, first + i)[0] for i, kind in enumerate(kinds)
        ]
        asked = [dataclasses.replace(one, logprobs=2, temperature=chance.choice((0, 0, 0.5, 1))) for one in asked]
        for one, other in zip(answered(plain, asked)[0], answered(engine, asked)[0], strict=True):
            wrong += one.tokens != other.tokens or one.logprobs != other.logprobs or one.text != other.text
            tokens += len(other.tokens)
    told = engine.stats()
    right, drafted = told["accepted_tokens"], told["draft_tokens"]
    print(
        f"{options.answers:,} answers, {tokens:,} tokens, {right:,} of {drafted:,} drafted ones right; differ: {wrong}"
    )
    return not wrong


def _engine(loaded: Loaded, drafted: int) -> Engine:
    assert loaded.tokenizer is not None
    return Engine(loaded.model, loaded.tokenizer, EngineConfig(speculation=drafted))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = option_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=300, help="of each answer")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--drafted", type=int, default=31, help="tokens of a draft at the most")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--kinds", nargs="+", choices=["edit", "list", "prose"], default=["edit", "list", "prose"])
    parser.add_argument("--answers", type=int, default=0, help="compare so many answers instead")
    options = parser.parse_args(arguments)
    loaded = begin(options)
    return 0 if (compared if options.answers else speeds)(loaded, options) else 1


if __name__ == "__main__":
    raise SystemExit(main())
