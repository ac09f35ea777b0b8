"""Whole models in turn: a training step, the next token at a context, and reading a prompt.

Operations: 6 a parameter and token in training, 2 in reading and writing, and attention's products over a prompt.
Bytes: weights (and the state, for a token) once; for a training step, ten passes over float32 weights: two reads and a
gradient written, and AdamW's four reads and three writes. "overhead" is the time of the same layers with next to no
arithmetic in them (width 16, one head, at 8 tokens of context): Python, dispatch and launches.
"""

from collections.abc import Callable
from functools import partial

import torch

from atma.bench.hugging_face import Peer, peers
from atma.bench.machine import Cost
from atma.bench.models import Ours, attention_cost
from atma.bench.plan import Plan
from atma.bench.rows import Case, Entry, Job
from atma.config import ModelConfig, preset
from atma.narrow import width_of
from atma.ops.backend import backend_for

TINY_CONTEXT = 8
Contender = Ours | Peer


def jobs(kind: str, plan: Plan, device: torch.device, notes: list[str]) -> list[Job]:
    """All cases of train, decode or prefill."""
    config, made = preset(plan.preset), []
    make = {"train": _training, "decode": _decoding, "prefill": _reading}[kind]
    for dtype in plan.dtypes:
        number: torch.dtype = getattr(torch, dtype)
        contenders: list[Contender] = []
        for backend in plan.backends:
            backend_for(backend, torch.empty(1, dtype=number, device=device))
            contenders.append(Ours(config, backend, number, device))
            widths = plan.weights if kind in ("decode", "prefill") else ()
            contenders += [Ours(config, backend, number, device, width_of(width)) for width in widths]
        contenders += peers(config, number, device, notes)
        for i, length in enumerate(plan.contexts if kind == "decode" else plan.lengths):
            build = partial(_case, make, kind, plan, contenders, length)
            made.append(Job(partial(_check, kind, contenders if i == 0 else []), partial(build, config, dtype)))
    return made


def _check(kind: str, contenders: list[Contender]) -> None:
    for contender in contenders:
        contender.check(kind)


def _case(
    make: Callable[..., Entry],
    kind: str,
    plan: Plan,
    contenders: list[Contender],
    length: int,
    config: ModelConfig,
    dtype: str,
) -> Case:
    sizes = {"context" if kind == "decode" else "length": length, "batch": plan.batch}
    return Case(kind, sizes, dtype, [make(contender, config, plan.batch, length) for contender in contenders])


def _training(contender: Contender, config: ModelConfig, rows: int, length: int) -> Entry:
    count, tokens = contender.parameters(), rows * length
    cost = Cost(6.0 * count * tokens, 10.0 * 4 * count)
    return Entry(contender.name, contender.ours, contender.trainer(rows, length), cost, tokens, count)


def _decoding(contender: Contender, config: ModelConfig, rows: int, context: int) -> Entry:
    count, tiny = contender.parameters(), contender.tiny()
    call, read = contender.decoder(rows, context)
    overhead, _ = tiny.decoder(1, TINY_CONTEXT)
    cost = Cost(2.0 * count * rows, float(read))
    return Entry(contender.name, contender.ours, call, cost, rows, count, overhead)


def _reading(contender: Contender, config: ModelConfig, rows: int, length: int) -> Entry:
    count, tokens = contender.parameters(), rows * length
    call, read = contender.prefill(rows, length)
    cost = Cost(2.0 * count * tokens + attention_cost(config, rows, length), float(read))
    return Entry(contender.name, contender.ours, call, cost, tokens, count)
