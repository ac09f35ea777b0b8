"""How much of what can be reused is, when conversations are repeated exactly: `python benchmarks/serving.py reuse`.

Conversations of several turns are held, a turn of each in turn, then each is repeated as a whole, in random order. What
is reusable is defined in `tests/harness/reuse.py`. First the budget for kept states is ample; then it is shares of what
they came to, at last with a folder for what does not fit. Exit status 1: less than 99% reused on repeats with an ample
budget, or an answer other than the first time.
"""

import argparse
import tempfile
from pathlib import Path

from serving_harness import Repeats, Reuse, begin, option_parser, own_source

from atma.loading import Loaded
from atma.serve import Engine, EngineConfig

MIB = 1 << 20


def main(arguments: list[str]) -> int:
    options = _options(arguments)
    loaded = begin(options, f"{options.conversations} conversations of {options.turns} turns")
    print("budget for kept states | kept at the end, MiB | let go | reused, first time | on repeats | other answers")
    whole, again = _run(loaded, options, options.ample << 20, None)
    failed = again.share < 0.99 or again.other > 0
    for percent in options.percent:
        failed |= _run(loaded, options, whole * percent // 100, None)[1].other > 0
    with tempfile.TemporaryDirectory() as folder:
        failed |= _run(loaded, options, whole * options.percent[-1] // 100, Path(folder))[1].other > 0
    return int(failed)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = option_parser(__doc__, "reuse")
    parser.add_argument("--conversations", type=int, default=100)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ample", type=int, default=2048, help="MiB for kept states at first")
    percent = "then budgets of so many percent of the bytes that were kept"
    parser.add_argument("--percent", type=int, nargs="+", default=[150, 100, 75, 50, 25], help=percent)
    return parser.parse_args(arguments)


def _run(loaded: Loaded, options: argparse.Namespace, budget: int, folder: Path | None) -> tuple[int, Reuse]:
    """Bytes kept at the end, and what the repeats reused."""
    pending = 16 * MIB if folder else 0  # beside what is kept
    config = EngineConfig(budget + 128 * MIB, budget + pending, folder, pending_bytes=pending, max_rows=4)
    engine = Engine(loaded.model, loaded.tokenizer, config)
    corpus = loaded.tokenizer.encode(own_source())
    repeats = Repeats(engine, corpus, options.conversations, options.seed)
    first, again = repeats.hold(options.turns), repeats.repeat()
    stats, on_disk = engine.stats(), ", the rest on disk" if folder else ""
    print(
        f"{budget / MIB:.0f} MiB{on_disk} | {stats['kept_bytes'] / MIB:.0f} | {stats['evictions']:,} | "
        f"{first.share:.2%} of {first.reusable:,} | {again.share:.2%} of {again.reusable:,} | {again.other}"
    )
    return stats["kept_bytes"], again
