"""One token shard: the `.bin` file that llm.c and modded-nanogpt train from, written and read with every check.

256 little-endian int32 of header, then the tokens. Header: [0] magic, [1] version, [2] number of tokens.
Magic 20240520, version 1: uint16 tokens (GPT-2). Magic 20240801, version 7: uint32 tokens (Llama 3), which we take for
any vocabulary beyond 65,536. Source: llm.c, dev/data/data_common.py.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
MOST_TOKENS = 2**31 - 1
SCAN_TOKENS = 1 << 24


class Layout(NamedTuple):
    """One of the two published variants, with the vocabulary its publisher uses it for."""

    magic: int
    version: int
    dtype: np.dtype
    vocab_size: int
    eot: int


class Tokens(Protocol):
    """The tokens of a shard, wherever they lie."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> np.ndarray: ...


SHORT = Layout(20240520, 1, np.dtype("<u2"), 50_257, 50_256)
LONG = Layout(20240801, 7, np.dtype("<u4"), 128_256, 128_000)
LAYOUTS = {layout.magic: layout for layout in (SHORT, LONG)}


def layout_for(vocab_size: int) -> Layout:
    """uint16 tokens where they suffice, else uint32."""
    return SHORT if vocab_size <= 2**16 else LONG


def write_shard(path: Path, layout: Layout, parts: Iterable[np.ndarray], tokens: int) -> str:
    """Write a shard of `tokens` ids given in parts; flushed to the disk. Returns its SHA-256 in hexadecimal.

    OSError if the disk is full. ValueError if the parts do not add up or an id does not fit.
    """
    if not 0 < tokens <= MOST_TOKENS:
        raise ValueError(f"{path}: a shard holds 1 to {MOST_TOKENS:,} tokens, not {tokens:,}")
    header = np.zeros(HEADER_INTS, "<i4")
    header[:3] = layout.magic, layout.version, tokens
    digest, written, most = hashlib.sha256(header.tobytes()), 0, np.iinfo(layout.dtype).max
    with path.open("wb") as file:
        file.write(header.tobytes())
        for part in parts:
            if part.size and not 0 <= part.min() <= part.max() <= most:
                raise ValueError(f"{path}: token ids {part.min()} to {part.max()} do not fit {layout.dtype.name}")
            data = part.astype(layout.dtype).tobytes()
            digest.update(data)
            file.write(data)
            written += part.size
        if written != tokens:
            raise ValueError(f"{path}: {written:,} tokens came where {tokens:,} were announced")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def write_mask(path: Path, answers: np.ndarray) -> str:
    """Write which tokens of a shard (n,) bool are answers, a bit each. Returns the file's SHA-256 in hexadecimal."""
    data = np.packbits(answers).tobytes()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(data).hexdigest()


def read_mask(path: Path, tokens: int) -> np.ndarray:
    """Memory-map the mask of a shard of so many tokens, for `mask_bits`. ValueError: missing, or of another size."""
    expected = -(-tokens // 8)
    if not path.is_file():
        raise ValueError(f"{path}: no such mask of answers")
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, where {tokens:,} tokens need {expected:,}: damaged")
    return np.memmap(path, np.uint8, "r")


def mask_bits(mask: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Which of the tokens start ≤ position < stop of a shard are answers, (stop − start,) bool."""
    bits = np.unpackbits(mask[start // 8 : -(-stop // 8)])
    return bits[start % 8 : start % 8 + stop - start].astype(bool)


def read_shard(path: Path) -> tuple[np.ndarray, Layout]:
    """Memory-map the tokens of a shard. ValueError names the file and what is wrong: magic, version or size."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{path}: no such token shard") from None
    with path.open("rb") as file:
        layout, tokens = layout_of(path, file.read(HEADER_BYTES), size)
    return np.asarray(np.memmap(path, layout.dtype, "r", HEADER_BYTES, (tokens,))), layout


def layout_of(name: object, head: bytes, size: int) -> tuple[Layout, int]:
    """Layout and number of tokens of a shard of `size` bytes that begins with `head`. ValueError: what is wrong."""
    if size < HEADER_BYTES or len(head) < HEADER_BYTES:
        raise ValueError(f"{name}: truncated: {size:,} bytes, and the header alone has {HEADER_BYTES:,}")
    header = np.frombuffer(head, "<i4", HEADER_INTS)
    layout = LAYOUTS.get(int(header[0]))
    if layout is None:
        known = " or ".join(str(magic) for magic in LAYOUTS)
        raise ValueError(f"{name}: wrong magic {header[0]}; a token shard begins with {known}")
    if header[1] != layout.version:
        raise ValueError(f"{name}: wrong version {header[1]}; magic {layout.magic} goes with version {layout.version}")
    tokens = int(header[2])
    expected = HEADER_BYTES + tokens * layout.dtype.itemsize
    if tokens < 1 or size != expected:
        kind = "truncated" if 0 < size < expected else "wrong size"
        raise ValueError(f"{name}: {kind}: {size:,} bytes, but its header announces {tokens:,} tokens = {expected:,}")
    return layout, tokens


def scan(path: Path, tokens: Tokens, vocab_size: int, eot: int) -> np.ndarray:
    """Check every id of a shard and find the end-of-text ids: their positions, int64. Bounded memory.

    ValueError names the first id that is outside the vocabulary and where it stands.
    """
    found = []
    for start in range(0, len(tokens), SCAN_TOKENS):
        part = tokens[start : start + SCAN_TOKENS]
        if int(part.max()) >= vocab_size:
            at = int(np.argmax(part >= vocab_size))
            where = f"token id {part[at]} at {start + at:,}"
            raise ValueError(f"{path}: {where} is outside the vocabulary of {vocab_size:,}")
        found.append(np.flatnonzero(part == eot) + start)
    return np.concatenate(found)
