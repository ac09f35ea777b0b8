"""The Triton kernels of recurrences and neural memories compiled for a GPU that is not there: do they fit and spill.

    python benchmarks/gpu_compile.py --arch 90

Every case is run on tensors of the CPU with launches that compile alone. Prints, for each kernel as it is compiled, its
KiB of shared memory, registers a thread and bytes of stack (what registers could not hold), by `cuobjdump` of Triton's
wheel. Exit status: 0; 1 where a kernel takes more shared memory than a program may have on an H100, 227 KiB.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportArgumentType=false

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

MOST = 227
USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")


class Case(NamedTuple):
    """What decays, the rule, whether documents are packed, the dtype, and the widths of keys and values."""

    decay: str
    rule: str
    packed: bool
    dtype: torch.dtype
    width: int
    depth: int

    def __str__(self) -> str:
        packed = ", packed" if self.packed else ""
        return f"{self.decay} {self.rule}{packed} {str(self.dtype)[6:]} {self.width} × {self.depth}"


class MemoryCase(NamedTuple):
    """A neural memory: its name, what its `Rule` is, how wide keys, values and the hidden layer are, and packing."""

    name: str
    options: dict[str, Any]
    width: int
    hidden: int
    packed: bool = False

    def __str__(self) -> str:
        return f"memory {self.name}{', packed' if self.packed else ''} float32 {self.width} × {self.hidden}"


class Compiler:
    """The driver of a device that compiles, and launches nothing."""

    def __init__(self, arch: int) -> None:
        self.target, self.found = GPUTarget("cuda", arch, 32), []

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def launch(self, run):
        def compiled(kernel, *arguments, grid, warmup, **how):
            began = time.perf_counter()
            made = run(kernel, *arguments, grid=grid, warmup=True, **how)
            if made.hash not in {each.hash for _, each, _ in self.found}:
                self.found.append((kernel.__name__, made, time.perf_counter() - began))
            return made

        return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, default=90, help="compute capability: 80, 90, 100")
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's name must have")
    options = parser.parse_args()
    compiler = Compiler(options.arch)
    triton.runtime.driver.set_active(compiler)
    JITFunction.run = compiler.launch(JITFunction.run)
    print(f"Triton {triton.__version__}, sm_{options.arch}\n\n| case | kernel | KiB | registers | stack | s |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    worst = 0.0
    for case in cases():
        if not set(options.only) <= set(str(case).replace(",", "").split()):
            continue
        done = len(compiler.found)
        run(case)
        for name, made, seconds in compiler.found[done:]:
            size, (registers, stack) = made.metadata.shared / 1024, usage(made.asm["cubin"])
            worst = max(worst, size)
            print(f"| {case} | {name} | {size:.1f} | {registers} | {stack} | {seconds:.1f} |", flush=True)
    print(f"\n{len(compiler.found)} kernels, at most {worst:.1f} KiB of {MOST}")
    return int(worst > MOST)


def cases() -> Iterator[Case | MemoryCase]:
    """Each kernel in bfloat16 and float32 at a head's width of 128, and what the widest heads take; neural memories."""
    kinds = [("token", "delta"), ("token", "add"), ("key", "delta"), ("key", "add"), ("value", "add")]
    for dtype in (torch.bfloat16, torch.float32):
        for decay, rule in kinds:
            yield from (Case(decay, rule, packed, dtype, 128, 128) for packed in (False, True))
            yield Case(decay, rule, True, dtype, 256, 512)
    mlp = {"network": "mlp", "residual": "identity", "decay_to": "initial"}
    ttt = {"residual": "identity", "norm": True, "average": True}
    yield MemoryCase("dot, a window", {"bias": "dot", "window": 3}, 128, 1)
    for packed in (False, True):
        yield MemoryCase("titans", mlp | {"optimiser": "momentum", "radius": 4.0}, 64, 256, packed)
        yield MemoryCase("ttt", ttt, 64, 1, packed)
        yield MemoryCase("ttt", ttt | {"network": "mlp", "radius": 4.0}, 64, 256, packed)
    everything = {"optimiser": "momentum", "norm": True, "normalised": True, "bias": "huber", "activation": "silu"}
    yield MemoryCase("of everything", mlp | everything | {"radius": 4.0}, 256, 1024, True)


def run(case: Case | MemoryCase) -> None:
    """All kernels of a case, whose results are left as they were allocated."""
    if isinstance(case, MemoryCase):
        run_memory(case)
    else:
        run_recurrence(case)


def run_memory(case: MemoryCase) -> None:
    """Two chunks of 16 tokens and a part of a third, forward and backward."""
    from atma.ops.fast_weights import Gates, Memory, Rule, empty, gpu

    rule, wide = Rule(**case.options, chunk=16), case.width
    q, k, v = torch.zeros(3, 1, 2, 40, wide).unbind()
    gate = torch.zeros(1, 2, 40)
    momentum, delta = (gate if given else None for given in (rule.optimiser == "momentum", rule.bias == "huber"))
    omega = torch.zeros(1, 2, 40, rule.window) if rule.window > 1 else None
    gates = Gates(gate, None if rule.average else gate, momentum, delta, omega)
    matrices = [(wide, case.hidden), (case.hidden, wide)] if rule.network == "mlp" else [(wide, wide)]
    slow = (torch.zeros(2, wide), torch.zeros(2, wide)) if rule.norm else (None, None)
    memory = Memory(rule, tuple(torch.zeros(2, *shape) for shape in matrices), *slow)
    ids = torch.zeros(1, 40, dtype=torch.long) if case.packed else None
    read, _ = gpu.fast_weights(q, k, v.requires_grad_(), gates, memory, empty(memory, 1), ids)
    torch.autograd.grad(read.sum(), v)


def run_recurrence(case: Case) -> None:
    """Forward, backward and one token."""
    from atma.ops.recurrent import gpu

    forms = {"token": (), "key": (case.width,), "value": (case.depth,)}
    for length in (130, 1):
        q, k = torch.zeros(2, 1, 4, length, case.width, dtype=case.dtype).unbind()
        v, shape = torch.zeros(1, 2, length, case.depth, dtype=case.dtype), (1, 4, length)
        log_decay, beta = torch.zeros(*shape, *forms[case.decay]), torch.zeros(shape)
        memory = torch.zeros(1, 4, case.depth, case.width)
        ids = torch.zeros(1, length, dtype=torch.long) if case.packed else None
        given = [x.requires_grad_(length > 1) for x in (q, k, v, log_decay, beta, memory)]
        with torch.set_grad_enabled(length > 1):
            out, after = apply(gpu, case, given, ids)
        if length > 1:
            torch.autograd.grad((out, after), given, (torch.zeros_like(out), torch.zeros_like(after)))


def apply(gpu, case: Case, given: list[Tensor], ids: Tensor | None) -> tuple[Tensor, Tensor]:
    return gpu.by_value(*given, ids) if case.decay == "value" else gpu.recurrence(*given, ids, case.rule)


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers a thread, and bytes of its stack."""
    tool = Path(str(triton.__file__)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max((int(registers), int(stack)) for registers, stack in USAGE.findall(text.stdout + text.stderr))


if __name__ == "__main__":
    sys.exit(main())
