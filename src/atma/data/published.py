"""Token shards as others publish them, without a manifest: checked id by id, their documents found by end-of-text."""

import hashlib
from pathlib import Path

import numpy as np

from atma.data.dataset import MANIFEST, Split, TokenSet
from atma.data.shards import read_shard, scan
from atma.tokenizer import load_tokenizer

PUBLISHED_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val")}


def _published_files(folder: Path, split: Split) -> list[Path]:
    if folder.is_file():
        return [folder]
    files = sorted(folder.glob("*.bin"))
    if not files:
        raise ValueError(f"{folder}: neither {MANIFEST} nor .bin shards in it; make them with `atma prepare`")
    chosen = [path for path in files if any(name in path.stem for name in PUBLISHED_NAMES[split])]
    if not chosen:
        names = "' or '".join(PUBLISHED_NAMES[split])
        raise ValueError(f"{folder}: no {split} shard; none of its {len(files)} .bin files has '{names}' in its name")
    return chosen


def open_published(folder: Path, split: Split, vocab_size: int | None, eot: int | None, verify: bool) -> TokenSet:
    """Open a folder of such shards, or one; see `TokenSet.open`."""
    paths = _published_files(folder, split)
    if verify:
        raise ValueError(f"{folder}: nothing to verify against: no {MANIFEST} beside the shards")
    opened = [read_shard(path) for path in paths]
    layout = opened[0][1]
    for path, (_, other) in zip(paths, opened, strict=True):
        if other != layout:
            raise ValueError(f"{path}: magic {other.magic}, but {paths[0].name} has {layout.magic}; keep them apart")
    tokenizer = load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None
    known = tokenizer or layout
    vocab_size = known.vocab_size if vocab_size is None else vocab_size
    eot = known.eot if eot is None else eot
    shards = [shard for shard, _ in opened]
    manifest = {"vocab_size": vocab_size, "eot": eot, "source": ", ".join(path.name for path in paths)}
    token_set = TokenSet(folder, shards, _boundaries(paths, shards, vocab_size, eot), manifest, _fingerprint(paths))
    token_set.tokenizer = tokenizer
    return token_set


def _boundaries(paths: list[Path], shards: list[np.ndarray], vocab_size: int, eot: int) -> np.ndarray:
    """Starts of documents in all shards together. The first shard may begin inside a document, others continue one."""
    starts, base = [], 0
    for path, shard in zip(paths, shards, strict=True):
        starts.append(scan(path, shard, vocab_size, eot) + base)
        base += len(shard)
    found = np.concatenate(starts)
    return found if len(found) and found[0] == 0 else np.concatenate([[0], found])


def _fingerprint(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}\n".encode() + file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()
