"""Streams over HTTP, one client for any server that speaks OpenAI's completions.

    python benchmarks/serving.py http --port 8000 --model nano --fields '{"ignore_eos": true}'

Beside `transformers serve`, taking turns, with an LFM2 of the same size that `peers` has written:

    python benchmarks/serving.py peers --save lfm2/
    transformers serve lfm2/ --port 8001 --device cpu &  atma serve nano --port 8000 &
    python benchmarks/serving.py http --port 8000 8001 --model nano lfm2/ --fields '{"ignore_eos": true}' '{}'

All streams ask at once, each for `--answer` tokens after a prompt of its own; `--rounds` times, the first not counted.
A server that sends text when a word is whole shows fewer events than tokens: tokens a second are counted by what was
asked for, the time between events as it is.
"""

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from typing import Any

from serving_client import Heard, ask


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, nargs="+", default=[8000], help="servers that take turns")
    parser.add_argument("--model", nargs="+", default=["nano"], help="the name that each goes by")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--prompt", type=int, default=200, help="characters")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--fields", nargs="+", default=["{}"], help="more fields of the requests to each, as JSON")
    options = parser.parse_args(arguments)
    for count in options.streams:
        asyncio.run(_compared(count, options))
    return 0


async def _compared(count: int, options: argparse.Namespace) -> None:
    found: dict[int, list[tuple[float, list[Heard]]]] = {port: [] for port in options.port}
    for turn in range(options.rounds + 1):
        for port, model, fields in zip(options.port, options.model, options.fields, strict=True):
            bodies = [_body(model, i, turn, options) | json.loads(fields) for i in range(count)]
            found[port].append(await _round(port, bodies))
    for port, rounds in found.items():
        _report(port, count, rounds[1:], options.answer)


def _body(model: str, i: int, turn: int, options: argparse.Namespace) -> dict[str, Any]:
    chance = random.Random(1000 * turn + i)
    prompt = "".join(chance.choice("abcdefghij klmnopq\n") for _ in range(options.prompt))
    return {"model": model, "prompt": prompt, "max_tokens": options.answer, "temperature": 0, "stream": True}


async def _round(port: int, bodies: list[dict[str, Any]]) -> tuple[float, list[Heard]]:
    began = time.perf_counter()
    heard = await asyncio.gather(*(ask(port, body) for body in bodies))
    return time.perf_counter() - began, heard


def _report(port: int, count: int, rounds: list[tuple[float, list[Heard]]], answer: int) -> None:
    heard = [one for _, many in rounds for one in many]
    bad = [one.status for one in heard if one.status != 200 or not one.times]
    if bad:
        print(f"{count:3} streams, port {port}: {len(bad)} of {len(heard)} were not answered, status {set(bad)}")
        return
    rate = statistics.median(count * answer / seconds for seconds, _ in rounds)
    first = statistics.median(one.times[0] for one in heard)
    gaps = [b - a for one in heard for a, b in itertools.pairwise(one.times)]
    after = statistics.median(gaps) if gaps else float("nan")
    events = statistics.mean(len(one.times) for one in heard)
    line = f"{rate:,.0f} tokens/s, first {1e3 * first:.0f} ms, next event {1e3 * after:.1f} ms"
    print(f"{count:3} streams, port {port}: {line}; {events:.0f} events an answer of {answer} tokens", flush=True)
