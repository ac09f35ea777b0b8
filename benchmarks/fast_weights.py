"""Neural memories beside the systems they come from, and what a token and a training step cost as texts grow.

    python benchmarks/fast_weights.py                       # all of it, one thread, some minutes
    python benchmarks/fast_weights.py --parts peers --heads 4

Titans stands beside titans-pytorch with `chunk_size=1` and `batch_size=C`, which is the same function; it holds weights
for every token, so its lengths are small. TTT-Linear stands beside the plain PyTorch reference of
flash-linear-attention, which has a bias as a second state and adds the read to its norm: given keys and queries with
one more channel that is always 1, ours has that bias too, and both are compared by the norm of what is read and by the
weights behind the text. Nothing is printed unless both sides agree with the definition in float64. A peer that is not
installed is named and left out.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from atma.bench.machine import settled
from atma.bench.memory_peers import Function, titans_module, titans_peer, titans_sequence, titans_start, ttt_peer
from atma.bench.parity import Way, compare, draw
from atma.bench.timing import interleave, seconds_of
from atma.ops.fast_weights import Gates, Memory, MemoryState, Rule, fast_weights
from atma.train.allocator import keep_freed_memory

CPU = torch.device("cpu")
WIDTH, HIDDEN = 64, 256
TITANS = Rule(network="mlp", optimiser="momentum", chunk=64)
TTT = Rule(norm=True, residual="identity", average=True, chunk=16)
TTT_AS_PEER = Rule(norm=True, residual="skip", chunk=16)
"""Without the mean of a chunk's steps, which the peer does not take, and with a channel of ones for its bias."""
LONGEST_OF_TITANS = 512
CHECKED = 96
MIB = 2**20


def main() -> None:
    options = _options()
    keep_freed_memory()
    notes: list[str] = []
    with settled(options.threads):
        for part in options.parts:
            {"peers": beside_peers, "growth": growth}[part](options, notes)
    print("\n".join(f"- {note}" for note in notes))


