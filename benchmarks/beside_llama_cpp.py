"""Beside llama.cpp: the next token at a context, and a prompt, with weights of every width, each side in turn.

    pip install llama-cpp-python gguf 'atma-lm[bench]'
    python benchmarks/beside_llama_cpp.py --presets nano base --contexts 1024 16384 --rounds 5

llama.cpp runs an LFM2 of the same depth, width, heads and number of parameters, with random weights, written with the
package gguf: its convolutions, its attention and its 16-bit keys and values as they are by default. A side reads a
block of tokens, then the next does; medians of wall time over rounds, and the ratio of medians. Nothing else may run.
"""

import argparse
import ctypes
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from atma.bench.hugging_face import layers_of, peers
from atma.bench.models import Ours
from atma.config import ModelConfig, preset
from atma.ops.narrow import Width

try:
    import gguf
    import llama_cpp
except ModuleNotFoundError as error:  # the options can be asked without them
    MISSING = error.name
else:
    MISSING = None

CPU = torch.device("cpu")
PAIRS: dict[str, tuple[tuple[torch.dtype, Width | None], str]] = {
    "float32": ((torch.float32, None), "F32"),
    "16 bits": ((torch.bfloat16, None), "BF16"),
    "8 bits": ((torch.float32, "int8"), "Q8_0"),
    "4 bits": ((torch.float32, "int4"), "Q4_0"),
}
"""Of a width: ours, and the type of llama.cpp's matrices."""
BLOCK = 16
"""Tokens that a side writes in its turn."""
WAIT = 0.05
"""Seconds between turns: threads of the other side that wait in a loop have given up by then."""


def write(path: Path, config: ModelConfig, kind: str) -> int:
    """An LFM2 like ours, its matrices of a type of ggml; and how many numbers it has."""
    notes: list[str] = []
    found = [one for one in peers(config, torch.float32, CPU, notes) if one.name == "LFM2"]
    if not found:
        raise SystemExit("; ".join(notes))
    layers, between = layers_of(config), 32 * round(found[0].config.intermediate_size / 32)  # whole groups of its types
    assert layers is not None
    writer = gguf.GGUFWriter(path, "lfm2")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.depth)
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.width)
    writer.add_feed_forward_length(between)
    writer.add_head_count(layers.heads)
    writer.add_head_count_kv([layers.groups if attends else 0 for attends in layers.attending])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_shortconv_l_cache(layers.taps)
    random, count = np.random.default_rng(0), 0
    for name, shape in tensors(config, between):
        small = len(shape) == 1 or "conv.conv" in name
        x = np.ones(shape, np.float32) if len(shape) == 1 else random.standard_normal(shape, np.float32) * 0.02
        of = gguf.GGMLQuantizationType.F32 if small else gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(x, of), raw_dtype=of)
        count += x.size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return count


def tensors(config: ModelConfig, between: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes, rows first."""
    layers, wide = layers_of(config), config.width
    assert layers is not None
    yield "token_embd.weight", (config.vocab_size, wide)
    if not config.tied_head:
        yield "output.weight", (config.vocab_size, wide)
    yield "token_embd_norm.weight", (wide,)
    for i, attends in enumerate(layers.attending):
        inner = layers.groups * layers.head_width
        yield f"blk.{i}.attn_norm.weight", (wide,)
        if attends:
            for part, rows in (("q", wide), ("k", inner), ("v", inner), ("output", wide)):
                yield f"blk.{i}.attn_{part}.weight", (rows, wide)
            for part in "qk":
                yield f"blk.{i}.attn_{part}_norm.weight", (layers.head_width,)
        else:
            yield f"blk.{i}.shortconv.conv.weight", (wide, layers.taps)
            yield f"blk.{i}.shortconv.in_proj.weight", (3 * wide, wide)
            yield f"blk.{i}.shortconv.out_proj.weight", (wide, wide)
        yield f"blk.{i}.ffn_norm.weight", (wide,)
        yield f"blk.{i}.ffn_gate.weight", (between, wide)
        yield f"blk.{i}.ffn_up.weight", (between, wide)
        yield f"blk.{i}.ffn_down.weight", (wide, between)


class Theirs:
    """llama.cpp with a file of weights."""

    def __init__(self, path: Path, vocabulary: int, context: int, threads: int) -> None:
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), settings)
        sizes = llama_cpp.llama_context_default_params()
        sizes.n_ctx, sizes.n_batch, sizes.n_ubatch = context, min(context, 2048), 512
        sizes.n_threads = sizes.n_threads_batch = threads
        self.context: Any = llama_cpp.llama_init_from_model(self.model, sizes)
        if not self.context:
            raise SystemExit(f"llama.cpp does not take {path.name}")
        self._random, self._vocabulary = np.random.default_rng(1), vocabulary

    def read(self, count: int) -> None:
        """So many tokens behind what it has read; the scores of the last are computed."""
        for start in range(0, count, 1024):
            some = self._random.integers(0, self._vocabulary, min(1024, count - start)).tolist()
            tokens = (llama_cpp.llama_token * len(some))(*some)  # a batch is but its address
            batch = llama_cpp.llama_batch_get_one(tokens, len(some))
            if llama_cpp.llama_decode(self.context, batch):
                raise SystemExit("llama.cpp could not read")
        scores = llama_cpp.llama_get_logits_ith(self.context, -1)
        found = np.ctypeslib.as_array(ctypes.cast(scores, ctypes.POINTER(ctypes.c_float)), (self._vocabulary,))
        if not np.isfinite(found).all():
            raise SystemExit("llama.cpp's scores are not finite")

    def forget(self) -> None:
        """Begin a new text."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def close(self) -> None:
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)


