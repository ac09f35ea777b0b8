"""How time and peak memory grow with length and with width, with fitted exponents and where the time goes.

    python benchmarks/growth.py --preset nano                      # lengths 256 to 1M
    python benchmarks/growth.py --longest 16384 --out runs/growth

Every case is a process of its own, so that its peak memory is the operating system's (ru_maxrss); what importing and
building take is measured beside it. A training step is one row of the length; prefill and evaluation read in chunks.
Whole rows and prompts run up to `--whole` tokens, since attention's time is quadratic; the "end" of a prompt, its last
1,024 tokens, and the next token start from a state filled with random content and run at every length. An exponent is
the least-squares slope of log seconds (or of log MiB above what was there before) on log length, over the upper half.

Where the time goes is asked of torch.profiler: self times of its events, each counted with the first of optimiser,
attention, memory, convolution and loss that it or what called it belongs to, else with the products, the norms and
gates, or the rest; "Python" is the time outside any event. The profiler itself takes time, mostly there; a recorded
decoding step is timed kernel by kernel instead.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from atma import ops
from atma.bench.models import SPARE, Ours, batch_of, rewind
from atma.bench.table import duration
from atma.config import ModelConfig, preset
from atma.decoding import Decoder
from atma.eval.stream import hidden_chunks
from atma.model import Model
from atma.ops import dense
from atma.report.content import size_text
from atma.report.figures import COLOURS, MARKERS, Figure, Table
from atma.report.plain import plain_page
from atma.state import ModelState, transform

KINDS = ("train", "prefill", "prefill end", "decode", "evaluate", "evaluate end")
WHOLE_KINDS = ("train", "prefill", "evaluate")
WIDTH_KINDS = ("train", "prefill", "decode")
END = 1024
MIB = 2**20
DEVICE = torch.device("cpu")
SPANS = {
    operation: family
    for family, operations in {
        "attention": (ops.polar_attention, ops.softmax_attention),
        "convolution": (ops.causal_conv, ops.gated_conv),
        "memory": (ops.gated_delta,),
        "loss": (ops.softcap_loss,),
        "matrix products": (dense.linear,),
        "norms and gates": (dense.rms_norm, dense.gated),
    }.items()
    for operation in operations
}
"""What the operations of a model are counted as, whichever module calls them."""


class Built(NamedTuple):
    """MiB taken by what a case starts from, the case, and the decoder in it."""

    before: float
    call: Callable[[], object]
    decoder: Decoder | None = None


KERNELS = {
    "attention": ("polar", "hold"),
    "memory": ("recurrence",),
    "convolution": ("conv",),
    "matrix products": ("linear",),
    "norms and gates": ("rms_norm", "gate"),
}
"""Compiled kernels of a recorded step, by the beginning of their names."""
FAMILIES = {
    "optimiser": ("Optimizer.",),
    "attention": ("attention!", "polar", "statistics"),
    "memory": ("memory!", "delta", "recurrence"),
    "convolution": ("convolution!", "causal_conv"),
    "loss": ("loss!", "softcap"),
    "matrix products": ("matrix products!",),
    "norms and gates": ("norms and gates!", "rms_norm", "RmsNorm", "relu", "Relu"),
}
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::linear", "aten::matmul", "mkldnn")


def main() -> None:
    options = _options()
    if options.case is not None:
        print(json.dumps(_case(options)))
        return
    lengths = [n for n in (256 * 4**i for i in range(20)) if n <= options.longest] or [options.longest]
    rows = list(_rows(options, lengths))
    fits = exponents(rows)
    table = _table(rows)
    _print(options, table, fits)
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    found = {"command": _command(options), "machine": _machine(), "rows": rows, "exponents": fits}
    (folder / "growth.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    facts = {"machine": _machine()}
    shown = _figures(rows, fits)
    page = plain_page(folder / "growth.html", "How time and memory grow", shown, _command(options), facts, table=table)
    print(f"\nwritten: {folder / 'growth.json'}, {page}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="nano", help="model configuration, with random weights")
    parser.add_argument("--longest", type=int, default=1 << 20, help="lengths are 256, 1024, 4096, … up to this")
    parser.add_argument("--whole", type=int, default=16_384, help="longest training row and whole prompt")
    parser.add_argument("--widths", type=int, nargs="*", default=[64, 128, 256, 512], help="model widths")
    parser.add_argument("--width-length", type=int, default=1024, help="length at which widths are compared")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls; one where a call takes over 20 s")
    parser.add_argument("--out", default="runs/growth", help="folder for growth.json and growth.html")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--size", type=int, nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def _rows(options: argparse.Namespace, lengths: list[int]) -> Iterator[dict[str, Any]]:
    """The measured rows, each told on stderr as it comes."""
    for kind in options.kinds:
        for length in lengths:
            if kind not in WHOLE_KINDS or length <= options.whole:
                yield _in_a_process(options, kind, length, 0) | {"over": "length", "at": length}
    for kind in WIDTH_KINDS if options.widths else ():
        if kind in options.kinds:
            for width in options.widths:
                yield _in_a_process(options, kind, options.width_length, width) | {"over": "width", "at": width}


def _in_a_process(options: argparse.Namespace, kind: str, length: int, width: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--preset", options.preset, "--repeats", str(options.repeats)]
    ended = subprocess.run(
        [*command, "--case", kind, "--size", str(length), str(width)], capture_output=True, text=True
    )
    if ended.returncode:
        raise SystemExit(f"{kind} at length {length}, width {width or 'as it is'} failed:\n{ended.stderr[-2000:]}")
    found = json.loads(ended.stdout)
    print(f"{kind} {length:,} {width or ''}: {duration(found['seconds'])}, {found['peak']:.0f} MiB", file=sys.stderr)
    return found


def _case(options: argparse.Namespace) -> dict[str, Any]:
    length, width = options.size
    config = _config(options.preset, width)
    build = {"train": _train, "decode": _decode}.get(options.case, _read)
    before, call, decoder = build(config, options.case, length)
    call()
    times = [_seconds(call)]
    if times[0] < 20:
        times += [_seconds(call) for _ in range(options.repeats - 1)]
    peak = _peak()
    seconds = sorted(times)[len(times) // 2]
    count = options.repeats if seconds < 0.1 else 1
    shares = (
        kernel_shares(decoder, call, count) if decoder and decoder.how.startswith("recorded") else profile(call, count)
    )
    tokens = 1 if options.case == "decode" else min(END, length) if options.case.endswith("end") else length
    return {
        "kind": options.case,
        "length": length,
        "width": config.width,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak": peak,
        "before": before,
        "shares": shares,
    }


def _config(name: str, width: int) -> ModelConfig:
    """The preset, at another width with as many heads as fit."""
    config = preset(name)
    if not width:
        return config
    heads = max(1, width // config.head_width)
    shared = max(1, heads * config.key_value_heads // config.query_heads)
    shared = next(count for count in range(shared, 0, -1) if heads % count == 0)
    return dataclasses.replace(config, width=width, query_heads=heads, key_value_heads=shared)


def _train(config: ModelConfig, kind: str, length: int) -> Built:
    call = Ours(config, "auto", torch.float32, DEVICE).trainer(1, length)
    return Built(_peak(), call)


def _decode(config: ModelConfig, kind: str, length: int) -> Built:
    model, token = _model(config), torch.zeros(1, 1, dtype=torch.long)
    before = _peak()
    decoder = Decoder(model, _filled(model.init_state(1, length + SPARE), length))

    @torch.inference_mode()
    def step() -> torch.Tensor:
        if decoder.room == 0:
            rewind(decoder, length)
        return decoder.step(token).argmax(-1)

    return Built(before, step, decoder)


def _read(config: ModelConfig, kind: str, length: int) -> Built:
    """Prefill or evaluate, whole or the end."""
    model = _model(config)
    before = _peak()
    first = max(0, length - END) if kind.endswith("end") else 0
    batch = batch_of(config.vocab_size, 1, length - first, DEVICE)
    held = _filled(model.init_state(1, length), first) if first else None

    @torch.inference_mode()
    def read() -> None:
        state = model.init_state(1, length) if held is None else held
        chunks = hidden_chunks(model, batch.tokens, state, END)
        if kind.startswith("prefill"):
            model.logits(collections.deque(chunks, maxlen=1)[0][1][:, -1:])
            return
        for start, hidden in chunks:
            model.loss(hidden, batch.targets[:, start : start + hidden.shape[1]])

    return Built(before, read)


def _model(config: ModelConfig) -> Model:
    return Model(config, torch.Generator().manual_seed(0))


def _filled(state: ModelState, length: int) -> ModelState:
    """Random content, in place, so that making it does not count towards the peak."""
    return transform(state, lambda field, x: x.fill_(length) if field == "length" else x.normal_(0, 0.5))


def _seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def kernel_shares(decoder: Decoder, call: Callable[[], object], count: int) -> dict[str, float]:
    """Share of a recorded step by family: its kernels one by one, and the step as a whole for what is around them."""
    totals: dict[str, float] = dict.fromkeys((*FAMILIES, "rest"), 0.0)
    wall = sum(_seconds(call) for _ in range(count))
    for _ in range(count):
        for name, seconds in decoder.timed(torch.zeros(1, 1, dtype=torch.long)):
            family = next((key for key, marks in KERNELS.items() if name.startswith(marks)), "rest")
            totals[family] += seconds
    totals["Python"] = max(0.0, wall - sum(totals.values()))
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()}


def profile(call: Callable[[], object], count: int) -> dict[str, float]:
    """Share of the wall time of `count` calls by family."""
    from torch.profiler import ProfilerActivity

    with _spans(), torch.profiler.profile(activities=[ProfilerActivity.CPU]) as found:
        wall = sum(_seconds(call) for _ in range(count))
    totals: dict[str, float] = dict.fromkeys((*FAMILIES, "rest"), 0.0)
    for event in found.events() or ():
        totals[_family(event)] += event.self_cpu_time_total / 1e6
    totals["Python"] = max(0.0, wall - sum(totals.values()))
    whole = sum(totals.values())
    return {name: seconds / whole for name, seconds in totals.items()}


def _family(event: Any) -> str:
    chain = [event.name]
    parent = event.cpu_parent
    while parent is not None:
        chain.append(parent.name)
        parent = parent.cpu_parent
    for family, marks in FAMILIES.items():
        if any(mark in name for name in chain for mark in marks):
            return family
    return "matrix products" if any(mark in event.name for mark in PRODUCTS) else "rest"


@contextlib.contextmanager
def _spans() -> Iterator[None]:
    """Name the calls of our operations for the profiler, the compiled ones too, which it does not see by itself."""

    def named(operation: Callable, family: str) -> Callable:
        @functools.wraps(operation)
        def call(*args: Any, **kwargs: Any) -> Any:
            with torch.profiler.record_function(f"{family}!"):
                return operation(*args, **kwargs)

        return call

    loaded = [module for name, module in sys.modules.items() if name.startswith("atma.") and "atma.ops" not in name]
    callers = [(m, operation) for operation in SPANS for m in loaded if vars(m).get(operation.__name__) is operation]
    for module, operation in callers:
        setattr(module, operation.__name__, named(operation, SPANS[operation]))
    try:
        yield
    finally:
        for module, operation in callers:
            setattr(module, operation.__name__, operation)


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fitted exponents of seconds and of memory above `before`, for each kind over lengths and over widths."""
    made = []
    for over in ("length", "width"):
        for kind in dict.fromkeys(row["kind"] for row in rows if row["over"] == over):
            mine = [row for row in rows if row["over"] == over and row["kind"] == kind]
            upper = mine[len(mine) // 2 :] if len(mine) > 3 else mine
            memory = [max(row["peak"] - row["before"], 1e-3) for row in upper]
            at = [row["at"] for row in upper]
            fit = {"time": slope(at, [row["seconds"] for row in upper]), "memory": slope(at, memory)}
            made.append({"kind": kind, "over": over, "from": at[0], "to": at[-1], **fit})
    return made


def slope(x: list[float], y: list[float]) -> float | None:
    """Least-squares slope of log y on log x; None for a single point."""
    if len(x) < 2:
        return None
    a, b = [math.log(value) for value in x], [math.log(value) for value in y]
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    above = sum((p - mean_a) * (q - mean_b) for p, q in zip(a, b, strict=True))
    return above / sum((p - mean_a) ** 2 for p in a)


def _table(rows: list[dict[str, Any]]) -> Table:
    families = list(rows[0]["shares"])
    header = ["what", "length", "width", "time", "tokens/s", "peak MiB", "before MiB", *families]
    body = [
        [row["kind"], f"{row['length']:,}", str(row["width"]), duration(row["seconds"])]
        + [f"{row['tokens_per_second']:,.0f}", f"{row['peak']:,.0f}", f"{row['before']:,.0f}"]
        + [f"{row['shares'][name]:.0%}" for name in families]
        for row in rows
    ]
    return Table(header, body)


def _print(options: argparse.Namespace, table: Table, fits: list[dict[str, Any]]) -> None:
    print(f"{_command(options)}\n{_machine()}\n")
    for line in (table.header, ["---"] * len(table.header), *table.rows):
        print(f"| {' | '.join(line)} |")
    print("\n| exponent of | over | from | to | time | memory |\n| --- | --- | --- | --- | --- | --- |")
    for fit in fits:
        time_text, memory_text = ("–" if fit[name] is None else f"{fit[name]:.2f}" for name in ("time", "memory"))
        print(f"| {fit['kind']} | {fit['over']} | {fit['from']:,} | {fit['to']:,} | {time_text} | {memory_text} |")


def _figures(rows: list[dict[str, Any]], fits: list[dict[str, Any]]) -> list[Figure]:
    made = []
    for over in dict.fromkeys(row["over"] for row in rows):
        mine = [row for row in rows if row["over"] == over]
        fitted = {fit["kind"]: fit for fit in fits if fit["over"] == over}
        made.append(_figure(mine, over, "seconds", "seconds", {k: fit["time"] for k, fit in fitted.items()}))
        made.append(_figure(mine, over, "peak", "peak MiB", {k: fit["memory"] for k, fit in fitted.items()}))
    return [*made, *(_where(rows, kind) for kind in dict.fromkeys(r["kind"] for r in rows if r["over"] == "length"))]


def _figure(rows: list[dict[str, Any]], over: str, key: str, words: str, fitted: dict[str, float | None]) -> Figure:
    traces = []
    for i, kind in enumerate(fitted):
        mine, power = [row for row in rows if row["kind"] == kind], fitted[kind]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "name": kind if power is None else f"{kind}: {over}^{power:.2f}",
                "x": [row["at"] for row in mine],
                "y": [row[key] for row in mine],
                "line": {"color": COLOURS[i % len(COLOURS)]},
                "marker": {"symbol": MARKERS[i % len(MARKERS)], "size": 7},
            }
        )
    layout = {"xaxis": _axis(rows, over), "yaxis": {"type": "log", "title": {"text": words}}}
    body = [[row["kind"], f"{row['at']:,}", f"{row[key]:.4g}"] for row in rows]
    caption = "Exponents are fitted over the upper half; those of memory to what a case adds to the loaded model."
    return Figure(f"{words} by {over}", caption, traces, layout, Table(["what", over, words], body))


