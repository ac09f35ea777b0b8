"""Rows that processes share: the chain of states beside the prefix form, which composes transitions.

    python benchmarks/context.py --mixers retnet gla gated_deltanet
    torchrun --nproc-per-node 2 benchmarks/context.py --mixers gla --depth 1

Alone, one thread: what one layer of --width costs a process in the middle of a row, forward and backward pass over a
stretch of --length tokens. *Chain*: a call behind a state; so much passes until the next process can begin. *Prefix*:
its transition from nothing, and its outputs once what is before is known; no process waits for it but for the
composition, one product a process before it. With N processes one layer takes N times the first, or once the second.

By torchrun: forward and backward pass of one row of --length tokens by all, as a chain and in the prefix form in turns,
of a model of --depth layers of a mixer, or of a --preset. Medians of three times and of the ratio within each turn: on
the clock; of the processors of all processes together; and *counted*, the longest way of processor time from process to
process along the messages, which is what the clock would show with a core for each, however many there are and whatever
else they do. Losses are compared first, to 1e-4.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from atma.config import ModelConfig
from atma.mixers import Mixer, find, messages, stretches, stretches_ahead, stretches_prefix
from atma.mixers.stretches import stretch_of
from atma.model import Model
from atma.presets import preset
from atma.train.allocator import keep_freed_memory
from atma.train.parallel import Ranks, join, sum_over
from atma.train.step import generator


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="*", default=["retnet", "gla", "mamba2", "gated_deltanet"])
    parser.add_argument("--preset", default="", help="a whole preset in place of them, by torchrun")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    ranks = join(torch.device("cpu"))
    for name in [given.preset] if given.preset else given.mixers:
        config = preset(name) if given.preset else _config(name, given.width, given.depth)
        if ranks.world == 1:
            _layer(name, moved(Model(config, generator(1))), given.length, given.rounds)
        else:
            _row(name, moved(Model(config, generator(1))), ranks, given.length, given.rounds)
    if ranks.world > 1:
        dist.destroy_process_group()


def _config(name: str, width: int, depth: int) -> ModelConfig:
    """Heads of 64 numbers, whatever a mixer calls them."""
    heads, found = width // 64, find(name)
    sizes = {"heads": heads, "query_heads": heads, "key_value_heads": heads, "key_width": 64, "head_width": 64}
    own: dict[str, Any] = {key: sizes[key] for key in found.cls.takes(found.fixed) if key in sizes}
    return ModelConfig(1024, width=width, depth=depth, pattern=(name,), **own)


def moved(model: Model) -> Model:
    """With output projections away from zero, so that gradients are those of a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator(2)))
    return model


def _layer(name: str, model: Model, length: int, rounds: int) -> None:
    """One layer in one process: both forms in turns."""
    mixer: Mixer = model.blocks[0].mixer  # pyright: ignore
    x = torch.randn(1, length, model.config.width, generator=generator(3)).requires_grad_()
    grad = torch.randn(1, length, model.config.width, generator=generator(4))
    with torch.no_grad():
        _, state = mixer(x, mixer.init_state(1, length))
        fields = mixer.transition(x, state, True).after
    before = {field: getattr(state, field).detach().requires_grad_() for field in fields}

    def chain() -> None:
        y, after = mixer(x, state._replace(**before))
        told = [getattr(after, field) for field in fields]
        torch.autograd.backward([y, *told], [grad, *(torch.ones_like(one) for one in told)])

    def prefix() -> None:
        made = mixer.transition(x, state, True)
        given = {field: made.moved(one, made.factors[field]) + one for field, one in before.items()}
        told = [one for one in (*made.after.values(), *made.factors.values()) if one.requires_grad]
        torch.autograd.backward([made.finish(made.read, given), *told], [grad, *(torch.ones_like(one) for one in told)])

    times = turns([chain, prefix], rounds, lambda: _numbers(time.perf_counter()))
    one, other, ratio = _medians([(a[0], b[0]) for a, b in times])
    print(f"{name}, a layer of width {model.config.width}, {length:,} tokens, one process, forward and backward pass:")
    print(f"  chain {1e3 * one:.1f} ms, prefix {1e3 * other:.1f} ms, ratio {ratio:.2f}", flush=True)
    print("  a layer by N processes, prefix / chain: " + ", ".join(f"{n}: {ratio / n:.2f}" for n in (2, 3, 4, 8)))