def sides(config: ModelConfig, options: argparse.Namespace, width: str, context: int, folder: Path) -> dict[str, Any]:
    """Of a width, calls that write a block and that read a prompt, ours and theirs, and what frees theirs."""
    (dtype, weights), kind = PAIRS[width]
    ours, path = Ours(config, "auto", dtype, CPU, weights), folder / f"{kind}.gguf"
    if not path.exists():
        numbers = write(path, config, kind)
        print(f"numbers: {ours.parameters():,} ours, {numbers:,} in {path.name}", flush=True)
    room = context + (options.rounds + 2) * BLOCK + 64
    theirs = Theirs(path, config.vocab_size, room, options.threads)
    theirs.read(context)
    step = ours.decoder(1, context)[0]
    calls = {
        "ours": lambda: [step() for _ in range(BLOCK)],
        "llama.cpp": lambda: [theirs.read(1) for _ in range(BLOCK)],
    }
    return {"decode": calls, "close": theirs.close}


def prompts(config: ModelConfig, options: argparse.Namespace, width: str, folder: Path) -> dict[str, Any]:
    """The same of prompts."""
    (dtype, weights), kind = PAIRS[width]
    theirs = Theirs(folder / f"{kind}.gguf", config.vocab_size, options.prompt + 64, options.threads)
    read = Ours(config, "auto", dtype, CPU, weights).prefill(1, options.prompt)[0]

    def other() -> None:
        theirs.forget()
        theirs.read(options.prompt)

    return {"prompt": {"ours": read, "llama.cpp": other}, "close": theirs.close}


def timed(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call in each round, after one that is not told."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(WAIT)
            began = time.perf_counter()
            call()
            if round_:
                found[name].append(time.perf_counter() - began)
    return found


def told(what: str, found: dict[str, list[float]], tokens: int) -> None:
    """A row of the table."""
    rates = {name: tokens / statistics.median(times) for name, times in found.items()}
    ratios = sorted(b / a for a, b in zip(found["ours"], found["llama.cpp"], strict=True))
    spread = f"{ratios[len(ratios) // 4]:.2f}–{ratios[-1 - len(ratios) // 4]:.2f}"
    print(f"| {what} | {rates['ours']:,.1f} | {rates['llama.cpp']:,.1f} | "
          f"{statistics.median(ratios):.2f} ({spread}) |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["nano", "base"])
    parser.add_argument("--widths", nargs="+", default=list(PAIRS), choices=PAIRS)
    parser.add_argument("--contexts", nargs="*", type=int, default=[1024, 16384])
    parser.add_argument("--prompt", type=int, default=1024, help="its tokens; 0: none is read")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if MISSING:
        parser.exit(2, f"{MISSING} is not installed: pip install llama-cpp-python gguf\n")
    torch.set_num_threads(options.threads)
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    print("| | ours, tokens/s | llama.cpp, tokens/s | ours / theirs |\n|---|---:|---:|---:|")
    for name in options.presets:
        config = preset(name)
        with tempfile.TemporaryDirectory() as folder:
            for width in options.widths:
                for context in options.contexts:
                    made = sides(config, options, width, context, Path(folder))
                    told(f"{name}, {width}, a token at {context:,}", timed(made["decode"], options.rounds), BLOCK)
                    made["close"]()
                if options.prompt:
                    made = prompts(config, options, width, Path(folder))
                    found = timed(made["prompt"], options.rounds)
                    told(f"{name}, {width}, a prompt of {options.prompt:,}", found, options.prompt)
                    made["close"]()
                for kind in {pair[1] for pair in PAIRS.values()} - {PAIRS[width][1]}:
                    (Path(folder) / f"{kind}.gguf").unlink(missing_ok=True)


if __name__ == "__main__":
    main()