def _where(rows: list[dict[str, Any]], kind: str) -> Figure:
    mine = [row for row in rows if row["over"] == "length" and row["kind"] == kind]
    names = list(mine[0]["shares"])
    labels = [size_text(row["at"]) for row in mine]
    colours = [*COLOURS, "#8a8f98", "#4b5563"]
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": labels,
            "y": [row["shares"][name] for row in mine],
            "marker": {"color": colours[i % len(colours)]},
        }
        for i, name in enumerate(names)
    ]
    layout = {"barmode": "stack", "yaxis": {"tickformat": ".0%"}, "xaxis": {"type": "category"}}
    body = [[label, *(f"{row['shares'][name]:.0%}" for name in names)] for label, row in zip(labels, mine, strict=True)]
    caption = "Shares of profiled calls."
    return Figure(f"Where the time goes: {kind}", caption, traces, layout, Table(["length", *names], body))


def _axis(rows: Iterable[dict[str, Any]], over: str) -> dict[str, Any]:
    at = sorted({row["at"] for row in rows})
    texts = [size_text(value) if over == "length" else str(value) for value in at]
    return {"type": "log", "title": {"text": over}, "tickvals": at, "ticktext": texts}


def _command(options: argparse.Namespace) -> str:
    lengths = f"--preset {options.preset} --longest {options.longest} --whole {options.whole}"
    return f"python benchmarks/growth.py {lengths} --widths {' '.join(map(str, options.widths))}".rstrip()


def _machine() -> str:
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}"
    return f"float32, {platform.system()} {platform.machine()}, {threads}, torch {torch.__version__}"


def _peak() -> float:
    """MiB; ru_maxrss counts KiB on Linux and bytes on macOS."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / MIB if sys.platform == "darwin" else held / 1024


if __name__ == "__main__":
    main()
