"""Replicas under Ray Serve, measured: tokens a second of one and of two, and what of a conversation is not read again.

    python benchmarks/serving_ray.py throughput --rounds 3
    python benchmarks/serving_ray.py affinity --conversations 24 --turns 4

Both start a Ray of their own on this machine; needs `pip install 'atma-lm[ray]'`. `throughput` sends 32 requests, 16 at
once, to one replica and to two with one thread each, in turn, and to `atma serve` beside them; `affinity` holds
conversations, four at once, with two replicas as they are, with two without affinity, and with one, where nothing can
stray.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import serve
from serving_client import post, served

from atma.serve.http.options import ServerOptions
from atma.serve.ray import deployment

PORT = 8765
OPTIONS = ServerOptions(memory_budget="256MiB")
PROMPT = "def read_lines(path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "affinity"))
    parser.add_argument("--model", default="nano")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--conversations", type=int, default=24)
    parser.add_argument("--turns", type=int, default=4)
    given = parser.parse_args()
    with cluster():
        (throughput if given.what == "throughput" else affinity)(given)


@contextmanager
def cluster() -> Iterator[None]:
    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": PORT})
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


def throughput(given: argparse.Namespace) -> None:
    """Tokens a second, whole and streamed."""
    rates: dict[tuple[str, bool], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder, served(given.model, Path(folder) / "log", "--threads", "1") as plain:
        for turn in range(given.rounds):
            for replicas in (1, 2):
                serve.run(deployment(given.model, replicas=replicas, options=OPTIONS))
                for name, port in ((f"{replicas} replica(s)", PORT), ("atma serve", plain.port)):
                    for stream in (False, True):
                        rate(port, given, stream, turn)  # warm
                        rates.setdefault((name, stream), []).append(rate(port, given, stream, turn))
    for (name, stream), found in rates.items():
        each = ", ".join(f"{value:,.0f}" for value in found)
        print(f"{name}, {'streamed' if stream else 'whole'}: {statistics.median(found):,.0f} tokens/s ({each})")


def rate(port: int, given: argparse.Namespace, stream: bool, turn: int) -> float:
    asked = {"max_tokens": 128, "ignore_eos": True, "stream": stream}
    bodies = [asked | {"prompt": f"# {turn} {number}\n{PROMPT}"} for number in range(given.requests)]
    began = time.perf_counter()
    with ThreadPoolExecutor(given.streams) as clients:
        list(clients.map(lambda body: post(port, "/v1/completions", body), bodies))
    return 128 * given.requests / (time.perf_counter() - began)


def affinity(given: argparse.Namespace) -> None:
    """How many of the later turns start from a kept state, and how many of their tokens are not read."""
    for name, replicas, sticky in (("affinity", 2, True), ("no affinity", 2, False), ("one replica", 1, True)):
        serve.run(deployment(given.model, replicas=replicas, affinity=sticky, options=OPTIONS))
        post(PORT, "/v1/completions", {"prompt": "warm", "max_tokens": 8})
        with ThreadPoolExecutor(4) as clients:
            usages = list(clients.map(conversation, [given.turns] * given.conversations))
        later = [usage for one in usages for usage in one[1:]]
        hits = sum(cached(usage) > 0 for usage in later) / len(later)
        saved = sum(map(cached, later)) / sum(usage["prompt_tokens"] for usage in later)
        told = f"{hits:.0%} of {len(later)} later turns start from a kept state, {saved:.0%} of their tokens not read"
        print(f"{name}: {told}", flush=True)


def conversation(turns: int) -> list[dict[str, Any]]:
    """What every turn used."""
    usages, talk = [], [{"role": "user", "content": f"def step_{random.random()}():\n{PROMPT}"}]
    for _ in range(turns):
        body = {"messages": talk, "max_tokens": 32, "ignore_eos": True}
        told = json.loads(post(PORT, "/v1/chat/completions", body))
        usages.append(told["usage"])
        talk.append({"role": "assistant", "content": told["choices"][0]["message"]["content"]})
        talk.append({"role": "user", "content": "go on"})
    return usages


def cached(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens_details"]["cached_tokens"]


if __name__ == "__main__":
    main()
