"""What a next turn costs after a long history: `python benchmarks/serving.py turns --lengths 3072 16384 65536`.

For each length a conversation of so many tokens is read once; then come turns of 32 tokens and answers of 16. Each turn
is timed to its first token without the cache, from the state kept in memory, and from disk: the engine is closed and
built anew on its folder, and the files are dropped from the operating system's memory first, where it can be asked to.
Processor time, and for the disk also the time on the wall; medians over `--repeats`. Exit status
1: an answer from a state is not that of a cold read, or more was read for it than its turn and the last token before.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from serving_harness import begin, option_parser, own_source

from atma.loading import Loaded
from atma.serve import Engine, EngineConfig, Request
from atma.serve.handle import Output

MIB, TURN, ANSWER = 1 << 20, 32, 16


class Turn(NamedTuple):
    """An answer, the milliseconds to its first token, and how many tokens were read until then."""

    output: Output
    processor: float
    wall: float
    read: int


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    loaded = begin(options)
    print("history | cold, ms | kept, ms | from disk, ms (wall) | closing, s | files, MiB")
    for length in options.lengths:
        _measure(loaded, length, options.repeats, options.memory)
    return 0


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__, "turns")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 384, 1536, 3072, 16_384, 65_536])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", type=int, default=512, help="MiB of the engine, three eighths for kept states")
    return parser.parse_args(arguments)


def _measure(loaded: Loaded, length: int, repeats: int, memory: int) -> None:
    """One row of the table."""
    corpus = loaded.tokenizer.encode(own_source())
    corpus = (corpus * (1 + (length + 2 * repeats * TURN) // len(corpus)))[: length + 2 * repeats * TURN]
    text, turns = corpus[:length], [corpus[at : at + TURN] for at in range(length, len(corpus), TURN)]
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(memory * MIB, 3 * memory * MIB // 8, cache_folder=Path(folder))
        engine = Engine(loaded.model, loaded.tokenizer, config)
        text = text + _ask(engine, text, True).output.tokens
        text, cold, kept = _in_memory(engine, text, turns[:repeats])
        began = time.perf_counter()
        engine.close()
        closing, files = time.perf_counter() - began, engine.stats()["file_bytes"]
        disk = _after_restarts(loaded, config, text, turns[repeats:])
    wall = statistics.median(turn.wall for turn in disk)
    columns = [statistics.median(turn.processor for turn in rows) for rows in (cold, kept, disk)]
    print("{:,} | {:,.0f} | {:.1f} | {:.1f} ".format(length, *columns), end="")
    print(f"({wall:.1f}) | {closing:.1f} | {files / MIB:,.0f}", flush=True)


def _in_memory(engine: Engine, text: list[int], turns: list[list[int]]) -> tuple[list[int], list[Turn], list[Turn]]:
    """The text after these turns; each without the cache and with it."""
    cold, kept = [], []
    for turn in turns:
        text = text + turn
        cold.append(_ask(engine, text, False))
        kept.append(_ask(engine, text, True))
        _check(kept[-1], cold[-1].output, engine)
        text = text + kept[-1].output.tokens
    return text, cold, kept


def _after_restarts(loaded: Loaded, config: EngineConfig, text: list[int], turns: list[list[int]]) -> list[Turn]:
    """Each turn as the first one of an engine; the last is compared with a cold read."""
    found = []
    for turn in turns:
        text = text + turn
        _drop(config.cache_folder)
        engine = Engine(loaded.model, loaded.tokenizer, config)
        found.append(_ask(engine, text, True))
        cold = _ask(engine, text, False).output if turn is turns[-1] else found[-1].output
        _check(found[-1], cold, engine)
        text = text + found[-1].output.tokens
        engine.close()
    return found


def _ask(engine: Engine, text: list[int], cache: bool) -> Turn:
    """A greedy answer and the time to its first token."""
    request = Request(text, max_tokens=ANSWER, temperature=0, logprobs=0, ignore_end=True, cache=cache)
    read, wall, processor = engine.reader.read, time.perf_counter(), time.process_time()
    handle = engine.submit(request)
    while not handle.outputs[0].tokens:
        engine.step()
    processor, wall = time.process_time() - processor, time.perf_counter() - wall
    read = engine.reader.read - read
    while not handle.done:
        engine.step()
    return Turn(handle.outputs[0], 1000 * processor, 1000 * wall, read)


def _check(kept: Turn, cold: Output, engine: Engine) -> None:
    """The answer is the cold one, to the bit where kernels are exact, and no more was read for it than is new."""
    same = cold.tokens == kept.output.tokens and cold.logprobs == kept.output.logprobs
    if (not same and engine.served.exact) or kept.read != TURN + 1:
        raise SystemExit(f"{kept.output.usage}: read {kept.read} tokens; same answer: {same}")


def _drop(folder: Path | None) -> None:
    """Ask the operating system to forget what is in these files, so that they are read from the disk."""
    if folder is not None and hasattr(os, "posix_fadvise"):
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
