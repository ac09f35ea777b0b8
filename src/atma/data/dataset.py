"""A folder of token shards as one long stream with documents: what training and evaluation read.

A folder made by `atma prepare` holds shards, an index of documents beside each, the tokenizer, and `manifest.json`,
which vouches for all of them with hashes. Shards as others publish them (fineweb_train_000001.bin,
fineweb_val_000000.bin) have no manifest and are read as they are: every id is checked, and documents are found by their
end-of-text ids.

In both, a document is end-of-text followed by its tokens. So the token before a boundary predicts end-of-text, and the
model learns where documents end; and a row needs no index to know its boundaries.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atma.checkpoint import file_hash
from atma.data.document_index import read_index
from atma.data.shards import mask_bits, read_mask, read_shard, scan
from atma.replacing import recover_folder
from atma.tokenizer import Tokenizer, load_tokenizer

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
TELLS = ("passed_over", "lost_characters", "long_documents")
"""What a manifest tells and no token depends on."""
MANIFEST = "manifest.json"
CHATS = "conversations"
"""The key of a manifest that says how conversations were written."""
FORMAT = "atma token shards"
PUBLISHED_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val")}


class TokenSet:
    """One split of a folder, memory-mapped. Open it with `TokenSet.open`.

    `tokens` there are, ids below `vocab_size`; `eot` stands between documents. `tokenizer` is None where none is known.
    """

    def __init__(
        self, path: Path, shards: list[np.ndarray], starts: np.ndarray, manifest: dict[str, Any], hash: str
    ) -> None:
        """starts: where documents begin in the stream of all shards, int64, rising from 0."""
        self.path = path
        self.manifest = manifest
        self.hash = hash
        """SHA-256 of the manifest; of names, sizes, heads and tails of the shards where there is none."""
        self.vocab_size: int = manifest["vocab_size"]
        self.eot: int = manifest["eot"]
        self.tokenizer: Tokenizer | None = None
        self.masks: list[np.ndarray] = []
        """Of conversations, for each shard: which tokens are answers, a bit each."""
        self._shards = shards
        self._bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        self._starts = starts
        self.tokens = int(self._bounds[-1])

    @staticmethod
    def open(
        folder: str | Path,
        split: Split = "train",
        *,
        vocab_size: int | None = None,
        eot: int | None = None,
        verify: bool = False,
    ) -> "TokenSet":
        """Open a prepared folder, a folder of published shards, or one published shard.

        vocab_size, eot: for published shards only. Left out, they are those of a tokenizer.json beside the shards, or
        else GPT-2's for uint16 shards and Llama 3's for uint32 ones. verify: also hash every file of the split against
        the manifest and check every id (reads all of it). ValueError names the file and what is wrong with it.
        """
        folder = Path(folder)
        if split not in SPLITS:
            raise ValueError(f"split must be train or validation, not {split!r}")
        recover_folder(folder)
        if not folder.exists():
            raise ValueError(f"{folder}: no such data; make it with `atma prepare`")
        if not (folder / MANIFEST).is_file():
            return _open_published(folder, split, vocab_size, eot, verify)
        if vocab_size is not None or eot is not None:
            raise ValueError(f"{folder}: vocab_size and eot are for shards without a {MANIFEST}, which this folder has")
        return _open_prepared(folder, split, verify)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self._starts)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, its end-of-text included, int64."""
        return np.diff(self._starts, append=self.tokens)

    def document(self, i: int) -> np.ndarray:
        """Token ids (n,) int64 of document i, 0 ≤ i < documents; the first is end-of-text."""
        if not 0 <= i < self.documents:
            raise ValueError(f"document {i} does not exist; there are {self.documents}")
        start = int(self._starts[i])
        return self.read(start, start + int(self.lengths[i]))

    @property
    def template(self) -> str | None:
        """The chat template of conversations that a model learns from them, "" for those written as models without a
        template are talked to (plain, text); None for texts."""
        if not self.masks:
            return None
        known = self.manifest.get(CHATS, {}).get("template")
        return "" if known in ("plain", "text") else _template(self.path / "chat_template.jinja")

    def answers(self, i: int) -> np.ndarray:
        """Which tokens (n,) bool of document i, a conversation, are answers."""
        start = int(self._starts[i])
        shard = int(np.searchsorted(self._bounds, start, "right")) - 1
        start -= int(self._bounds[shard])
        return mask_bits(self.masks[shard], start, start + int(self.lengths[i]))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start ≤ position < stop of the stream of all shards, int64. ValueError if they are damaged."""
        if not 0 <= start <= stop <= self.tokens:
            raise ValueError(f"tokens {start:,} to {stop:,} are not within the {self.tokens:,} there are")
        out = np.empty(stop - start, np.int64)
        first = int(np.searchsorted(self._bounds, start, "right")) - 1
        for shard, bound in zip(self._shards[first:], self._bounds[first:].tolist(), strict=False):
            if bound >= stop:
                break
            low, high = max(start, bound), min(stop, bound + len(shard))
            out[low - start : high - start] = shard[low - bound : high - bound]
        if out.size and out.max() >= self.vocab_size:
            where = f"token id {out.max()} between {start:,} and {stop:,}"
            raise ValueError(f"{self.path}: {where} is outside the vocabulary of {self.vocab_size:,}: damaged data")
        return out

    def rows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Tokens (n, length) int64 of the stream from each of n start positions."""
        return np.stack([self.read(start, start + length) for start in starts.tolist()])


