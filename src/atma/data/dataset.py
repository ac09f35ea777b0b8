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
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atma.data.document_index import read_index
from atma.data.remote import Cache, Remote, RemoteShard, cache_place, is_remote, put
from atma.data.shards import mask_bits, read_mask, read_shard, scan
from atma.folders import file_hash
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


Shard = np.ndarray | RemoteShard


class TokenSet:
    """One split of a folder, memory-mapped. Open it with `TokenSet.open`.

    `tokens` there are, ids below `vocab_size`; `eot` stands between documents. `tokenizer` is None where none is known.
    """

    def __init__(
        self, path: Path, shards: Sequence[Shard], starts: np.ndarray, manifest: dict[str, Any], hash: str
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
        """Open a prepared folder, here or elsewhere (s3://…: `atma.data.remote`), or published shards: a folder or one.

        vocab_size, eot: for published shards only. Left out, they are those of a tokenizer.json beside the shards, or
        else GPT-2's for uint16 shards and Llama 3's for uint32 ones. verify: also hash every file of the split against
        the manifest and check every id (reads all of it). ValueError names the file and what is wrong with it.
        """
        if split not in SPLITS:
            raise ValueError(f"split must be train or validation, not {split!r}")
        folder = folder if is_remote(folder) else Path(folder)
        if isinstance(folder, Path):
            recover_folder(folder)
        if isinstance(folder, Path) and not folder.exists():
            raise ValueError(f"{folder}: no such data; make it with `atma prepare`")
        if isinstance(folder, Path) and not (folder / MANIFEST).is_file():
            from atma.data.published import open_published

            return open_published(folder, split, vocab_size, eot, verify)
        if vocab_size is not None or eot is not None:
            raise ValueError(f"{folder}: vocab_size and eot are for shards without a {MANIFEST}, which this folder has")
        return (
            _open_prepared(folder, split, verify) if isinstance(folder, Path) else _open_remote(folder, split, verify)
        )

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
        path = self.path / "chat_template.jinja"
        if known not in ("plain", "text") and not path.is_file():
            raise ValueError(f"{path}: no such chat template; prepare the data again")
        return "" if known in ("plain", "text") else path.read_text(encoding="utf-8")

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
        self._want([(start, start + length) for start in starts.tolist()])
        return np.stack([self.read(start, start + length) for start in starts.tolist()])

    def _want(self, spans: list[tuple[int, int]]) -> None:
        """Have what lies elsewhere fetched together."""
        for shard, bound in zip(self._shards, self._bounds.tolist(), strict=False):
            if isinstance(shard, RemoteShard):
                inside = [(max(low - bound, 0), min(high - bound, len(shard))) for low, high in spans]
                shard.want((low, high) for low, high in inside if low < high)


def _open_prepared(folder: Path, split: Split, verify: bool, remote: Remote | None = None) -> TokenSet:
    """Open a folder; with `remote`, one that holds what is small of it, and blocks of its shards."""
    manifest, digest = read_manifest(folder)
    part = _part(folder if remote is None else remote.name, manifest, split)
    elsewhere = None if remote is None else (remote, Cache(folder.parent / "blocks", cache_place()[1]))
    shards: list[Shard] = []
    starts, base = [], 0
    if verify and remote is None:
        _require_listed(folder, manifest)
    for entry in part["shards"]:
        shard = RemoteShard(*elsewhere, entry) if elsewhere else _open_shard(folder / entry["file"], entry)
        index = _open_index(folder, entry, verify)
        if verify:
            _verify(folder / entry["file"], shard, entry, manifest)
        shards.append(shard)
        starts.append(index + base)
        base += len(shard)
    token_set = TokenSet(folder, shards, np.concatenate(starts), manifest, digest)
    if CHATS in manifest:
        token_set.masks = [_open_mask(folder, entry, verify) for entry in part["shards"]]
    token_set.tokenizer = _own_tokenizer(folder / "tokenizer.json", token_set)
    return token_set


def _open_remote(name: str, split: Split, verify: bool) -> TokenSet:
    """Fetch what is small of a folder elsewhere and open it."""
    remote, (cache, _) = Remote(name), cache_place()
    data = remote.read(MANIFEST)
    folder = cache / hashlib.sha256(name.encode() + data).hexdigest()[:32]
    put(folder / MANIFEST, data)
    manifest, _ = read_manifest(folder)
    remote.whole("tokenizer.json", folder, manifest["tokenizer"]["sha256"])
    if CHATS in manifest:
        remote.whole("chat_template.jinja", folder, manifest[CHATS]["sha256"])
    for entry in _part(name, manifest, split)["shards"]:
        for kind in ("index", "mask") if CHATS in manifest else ("index",):
            remote.whole(entry[kind], folder, entry[f"{kind}_sha256"])
    return _open_prepared(folder, split, verify, remote)


def _part(name: object, manifest: dict[str, Any], split: Split) -> dict[str, Any]:
    if split not in manifest["splits"]:
        raise ValueError(f"{name}: no {split} split; it has {', '.join(manifest['splits'])}")
    return manifest["splits"][split]


def _own_tokenizer(path: Path, token_set: TokenSet) -> Tokenizer:
    """The tokenizer of prepared data. ValueError: another than the manifest names."""
    tokenizer = load_tokenizer(path)
    if (tokenizer.eot, tokenizer.vocab_size) != (token_set.eot, token_set.vocab_size):
        raise ValueError(f"{path}: another end of text or vocabulary than {MANIFEST} says; prepare the data again")
    if file_hash(path) != token_set.manifest["tokenizer"]["sha256"]:
        raise ValueError(f"{path}: not the tokenizer that {MANIFEST} names, or damaged; prepare the data again")
    return tokenizer


def _require_listed(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError if a shard or index lies in the folder that the manifest does not vouch for."""
    entries = [entry for split in manifest["splits"].values() for entry in split["shards"]]
    listed = {entry[key] for entry in entries for key in ("file", "index")}
    others = sorted(
        path.name for path in folder.iterdir() if path.suffix in (".bin", ".npy") and path.name not in listed
    )
    if others:
        raise ValueError(f"{folder / others[0]}: {MANIFEST} does not list it, so nothing vouches for it: remove it")


def _open_shard(path: Path, entry: dict[str, Any]) -> np.ndarray:
    shard, _ = read_shard(path)
    if len(shard) != entry["tokens"]:
        raise ValueError(f"{path}: {len(shard):,} tokens, but {MANIFEST} says {entry['tokens']:,}")
    return shard


def _open_index(folder: Path, entry: dict[str, Any], verify: bool) -> np.ndarray:
    path = folder / entry["index"]
    index = read_index(path, entry["tokens"])
    if len(index) != entry["documents"]:
        raise ValueError(f"{path}: {len(index):,} documents, but {MANIFEST} says {entry['documents']:,}")
    if verify:
        _require_hash(path, file_hash(path), entry["index_sha256"])
    return index


def _verify(path: Path, shard: Shard, entry: dict[str, Any], manifest: dict[str, Any]) -> None:
    _require_hash(path, shard.hash if isinstance(shard, RemoteShard) else file_hash(path), entry["sha256"])
    scan(path, shard, manifest["vocab_size"], manifest["eot"])


def _require_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path}: damaged: not the SHA-256 that {MANIFEST} says; prepare the data again")


def _open_mask(folder: Path, entry: dict[str, Any], verify: bool) -> np.ndarray:
    path = folder / entry["mask"]
    mask = read_mask(path, entry["tokens"])
    if verify:
        _require_hash(path, file_hash(path), entry["mask_sha256"])
    return mask


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
