"""Peak resident memory of evaluation by context length, and of a training step by row length at equal tokens.

    python benchmarks/memory.py                        # 16K and 1M tokens of evaluation; rows of 1024 and 8192
    python benchmarks/memory.py --lengths 16384 --whole

Every case is a process of its own; its peak is the operating system's (ru_maxrss), and what importing and building the
model takes is measured beside it. A context beyond 65,536 tokens takes hours on a small machine, because attention's
time is quadratic. Unless `--whole` is given, the state of such a context is filled up to its last 2,048 tokens by
repeating the keys and values of the first 2,048, and the run goes on from there: every page of the state is in use and
every allocation has its final size, so the peak is that of the whole run. The table says so.

Nothing is printed unless chunks score as one pass does, and packed long rows train as short ones do.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from atma.config import preset
from atma.eval.stream import Streaming, hidden_chunks, score
from atma.model import Model
from atma.state import LENGTH, Leaf, ModelState, nbytes, replaced

WHOLE = 65_536
END = 2_048
STEP_TOKENS = 8_192
MIB = 2**20


def main() -> None:
    options = _options()
    if options.case is not None:
        print(json.dumps(_case(options.preset, options.case, options.whole)))
        return
    _check_parity(options.preset)
    machine = f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{options.preset}, float32, {machine}\n")
    print(f"| {'case':<51} | peak MiB | before MiB | state MiB | seconds |\n|---|---:|---:|---:|---:|", flush=True)
    cases = [f"evaluate:{length}" for length in options.lengths] + [f"train:{length}" for length in options.rows]
    for case in cases:
        found = _in_a_process(options.preset, case, options.whole)
        sizes = f"{found['peak']:8.0f} | {found['before']:10.0f} | {found['state']:9.1f} | {found['seconds']:7.1f}"
        print(f"| {found['what']:<51} | {sizes} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="nano", help="model configuration, with random weights")
    parser.add_argument("--lengths", type=int, nargs="*", default=[16_384, 1_048_576], help="contexts to evaluate")
    parser.add_argument("--rows", type=int, nargs="*", default=[1024, 8192], help="row lengths of a training step")
    parser.add_argument("--whole", action="store_true", help="run every token of every context")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_a_process(name: str, case: str, whole: bool) -> dict:
    command = [sys.executable, __file__, "--preset", name, "--case", case, *(["--whole"] if whole else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _case(name: str, case: str, whole: bool) -> dict:
    kind, size = case.split(":")
    model = _model(name)
    before, start = _peak(), time.perf_counter()
    run: Callable[[Model, int, bool], tuple[str, int]] = _evaluate if kind == "evaluate" else _train
    what, state = run(model, int(size), whole)
    seconds = time.perf_counter() - start
    return {"what": what, "peak": _peak(), "before": before, "state": state / MIB, "seconds": seconds}


def _evaluate(model: Model, length: int, whole: bool) -> tuple[str, int]:
    tokens = _tokens(model, 1, length + 1)
    held = nbytes(model.init_state(1, 1)) + (length - 1) * _bytes_a_token(model)
    if whole or length <= WHOLE:
        score(model, tokens)
        return f"evaluate {length:,} tokens", held
    _evaluate_end(model, tokens)
    return f"evaluate {length:,} tokens (state filled, last {END:,} run)", held


@torch.inference_mode()
def _evaluate_end(model: Model, tokens: torch.Tensor) -> None:
    length = tokens.shape[1] - 1
    state = model.init_state(1, length)
    chunk = Streaming().chunk
    for start in range(0, END, chunk):
        _, state = model(tokens[:, start : start + chunk], state)
    assert state is not None
    state = _filled(state, length - END)
    nats = torch.empty(1, length)
    for start, hidden in hidden_chunks(model, tokens[:, length - END : -1], state, chunk):
        stop = length - END + start + hidden.shape[1]
        nats[:, stop - hidden.shape[1] : stop] = model.loss(hidden, tokens[:, stop - hidden.shape[1] + 1 : stop + 1])


def _filled(state: ModelState, length: int) -> ModelState:
    """The state at `length` tokens, what grows in it being what it holds, over and over."""

    def filled(leaf: Leaf) -> torch.Tensor:
        if leaf.name == LENGTH:
            return torch.full_like(leaf.tensor, length)
        if leaf.axis is not None:
            for start in range(END, length, END):
                some = min(END, length - start)
                leaf.tensor.narrow(leaf.axis, start, some).copy_(leaf.tensor.narrow(leaf.axis, 0, some))
        return leaf.tensor

    return replaced(state, filled)


def _train(model: Model, length: int, whole: bool) -> tuple[str, int]:
    """Two steps: the first makes the gradients and the optimiser's memory, the second adds the activations to them."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = _tokens(model, STEP_TOKENS // length, length + 1)
    for _ in range(2):
        model.loss(model(tokens[:, :-1])[0], tokens[:, 1:]).mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=False)
    return f"training step, {STEP_TOKENS // length} × {length:,} tokens", 0


def _check_parity(name: str) -> None:
    model = _model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    tokens = _tokens(model, 1, 2049)
    whole, chunks = score(model, tokens, streaming=Streaming(2048)), score(model, tokens, streaming=Streaming(300))
    if (gap := (whole - chunks).abs().max().item()) > 1e-3:
        raise SystemExit(f"not printed: chunks score {gap:.1e} nats away from one pass")
    rows = tokens[:, :-1].view(4, 512)
    segments = torch.arange(4).repeat_interleave(512)[None]
    with torch.no_grad():
        packed, alone = model(tokens[:, :-1], segment_ids=segments)[0], model(rows)[0]
    if (gap := (packed.view_as(alone) - alone).abs().max().item()) > 1e-3:
        raise SystemExit(f"not printed: packed rows are {gap:.1e} away from short ones")


def _model(name: str) -> Model:
    return Model(preset(name), torch.Generator().manual_seed(0))


def _tokens(model: Model, rows: int, length: int) -> torch.Tensor:
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def _bytes_a_token(model: Model) -> int:
    return nbytes(model.init_state(1, 2)) - nbytes(model.init_state(1, 1))


def _peak() -> float:
    """MiB; ru_maxrss counts KiB on Linux and bytes on macOS."""
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / MIB if sys.platform == "darwin" else held / 1024


if __name__ == "__main__":
    main()