def _open_prepared(folder: Path, split: Split, verify: bool) -> TokenSet:
    manifest, digest = read_manifest(folder)
    part = manifest["splits"].get(split)
    if part is None:
        raise ValueError(f"{folder}: no {split} split; it has {', '.join(manifest['splits'])}")
    shards, starts, base = [], [], 0
    if verify:
        _require_listed(folder, manifest)
    for entry in part["shards"]:
        shard, index = _open_entry(folder, entry, verify)
        if verify:
            scan(folder / entry["file"], shard, manifest["vocab_size"], manifest["eot"])
        shards.append(shard)
        starts.append(index + base)
        base += len(shard)
    token_set = TokenSet(folder, shards, np.concatenate(starts), manifest, digest)
    if CHATS in manifest:
        token_set.masks = [_open_mask(folder, entry, verify) for entry in part["shards"]]
    path = folder / "tokenizer.json"
    token_set.tokenizer = load_tokenizer(path)
    if (token_set.tokenizer.eot, token_set.tokenizer.vocab_size) != (token_set.eot, token_set.vocab_size):
        raise ValueError(f"{path}: another end of text or vocabulary than {MANIFEST} says; prepare the data again")
    if file_hash(path) != manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{path}: not the tokenizer that {MANIFEST} names, or damaged; prepare the data again")
    return token_set


def _require_listed(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError if a shard or index lies in the folder that the manifest does not vouch for."""
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    listed = {entry[key] for entry in entries for key in ("file", "index")}
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".npy") and path.name not in listed
    )
    if others:
        raise ValueError(f"{folder / others[0]}: {MANIFEST} does not list it, so nothing vouches for it: remove it")


def _open_entry(folder: Path, entry: dict[str, Any], verify: bool) -> tuple[np.ndarray, np.ndarray]:
    path, index_path = folder / entry["file"], folder / entry["index"]
    shard, _ = read_shard(path)
    if len(shard) != entry["tokens"]:
        raise ValueError(f"{path}: {len(shard):,} tokens, but {MANIFEST} says {entry['tokens']:,}")
    index = read_index(index_path, len(shard))
    if len(index) != entry["documents"]:
        raise ValueError(f"{index_path}: {len(index):,} documents, but {MANIFEST} says {entry['documents']:,}")
    if verify:
        for checked, expected in ((path, entry["sha256"]), (index_path, entry["index_sha256"])):
            if file_hash(checked) != expected:
                raise ValueError(f"{checked}: damaged: not the SHA-256 that {MANIFEST} says; prepare the data again")
    return shard, index


def _open_mask(folder: Path, entry: dict[str, Any], verify: bool) -> np.ndarray:
    path = folder / entry["mask"]
    mask = read_mask(path, entry["tokens"])
    if verify and file_hash(path) != entry["mask_sha256"]:
        raise ValueError(f"{path}: damaged: not the SHA-256 that {MANIFEST} says; prepare the data again")
    return mask


def _template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such chat template; prepare the data again") from None


def read_manifest(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest of a prepared folder and the hash of its data. ValueError if `atma prepare` did not write it."""
    path = folder / MANIFEST
    data = path.read_bytes()
    try:
        manifest = json.loads(data)
        _require_manifest(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: not a manifest of token shards, or damaged; prepare the data again") from None
    return manifest, data_hash(manifest)


def data_hash(manifest: dict[str, Any]) -> str:
    """SHA-256 of a manifest without what it only tells: the same data has one hash, whatever else is told of it."""
    kept = {key: value for key, value in manifest.items() if key not in TELLS}
    kept["splits"] = {
        name: {k: v for k, v in split.items() if k not in TELLS} for name, split in kept["splits"].items()
    }
    return hashlib.sha256((json.dumps(kept, indent=1, ensure_ascii=False) + "\n").encode()).hexdigest()


def _require_manifest(manifest: dict[str, Any]) -> None:
    """Raise any of ValueError, KeyError, TypeError, AttributeError unless every field that is read later is there."""
    sound = manifest["format"] == FORMAT and isinstance(manifest["tokenizer"]["sha256"], str)
    sound = sound and isinstance(manifest["vocab_size"], int) and isinstance(manifest["eot"], int)
    for split in manifest["splits"].values():
        for entry in split["shards"]:
            sound = sound and all(isinstance(entry[key], int) for key in ("tokens", "documents"))
            sound = sound and all(isinstance(entry[key], str) for key in ("sha256", "index_sha256"))
            files = ("file", "index", "mask") if CHATS in manifest else ("file", "index")
            sound = sound and all(Path(entry[key]).name == entry[key] for key in files)
        sound = sound and len(split["shards"]) > 0
    if not sound:
        raise ValueError


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


def _open_published(folder: Path, split: Split, vocab_size: int | None, eot: int | None, verify: bool) -> TokenSet:
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
