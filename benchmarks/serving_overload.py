"""More than a server can do: requests come at a multiple of its capacity. How do they end, what memory does it take?

    python benchmarks/serving.py overload --requests 10000

Prompts and answers have log-uniform lengths; half of the answers are streamed; one request in a hundred asks for more
than there is memory for. First the capacity is measured: requests a second of as many clients as there are rows, each
asking again when it is answered. Then all requests come at `--times` that rate, at random moments, whether or not the
ones before were answered. Every one must end in a whole 200, a 400 or a 429. Memory is the server's peak as Linux
counts it (VmHWM), beside that of a process which has imported the same and loaded no model, before and after it has run
the code on a model of 0.1 MiB, and beside the server's own when it had loaded the model. Exit status 1 for another end,
or for a peak above code + 1.05 × (budget + weights), code being the process that has run it.
"""

import argparse
import asyncio
import collections
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving_client import MIB, Heard, ask, gauge, resident, served

from atma.loading import load
from atma.serve.http.options import byte_count

IMPORTS = """
import torch
import atma.serve.http.server, atma.checkpoint, atma.commands.serve
from atma.config import ModelConfig
from atma.model import Model
from atma.serve.engine import Engine
from atma.serve.request import Request
from atma.serve.settings import EngineConfig
from atma.tokenizer import byte_tokenizer

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

torch.randn(64, 64) @ torch.randn(64, 64)
imported = peak()
model = Model(ModelConfig(257, 32, depth=4, query_heads=2, key_value_heads=1, head_width=16))
engine = Engine(model, byte_tokenizer(), EngineConfig(1 << 20, 0, max_rows=2, step_tokens=32, page_tokens=16))
handle = engine.submit(Request("some text", max_tokens=9))
while not handle.done:
    engine.step()
print(imported, peak())
"""


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder:
        settings = ("--memory-budget", options.memory_budget, "--threads", str(options.threads))
        with served(options.model, Path(folder) / "log", *settings) as server:
            loaded = resident(server.process)
            heard, rate, seconds = asyncio.run(_run(server.port, options))
            after = asyncio.run(ask(server.port, _body(random.Random(0), options)))
            recorded = gauge(server.port, "atma_recorded_bytes")
            peak = resident(server.process, "VmHWM")
    bad = _ends(heard, rate, seconds, options)
    kept = _memory(options, loaded, peak, recorded)
    return int(bad > 0 or after.status != 200 or not kept)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--times", type=float, default=4.0, help="arrivals as a multiple of the capacity")
    parser.add_argument("--memory-budget", default="96MiB")
    parser.add_argument("--longest-prompt", type=int, default=1024, help="tokens")
    parser.add_argument("--longest-answer", type=int, default=128, help="tokens")
    parser.add_argument("--threads", type=int, default=1, help="of the server's model")
    parser.add_argument("--calibration", type=int, default=300, help="requests that measure the capacity")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def _body(chance: random.Random, options: argparse.Namespace) -> dict[str, Any]:
    """A request of log-uniform lengths; its prompt as token ids, so that its length is exact."""
    prompt, answer = (
        round(math.exp(chance.uniform(math.log(low), math.log(high))))
        for low, high in ((8, options.longest_prompt), (4, options.longest_answer))
    )
    most = 10_000_000 if chance.random() < 0.01 else answer
    tokens = [chance.randrange(256) for _ in range(prompt)]
    return {"prompt": tokens, "max_tokens": most, "temperature": 0, "ignore_eos": True, "stream": chance.random() < 0.5}


async def _run(port: int, options: argparse.Namespace) -> tuple[list[Heard], float, float]:
    """What everybody heard, the capacity in requests a second, and how long it took."""
    chance = random.Random(options.seed + 1)
    for count in (options.calibration // 4, options.calibration):  # the first to warm up
        rate = await _capacity(port, [_body(chance, options) for _ in range(count)])
    print(f"capacity: {rate:.1f} requests a second; now {options.times:g} times as many", flush=True)
    chance, tasks, began = random.Random(options.seed), [], time.perf_counter()
    due = began
    for _ in range(options.requests):
        due += chance.expovariate(options.times * rate)
        body = _body(chance, options)
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        tasks.append(asyncio.create_task(ask(port, body)))
    arrived = time.perf_counter() - began
    heard = await asyncio.gather(*tasks)
    print(f"{len(heard)} requests came in {arrived:.0f} s: {len(heard) / arrived / rate:.1f} times the capacity")
    return heard, rate, time.perf_counter() - began


async def _capacity(port: int, bodies: list[dict[str, Any]], clients: int = 32) -> float:
    async def client() -> None:
        while bodies:
            await ask(port, bodies.pop())

    count, began = len(bodies), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - began)


def _ends(heard: list[Heard], rate: float, seconds: float, options: argparse.Namespace) -> int:
    """Print how the requests ended; how many ended otherwise than they may."""
    ends = collections.Counter(one.status for one in heard)
    cut = sum(one.status == 200 and not one.whole for one in heard)
    other = sum(count for status, count in ends.items() if status not in (200, 400, 429))
    print(f"ends: {dict(sorted(ends.items()))}; answers cut short: {cut}; all ended after {seconds:.0f} s")
    print(f"answered: {ends[200] / seconds:.1f} a second, {ends[200] / seconds / rate:.2f} times the measured capacity")
    for name, status in (("answered", 200), ("refused as too many", 429), ("refused as too long", 400)):
        times = sorted(one.seconds for one in heard if one.status == status)
        if times:
            print(f"  {name}: median {statistics.median(times):.3f} s, 99% {times[int(0.99 * len(times))]:.3f} s")
    return cut + other


def _memory(options: argparse.Namespace, loaded: int, peak: int, recorded: float) -> bool:
    """Print memory; whether the peak keeps within its bound."""
    imported, own = (int(x) << 10 for x in subprocess.check_output([sys.executable, "-c", IMPORTS], text=True).split())
    weights = sum(p.numel() * p.element_size() for p in load(options.model).model.parameters())
    budget = byte_count(options.memory_budget)
    bound = own + 1.05 * (budget + weights)
    parts = f"imports {imported / MIB:.0f}, with the code run {own / MIB:.0f}, budget {budget / MIB:.0f}"
    parts += f", weights {weights / MIB:.1f}"
    print(f"MiB: {parts}; server with the model loaded {loaded / MIB:.0f}, at its peak {peak / MIB:.0f}")
    print(f"peak less code: {(peak - own) / MIB:.1f}; budget + weights + 5%: {(bound - own) / MIB:.1f}")
    print(f"peak {peak / MIB:.0f}, bound {bound / MIB:.0f}; of the budget recorded steps: {recorded / MIB:.1f}")
    return peak <= bound