def _row(name: str, model: Model, ranks: Ranks, length: int, rounds: int) -> None:
    """A row by all processes: both forms in turns."""
    tokens = torch.randint(0, model.config.vocab_size, (1, length + 1), generator=generator(5))
    losses: dict[bool, float] = {}

    def run(prefix: bool) -> None:
        model.zero_grad(set_to_none=True)
        stretch = stretch_of(ranks.rank, range(ranks.world), None, (1, length), prefix=prefix)
        inputs, targets = (x[:, stretch.start : stretch.seen] for x in (tokens[:, :-1], tokens[:, 1:]))
        loss = model.loss(model(inputs, stretch=stretch)[0], targets).sum() / length
        loss.backward()
        losses[prefix] = float(sum_over(ranks, loss.detach()))

    forms = [functools.partial(run, prefix) for prefix in (False, True)]
    with Counted(ranks) as counted:
        times = turns(forms, rounds, counted.now)
    if abs(losses[True] - losses[False]) > 1e-4:
        raise SystemExit(f"losses differ: {losses[False]} as a chain, {losses[True]} in the prefix form")
    if ranks.rank == 0:
        layers = len(model.blocks)
        print(f"{name}, {layers} layer{'s' * (layers > 1)}, a row of {length:,} tokens by {ranks.world} processes:")
        for i, what in enumerate(("clock", "processors", "counted")):
            one, other, ratio = _medians([tuple(each[i] for each in both) for both in times])
            print(f"  {what}: chain {1e3 * one:.0f} ms, prefix {1e3 * other:.0f} ms, ratio {ratio:.2f}", flush=True)


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Counted:
    """A clock of each process that moves with its processor, and to a sender's where a message comes from later."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.ahead = ranks, 0.0
        self.send, self.received_from = messages.send, messages.received_from

    def __enter__(self) -> "Counted":
        self._use(self.stamped, self.taken)
        return self

    def __exit__(self, *_: object) -> None:
        self._use(self.send, self.received_from)

    @staticmethod
    def _use(send: Callable[..., None], received_from: Callable[..., Tensor]) -> None:
        for module in (messages, stretches, stretches_ahead, stretches_prefix):
            vars(module).update(send=send, received_from=received_from)

    def own(self) -> float:
        return time.process_time() + self.ahead

    def stamped(self, x: Tensor, peer: int) -> None:
        self.send(_numbers(self.own()), peer)
        self.send(x, peer)

    def taken(self, like: Tensor, peer: int) -> Tensor:
        stamp, found = self.received_from(_numbers(0), peer), self.received_from(like, peer)
        self.ahead += max(0.0, float(stamp) - self.own())
        return found

    def now(self) -> Tensor:
        """The clock, the processors' time of all processes together, and the latest of them, from which all go on."""
        times = [_numbers(0, 0) for _ in range(self.ranks.world)]
        dist.all_gather(times, _numbers(time.process_time(), self.own()))
        used, own = torch.stack(times).unbind(1)
        self.ahead += float(own.max()) - self.own()
        return torch.stack([_numbers(time.perf_counter())[0], used.sum(), own.max()])


def turns(forms: Sequence[Callable[[], None]], rounds: int, now: Callable[[], Tensor]) -> list[list[list[float]]]:
    """Of each form in each round the seconds of each clock; the first round warms up."""
    times = []
    for _ in range(rounds + 1):
        found = []
        for run in forms:
            start = now()
            run()
            found.append((now() - start).tolist())
        times.append(found)
    return times[1:]


def _medians(times: list[tuple[float, ...]]) -> tuple[float, float, float]:
    one, other = (statistics.median(column) for column in zip(*times, strict=True))
    return one, other, statistics.median(b / a for a, b in times)


if __name__ == "__main__":
    main()
