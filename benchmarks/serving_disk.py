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
from serving_harness import begin, option_parser

from atma.serve import Engine, EngineConfig, Request

WAYS = ("none evicted", "waited for", "by the thread")


def main() -> int:
    options = _options()
    loaded = begin(options)
    times: dict[str, list[tuple[float, bool]]] = {way: [] for way in WAYS}
    dropped = dict.fromkeys(WAYS, 0)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        config = EngineConfig(512 << 20, 256 << 20, Path(folder), max_rows=options.streams, snapshot_tokens=0)
        bench = Bench(Engine(loaded.model, loaded.tokenizer, config), options)
        for _ in range(options.rounds):
            for way in WAYS:
                before = bench.disk.dropped
                times[way] += bench.steps(way)
                dropped[way] += bench.disk.dropped - before
        bench.engine.close()
        again = Engine(loaded.model, loaded.tokenizer, config)
        if len(again.store.disk) + bench.disk.dropped != bench.kept or bench.found(again) is None:
            raise SystemExit("a state that was written is not found again")
    print(f"states of {bench.bytes / 2**20:.1f} MiB, {options.streams} texts being written")
    print(f"{'':14} {'p50':>8} {'p99':>8} {'most':>8}   evicting: {'p50':>8} {'most':>8} {'number':>7} {'dropped':>8}")
    for way in WAYS:
        every, evicting = sorted(t for t, _ in times[way]), sorted(t for t, evicts in times[way] if evicts)
        row = [_at(every, 0.5), _at(every, 0.99), every[-1], _at(evicting, 0.5), evicting[-1]]
        shown = [f"{1e3 * seconds:8.2f}" for seconds in row]
        print(f"{way:14} {' '.join(shown[:3])}   {'':9} {' '.join(shown[3:])} {len(evicting):7} {dropped[way]:8}")
    return 0


def _options() -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16384, help="of each state that is evicted")
    parser.add_argument("--steps", type=int, default=400, help="in each round and way")
    parser.add_argument("--every", type=int, default=50, help="steps from one eviction to the next")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where files are written; by default the system's temporary folder")
    return parser.parse_args()


class Bench:
    """An engine whose texts are being written, with kept states to evict: of one text, under a salt each."""

    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self.engine, self.options = engine, options
        self.cache, self.disk, self._evicts = engine.store.cache, engine.store.disk, ""
        self.kept = (len(WAYS) - 1) * options.rounds * len(range(0, options.steps, options.every))
        self.text = torch.randint(0, 200, (options.tokens,), generator=torch.Generator().manual_seed(0)).tolist()
        handle = engine.submit(Request(self.text, max_tokens=1, salt="0"))
        while not handle.done:
            engine.step()
        kept, budget = self.found(engine), engine.store.budget
        self.bytes = budget.row_bytes + len(kept.pages) * budget.page_bytes
        for salt in range(1, self.kept):
            assert self.cache.put(self.text, str(salt), kept.standing, kept.pages)
        self._inside, engine._make_room = engine._make_room, self._make_room
        most = 64 + options.rounds * len(WAYS) * options.steps
        for i in range(options.streams):
            engine.submit(Request([i], max_tokens=most, ignore_end=True, cache=False))
        for _ in range(32):
            engine.step()

    def found(self, engine: Engine):
        return engine.store.cache.find(self.text, len(self.text), "0")

    def steps(self, way: str) -> list[tuple[float, bool]]:
        """Seconds of each step, and whether it evicts."""
        found = []
        for step in range(self.options.steps):
            evicting = step % self.options.every == 0
            self._evicts, began = way if evicting else "", time.perf_counter()
            self.engine.step()
            found.append((time.perf_counter() - began, evicting))
        self.disk.flush()
        return found

    def _make_room(self) -> None:
        self._inside()
        if self._evicts in WAYS[1:]:
            assert self.cache.evict()
        if self._evicts == WAYS[1]:
            self.disk.flush()


def _at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


if __name__ == "__main__":
    sys.exit(main())
