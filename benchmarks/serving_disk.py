"""What keeping states on disk costs the texts that are being written: times of steps while large states are evicted.

    python benchmarks/serving_disk.py --tokens 16384 --rounds 4

Some texts are written; every so many steps a kept state of --tokens tokens leaves memory in the middle of a step, as it
does when room is short. In turn: nothing is evicted; it is evicted and the step waits for its file, as it would without
a thread that writes; it is evicted to that thread. Wall times of steps, in milliseconds; steps that evict also alone.
The files are then found again in a new engine; one that is not whole is an error.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

import atma
from atma.loading import load
from atma.serve import Engine, EngineConfig, Request

WAYS = ("none evicted", "waited for", "by the thread")


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    loaded = load(options.model)
    print(f"{options.model}, {options.threads} threads, torch {torch.__version__}, atma {atma.__version__}")
    times: dict[str, list[tuple[float, bool]]] = {way: [] for way in WAYS}
    dropped = dict.fromkeys(WAYS, 0)
    for _ in range(options.rounds):
        for way in WAYS:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder:
                found, lost = _steps(loaded, options, way, Path(folder))
                times[way] += found
                dropped[way] += lost
    print(f"{'':14} {'p50':>8} {'p99':>8} {'most':>8}   evicting: {'p50':>8} {'most':>8} {'number':>7} {'dropped':>8}")
    for way in WAYS:
        every, evicting = sorted(t for t, _ in times[way]), sorted(t for t, evicts in times[way] if evicts)
        row = [_at(every, 0.5), _at(every, 0.99), every[-1], _at(evicting, 0.5), evicting[-1]]
        shown = [f"{1e3 * seconds:8.2f}" for seconds in row]
        print(f"{way:14} {' '.join(shown[:3])}   {'':9} {' '.join(shown[3:])} {len(evicting):7} {dropped[way]:8}")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="of each state that is evicted")
    parser.add_argument("--steps", type=int, default=400, help="in each round and way")
    parser.add_argument("--every", type=int, default=50, help="steps from one eviction to the next")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where files are written; by default the system's temporary folder")
    return parser.parse_args()


def _steps(loaded, options: argparse.Namespace, way: str, folder: Path) -> tuple[list[tuple[float, bool]], int]:
    """Seconds of each step and whether it evicts; and states that found no room in the queue."""
    config = EngineConfig(512 << 20, 256 << 20, folder, max_rows=options.streams, snapshot_tokens=0)
    engine = Engine(loaded.model, loaded.tokenizer, config)
    cache, disk = engine.memory.cache, engine.memory.disk
    text = _keep(engine, options.tokens, options.steps // options.every)
    size = engine.memory.budget.row_bytes + engine.memory.pool.pages_for(len(text)) * engine.memory.budget.page_bytes
    print(f"  {way}: states of {size / 2**20:.1f} MiB", file=sys.stderr)
    inside = engine._make_room

    def evicting() -> None:
        inside()
        if evicts and way != WAYS[0]:
            cache.evict()
            if way == WAYS[1]:
                disk.flush()

    engine._make_room, evicts = evicting, False
    for i in range(options.streams):
        engine.submit(Request([i], max_tokens=options.steps + 64, ignore_end=True, cache=False))
    for _ in range(32):
        engine.step()
    found = []
    for step in range(options.steps):
        evicts, began = step % options.every == 0, time.perf_counter()
        engine.step()
        found.append((time.perf_counter() - began, evicts))
    engine.close()
    again = Engine(loaded.model, loaded.tokenizer, config)
    whole = len(again.memory.disk) + disk.dropped == options.steps // options.every
    if not whole or again.memory.cache.find(text, len(text), "0") is None:
        raise SystemExit("a state that was written is not found again")
    return found, disk.dropped


def _keep(engine: Engine, tokens: int, count: int) -> list[int]:
    """A long text, and its state kept once for each of so many salts; the pages are shared, the files will not be."""
    text = torch.randint(0, 200, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    handle = engine.submit(Request(text, max_tokens=1, salt="0"))
    while not handle.done:
        engine.step()
    kept = engine.memory.cache.find(text, tokens, "0")
    assert kept is not None
    for salt in range(1, count):
        assert engine.memory.cache.put(text, str(salt), kept.standing, kept.pages)
    return text


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())