def beside_peers(options: argparse.Namespace, notes: list[str]) -> None:
    """A table of milliseconds, ours and theirs, and how often faster ours is."""
    titans, ttt = titans_peer(TITANS.chunk, notes), ttt_peer(notes)
    _check(options.heads, titans, ttt)
    print("| | T | forward ms | peer ms | × | forward + backward ms | peer ms | × |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for length in (LONGEST_OF_TITANS, options.length):
        here = titans if length <= LONGEST_OF_TITANS else None
        _row("Titans", length, titans_text(options.heads, length), ours_titans, here, options.rounds)
    if titans is not None:
        notes.append(f"titans-pytorch holds the weights of every token: measured at {LONGEST_OF_TITANS} tokens alone")
    given = ttt_text(options.heads, options.length, WIDTH)
    theirs = None if ttt is None else partial(ttt, TTT.chunk)
    _row("TTT-Linear", options.length, given, partial(ours_ttt, TTT), theirs, options.rounds)
    _one_token(options, titans)


def _check(heads: int, titans: Function | None, ttt: Function | None) -> None:
    """ValueError unless every backend and every peer is the definition, with all gradients."""
    way = Way(torch.float32, CPU, with_gradients=True)
    given = titans_text(heads, CHECKED)
    exact = partial(_called, partial(ours_titans, backend="reference"))
    compare("Titans", partial(_called, ours_titans), exact, given, way)
    if titans is not None:
        compare("titans-pytorch", partial(_called, titans), exact, given, way.of_peer())
    given = ttt_text(heads, CHECKED, WIDTH)
    exact = partial(_called, partial(ours_ttt, TTT, backend="reference"))
    compare("TTT-Linear", partial(_called, partial(ours_ttt, TTT)), exact, given, way)
    if ttt is not None:
        given[3] = draw((heads, WIDTH, WIDTH + 1), 9)  # W⁰ so large that ε under the root changes nothing
        exact = partial(_called, partial(_as_peer, partial(ours_ttt, TTT_AS_PEER, backend="reference")))
        compare("flash-linear-attention", partial(_called, partial(_normed, ttt)), exact, given[:4], way.of_peer())


def _called(function: Function, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return function(*tensors)


def _row(name: str, length: int, given: list[Tensor], ours: Function, theirs: Function | None, rounds: int) -> None:
    given = [x.float() for x in given]
    cells = [name, f"{length:,}"]
    for train in (False, True):
        calls = {"ours": partial(_run, ours, given, train)}
        calls |= {} if theirs is None else {"theirs": partial(_run, theirs, given, train)}
        found = interleave(calls, rounds, CPU)
        cells.append(f"{found['ours'].median * 1e3:.3g}")
        them = found["theirs"].median if "theirs" in found else None
        cells += ["–", "–"] if them is None else [f"{them * 1e3:.3g}", f"{them / found['ours'].median:.3g}"]
    print(f"| {' | '.join(cells)} |", flush=True)


def _run(function: Function, given: list[Tensor], train: bool) -> None:
    """Forward, and backward to every tensor."""
    if not train:
        with torch.no_grad():
            function(*given)
        return
    leaves = [x.detach().requires_grad_() for x in given]
    torch.autograd.grad(function(*leaves)[0].square().mean(), leaves)


def titans_text(heads: int, length: int) -> list[Tensor]:
    """q, k, v, θ, γ, η and W⁰ of one row, float64."""
    q, k = (F.normalize(draw((1, heads, length, WIDTH), i), dim=-1) for i in (0, 1))
    v = draw((1, heads, length, WIDTH), 2) / WIDTH**0.5
    step, keep, momentum = (draw((1, heads, length), i).sigmoid() for i in (3, 4, 5))
    w1 = draw((heads, WIDTH, HIDDEN), 6) / HIDDEN**0.5
    return [q, k, v, 0.1 * step, 1 - 0.1 * keep, 0.9 * momentum, w1, draw((heads, HIDDEN, WIDTH), 7) / WIDTH**0.5]


def ours_titans(*given: Tensor, backend: str = "auto") -> Sequence[Tensor]:
    """What is read, and the weights behind."""
    q, k, v, step, keep, momentum, *initial = given
    read, after = fast_weights(q, k, v, Gates(step, keep, momentum), Memory(TITANS, tuple(initial)), backend=backend)
    return [read, *after.weights]


def _one_token(options: argparse.Namespace, titans: partial | None) -> None:
    """One token of Titans behind a text, from the state it left."""
    given = [x.float() for x in titans_text(options.heads, TITANS.chunk + 9)]
    before, token = ([x[:, :, part] for x in given[:6]] for part in (slice(-1), slice(-1, None)))
    with torch.no_grad():
        _, held = _read(before, given[6:], None)
        calls: dict[str, Callable[[], object]] = {"ours": partial(_read, token, given[6:], held)}
        if titans is not None:
            theirs = titans_module(titans.args[0], given[6], TITANS.chunk)
            _, state = theirs(titans_sequence(*before), state=titans_start(given))
            sequence = titans_sequence(*token)
            found = theirs(sequence, state=state)[0].unflatten(2, (options.heads, -1)).transpose(1, 2)
            torch.testing.assert_close(found, _read(token, given[6:], held)[0], rtol=1e-4, atol=1e-4)
            calls["theirs"] = lambda: theirs(sequence, state=state)
        found = {name: timing.median * 1e3 for name, timing in interleave(calls, options.rounds, CPU).items()}
    told = f", titans-pytorch {found['theirs']:.3g} ms, × {found['theirs'] / found['ours']:.3g}" if titans else ""
    print(f"\nTitans, one token: {found['ours']:.3g} ms{told}\n", flush=True)


def _read(tokens: list[Tensor], initial: list[Tensor], held: MemoryState | None) -> tuple[Tensor, MemoryState]:
    q, k, v, step, keep, momentum = tokens
    return fast_weights(q, k, v, Gates(step, keep, momentum), Memory(TITANS, tuple(initial)), held)


def ttt_text(heads: int, length: int, width: int) -> list[Tensor]:
    """q, k, v, θ and W⁰ of one row, and the norm's gain and shift, float64."""
    q, k = (F.normalize(draw((1, heads, length, width), i), dim=-1) for i in (0, 1))
    v, step = draw((1, heads, length, width), 2), draw((1, heads, length), 3).sigmoid() / width
    gain, shift = torch.ones(heads, width).double(), torch.zeros(heads, width).double()
    return [q, k, v, step, 0.02 * draw((heads, width, width), 4), gain, shift]


def ours_ttt(rule: Rule, *given: Tensor, skip: Tensor | None = None, backend: str = "auto") -> Sequence[Tensor]:
    """What is read, and the weights behind."""
    q, k, v, step, initial, gain, shift = given
    memory = Memory(rule, (initial,), gain, shift, skip)
    read, after = fast_weights(q, k, v, Gates(step), memory, backend=backend)
    return [read, *after.weights]


def _one_step(q: Tensor, k: Tensor, v: Tensor, initial: Tensor) -> list[Tensor]:
    """All that TTT takes, θ the same at every token: the peer takes the reading token's for all that it reads."""
    _, _, _, step, _, gain, shift = ttt_text(q.shape[1], q.shape[2], q.shape[3])
    return [q, k, v, *(x.to(q.dtype) for x in (torch.full_like(step, 0.02), initial, gain, shift))]


def _as_peer(ours: Function, *given: Tensor) -> Sequence[Tensor]:
    """Ours with the peer's bias as the weights of a channel of ones: the norm of the read, and the weights behind."""
    q, k, *rest = _one_step(*given)
    width = q.shape[3]
    skip = torch.eye(width, width + 1, dtype=q.dtype).repeat(q.shape[1], 1, 1)
    wide_q, wide_k = (torch.cat([x, torch.ones_like(x[..., :1])], -1) for x in (q, k))
    read, weights = ours(wide_q, wide_k, *rest, skip=skip)
    return [read - q, weights]


def _normed(ttt: Function, *given: Tensor) -> Sequence[Tensor]:
    """The peer adds what is read to its norm, which leaves the norm of the sum as that of the read."""
    read, weights = ttt(TTT_AS_PEER.chunk, *_one_step(*given))
    return [F.layer_norm(read, read.shape[-1:], eps=0.0), weights]


def growth(options: argparse.Namespace, notes: list[str]) -> None:
    """What a token takes and what a training step keeps until its backward pass, by length."""
    print("| | T | µs a token | MiB kept in training | KiB a token |\n| --- | ---: | ---: | ---: | ---: |")
    for name in ("Titans", "TTT-Linear"):
        text = titans_text if name == "Titans" else partial(ttt_text, width=WIDTH)
        ours = ours_titans if name == "Titans" else partial(ours_ttt, TTT)
        _run(ours, [x.float() for x in text(options.heads, options.lengths[0])], False)  # to warm up
        for length in options.lengths:
            given = [x.float() for x in text(options.heads, length)]
            seconds = seconds_of(partial(_run, ours, given, False), 1, CPU)
            kept = _kept(ours, given) if length <= options.trained else None
            more = ["–", "–"] if kept is None else [f"{kept / MIB:,.0f}", f"{kept / 1024 / length:,.1f}"]
            print(f"| {name} | {length:,} | {seconds / length * 1e6:.3g} | {' | '.join(more)} |", flush=True)


def _kept(ours: Function, given: list[Tensor]) -> int:
    """Bytes that autograd keeps from forward to backward, the arguments aside."""
    own, found = {x.untyped_storage().data_ptr() for x in given}, dict[int, int]()

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = ours(*(x.requires_grad_() for x in given))
    return sum(found.values())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=["peers", "growth"], choices=["peers", "growth"])
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048, help="tokens beside TTT's reference, and ours alone")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16_384, 65_536])
    parser.add_argument("--trained", type=int, default=16_384, help="the longest text whose training step is weighed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
