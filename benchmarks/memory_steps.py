"""What one decoded token of a neural memory costs: the definition's step, the compiled one, and that recorded.

    python benchmarks/memory_steps.py                                   # every system with fast weights
    python benchmarks/memory_steps.py --systems titans --positions 1024 65536
    PYTHONPATH=path/to/titans-pytorch python benchmarks/memory_steps.py --systems titans --peer

A mixer of width 512 with 8 heads, whole: projections, convolution, gates and the memory. One thread; the sides in turn,
a token each, processor time of the thread, medians. Before anything is timed both sides write the same text, and the
script stops where they differ. `--peer` adds titans-pytorch's NeuralMemory with the sizes of `titans` (one MLP of depth
2 and expansion 4, a step a token, an update of the weights every 64), `--models` the nano model with `titans` alone and
as the memory of its polar layers, and `--texts` texts that are read without gradients.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from atma import state as states
from atma.config import preset
from atma.decoding import Decoder, take
from atma.mixers.base import Place
from atma.mixers.neural_config import NeuralConfig
from atma.mixers.neural_memory import NeuralMemory
from atma.mixers.neural_systems import SYSTEMS
from atma.model import Model
from atma.ops import use_backend
from atma.ops.native.recorder import Recorder

WIDTH, HEADS = 512, 8
Step = Callable[[], object]


def medians(sides: dict[str, Step], rounds: int) -> dict[str, float]:
    """Milliseconds of each, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 2):
        for name, step in sides.items():
            began = time.thread_time()
            step()
            if round_ > 1:
                seconds[name].append(time.thread_time() - began)
    return {name: 1e3 * statistics.median(found) for name, found in seconds.items()}


def made(system: str) -> NeuralMemory:
    mixer = NeuralMemory(NeuralConfig(system, heads=HEADS), Place(WIDTH, 1e-6))  # pyright: ignore[reportArgumentType]
    mixer.init_weights(torch.Generator().manual_seed(0))
    return mixer


def at(mixer: NeuralMemory, position: int):
    """A state that stands at a position."""
    state = mixer.init_state(1, position + 1000)
    return states.transform(state, lambda name, x: torch.full_like(x, position) if name == states.LENGTH else x)


def called(mixer: NeuralMemory, x: Tensor, position: int, backend: str) -> Step:
    state = at(mixer, position)

    def step() -> Tensor:
        nonlocal state
        with use_backend(backend), torch.inference_mode():
            y, state = mixer(x, state)
        return y

    return step


def recorded(mixer: NeuralMemory, x: Tensor, position: int) -> Step:
    state = at(mixer, position)
    with torch.no_grad(), Recorder([x, *states.tensors(state)]) as recorder:
        y, after = mixer(x, state)
        take(states.tensors(state), states.tensors(after), recorder.copy)
    program = recorder.program()

    def step() -> Tensor:
        program.replay()
        return y

    return step


def check(mixer: NeuralMemory, x: Tensor) -> None:
    """Stop unless the compiled step writes what the definition does."""
    first, second = called(mixer, x, 0, "reference"), called(mixer, x, 0, "native")
    for _ in range(5):
        one, other = first(), second()
        assert isinstance(one, Tensor) and isinstance(other, Tensor)
        if not (one - other).norm() <= 1e-3 * one.norm():
            raise SystemExit(f"the sides differ by {(one - other).norm() / one.norm():.1e}")


def peer(x: Tensor) -> Step:
    """titans-pytorch, behind 256 tokens."""
    from titans_pytorch import NeuralMemory as Theirs  # pyright: ignore[reportMissingImports]
    from titans_pytorch.memory_models import MemoryMLP  # pyright: ignore[reportMissingImports]

    model = MemoryMLP(WIDTH // HEADS, depth=2, expansion_factor=4.0)
    theirs = Theirs(dim=WIDTH, dim_head=WIDTH // HEADS, heads=HEADS, chunk_size=1, batch_size=64, model=model)
    with torch.inference_mode():
        _, state = theirs(x.expand(1, 256, WIDTH))

    def step() -> None:
        nonlocal state
        with torch.inference_mode():
            _, state = theirs(x, state=state)

    return step


def of_systems(arguments: argparse.Namespace) -> None:
    print("| system | position | definition ms | called ms | recorded ms | times as fast | peer ms |\n|" + " --- |" * 7)
    for system in arguments.systems:
        mixer, x = made(system), torch.randn(1, 1, WIDTH, generator=torch.Generator().manual_seed(1))
        torch.nn.init.normal_(mixer.readout.out_proj.weight, std=WIDTH**-0.5)
        check(mixer, x)
        for position in arguments.positions:
            sides = {name: called(mixer, x, position, of) for name, of in (("definition", "cpu"), ("called", "native"))}
            sides["recorded"] = recorded(mixer, x, position)
            sides |= {"peer": peer(x)} if arguments.peer and system == "titans" else {}
            found = medians(sides, arguments.rounds)
            ratio = found["definition"] / found["recorded"]
            names = ("definition", "called", "recorded", "peer")
            told = [f"{found[name]:.3f}" if name in found else "" for name in names]
            print(f"| {system} | {position:,} | {' | '.join(told[:3])} | {ratio:.0f} | {told[3]} |", flush=True)


def of_texts(arguments: argparse.Namespace) -> None:
    """Milliseconds a token of a text that is read without gradients, in chunks and as it is read now."""
    print("| system | tokens | chunks ms | now ms | times as fast |\n|" + " --- |" * 5)
    for system in arguments.systems:
        mixer, tokens = made(system), 64 if system.startswith("atlas") else 512
        x = torch.randn(1, tokens, WIDTH, generator=torch.Generator().manual_seed(1))
        sides = {backend: called(mixer, x, 0, backend) for backend in ("cpu", "native")}
        cpu, now = (found / tokens for found in medians(sides, 5).values())
        print(f"| {system} | {tokens} | {cpu:.3f} | {now:.3f} | {cpu / now:.1f} |", flush=True)


def decoder_of(config, backend: str) -> Step:
    model = Model(config).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.inference_mode():
        decoder, token = Decoder(model, model.init_state(1, 1024)), torch.zeros(1, 1, dtype=torch.long)

    def step() -> None:
        with use_backend(backend):
            decoder.step(token)

    return step


def of_models(arguments: argparse.Namespace) -> None:
    """Tokens a second of nano, recorded, beside the steps that are called and of the definition."""
    nano = preset("nano")
    polar, alone = dataclasses.replace(nano, memory="titans"), dataclasses.replace(nano, pattern=("titans",))
    for name, config in (("polar+titans", polar), ("titans", alone)):
        found = medians({one: decoder_of(config, one) for one in ("cpu", "auto")}, arguments.rounds)
        print(f"nano {name}: {1e3 / found['cpu']:.0f} tokens/s by the definition, {1e3 / found['auto']:.0f} now")


def main() -> None:
    """The tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    systems = [name for name, system in SYSTEMS.items() if system.network != "kernel"]
    parser.add_argument("--systems", nargs="*", default=systems)
    parser.add_argument("--positions", nargs="*", type=int, default=[1024])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--models", action="store_true")
    parser.add_argument("--texts", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    of_systems(arguments)
    if arguments.models:
        of_models(arguments)
    if arguments.texts:
        of_texts(arguments)


if __name__ == "__main__":
    main()
