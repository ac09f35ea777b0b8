"""From a source to a folder of token shards: tokenise, hold documents out, write, vouch. What `atma prepare` does.

One pass over the source writes the token ids of every document to a spool file; a trained tokenizer needs a pass before
it for a sample. Then all lengths are known, the validation documents are chosen (`atma.data.split`) and both splits are
written, in the order of the documents' hashes, so that neighbours in the source are not neighbours in a shard. Memory
holds a batch of texts and a few numbers per document, whatever the size of the source.

Tokenising uses every core through the threads of the `tokenizers` library. A process that forks afterwards makes that
library write a remark about TOKENIZERS_PARALLELISM; set that variable to "false" to keep to one thread without it.
"""

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atma.checkpoint import file_hash
from atma.data.dataset import FORMAT, MANIFEST, SPLITS, Split
from atma.data.sample import sample_texts
from atma.data.shards import MOST_TOKENS, Layout, layout_for, write_shard
from atma.data.sources import STDLIB, Document, LeftOut, describe, documents
from atma.data.split import RULE, cut, held_out, mix
from atma.data.staging import staged
from atma.data.summary import long_documents
from atma.data.writer import Writer
from atma.replacing import OURS
from atma.strict import check_fields
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, how much is done and of how much, where known: "sample" and "tokenise" count bytes of text,
"write train" and "write validation" count tokens."""

BATCH_CHARACTERS = 1 << 22


@dataclass(frozen=True)
class Preparation:
    """How to prepare a source."""

    tokenizer: str = "bytes"
    """"bytes", "bpe" (trained on the source), or the path of a tokenizer.json."""
    vocab_size: int = 1024
    """Ids of a trained "bpe" tokenizer; the others bring their own."""
    validation_share: float = 0.05
    """Share of documents held out, about; see `atma.data.split`."""
    shard_tokens: int = 100_000_000
    """Most tokens of a shard; a longer document has a shard of its own."""
    seed: int = 0
    """Chooses the documents that are held out, their order and a tokenizer's sample."""
    field: str = "text"
    """Key or column of the text in records and tables; meta.text for a key within a key, or messages for chats."""
    split: str | None = None
    """Which split to read where the source has several; train by default."""
    end_of_text: str | None = None
    """The token that ends a text in a tokenizer.json where neither it nor the files beside it say so."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.validation_share <= 0.5:
            raise ValueError(f"'validation_share' must be between 0 and 0.5, not {self.validation_share!r}")
        if not 1 <= self.shard_tokens <= MOST_TOKENS:
            raise ValueError(f"'shard_tokens' must be between 1 and {MOST_TOKENS}, not {self.shard_tokens!r}")
        if self.seed < 0:
            raise ValueError(f"'seed' must be 0 or more, not {self.seed!r}")
        if self.end_of_text is not None and self.tokenizer in ("bytes", "bpe"):
            raise ValueError(f"'end_of_text' is for a tokenizer.json; '{self.tokenizer}' has its own: leave it out")


class _Corpus(NamedTuple):
    """Every document's tokens in one stream, and where each starts; the rest are (documents,) arrays."""

    stream: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    bytes: np.ndarray
    hashes: np.ndarray
    validation: np.ndarray


def prepare(
    source: str | Path, out: str | Path, options: Preparation | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Turn a source (see `atma.data.sources`) into the folder `out` and return its manifest.

    An older prepared folder is replaced at once at the end. ValueError for a bad source or option, or an `out` that
    holds something else; OSError for a full disk. Then what was there before is untouched. Same source, options and
    version of `tokenizers`: same bytes.
    """
    options, progress = options or Preparation(), progress or _silent
    out = Path(out)
    _require_replaceable(out, source)
    left_out = LeftOut()
    tokenizer, size = _tokenizer(source, options, progress)
    layout = layout_for(tokenizer.vocab_size)
    with staged(out) as folder:
        spool = folder / "spool"
        corpus = _tokenise(
            spool, _marked(source, options, left_out), Writer(tokenizer, left_out), options, _Meter(progress, size)
        )
        manifest = _manifest(source, options, tokenizer, left_out)
        for name in SPLITS:
            chosen = corpus.validation == (name == "validation")
            if chosen.any():
                manifest["splits"][name] = _write_split(folder, name, corpus, chosen, layout, options, progress)
        spool.unlink()
        tokenizer.save(folder / "tokenizer.json")
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _silent(stage: str, done: int, total: int | None) -> None:
    pass


class _Meter:
    """Adds up bytes of text for a progress call."""

    def __init__(self, progress: Progress, total: int | None) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, count: int) -> None:
        self.done += count
        self.progress("tokenise", self.done, self.total)


def _require_replaceable(out: Path, source: str | Path) -> None:
    if str(source) != STDLIB and Path(source).is_dir() and out.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{out}: lies inside the source {source}; name a folder outside it")
    if out.is_file():
        raise ValueError(f"{out}: is a file; name a folder to write to")
    if out.is_dir() and set(os.listdir(out)) - OURS and not (out / MANIFEST).is_file():
        raise ValueError(f"{out}: holds something other than prepared data; name a new folder")


def _tokenizer(source: str | Path, options: Preparation, progress: Progress) -> tuple[Tokenizer, int | None]:
    """The tokenizer, and the bytes of the source where a pass over it has counted them."""
    if options.tokenizer == "bytes":
        return byte_tokenizer(), None
    if options.tokenizer != "bpe":
        return load_tokenizer(options.tokenizer, options.end_of_text), None
    stream = (document.text for document in documents(source, options.field, split=options.split))
    texts, size = sample_texts(stream, options.seed, lambda done: progress("sample", done, None))
    return train_bpe(texts, options.vocab_size), size


def _marked(source: str | Path, options: Preparation, left_out: LeftOut) -> Iterator[tuple[Document, bool]]:
    """Documents, each with whether it is for validation already: only so where there are too few to hold one out."""
    stream = documents(source, options.field, left_out, options.split)
    if options.validation_share == 0:
        yield from ((document, False) for document in stream)
        return
    first = list(islice(stream, int(1 / options.validation_share)))
    if len(first) * options.validation_share < 1:
        for document in first:
            yield from cut(document, options.validation_share)
        return
    yield from ((document, False) for document in first)
    yield from ((document, False) for document in stream)


def _tokenise(
    spool: Path,
    marked: Iterator[tuple[Document, bool]],
    writer: Writer,
    options: Preparation,
    meter: _Meter,
) -> _Corpus:
    """Write the ids of every document to the spool, each after end-of-text, and choose the validation documents."""
    tokenizer = writer.tokenizer
    dtype = layout_for(tokenizer.vocab_size).dtype
    lengths, sizes, hashes, marks = array("q"), array("q"), array("Q"), array("b")
    with spool.open("wb") as file:
        for batch in _batched(marked):
            read = 0
            for (document, mark), ids in zip(batch, writer.encode([document for document, _ in batch]), strict=True):
                read += len(document.text.encode())
                if ids is None:
                    continue
                data = document.text.encode()
                file.write(np.concatenate([[tokenizer.eot], ids]).astype(dtype).tobytes())
                lengths.append(len(ids) + 1)
                sizes.append(len(data))
                hashes.append(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))
                marks.append(mark)
            meter.add(read)
    if not lengths:
        raise ValueError(f"no document is left (left out: {writer.left_out.told()})")
    counts, validation = np.array(lengths, np.int64), np.array(marks, bool)
    mixed = mix(np.array(hashes, np.uint64), options.seed)
    if options.validation_share and not validation.any():
        validation = held_out(counts, mixed, options.validation_share)
    stream = np.memmap(spool, dtype, "r")
    return _Corpus(stream, np.cumsum(counts) - counts, counts, np.array(sizes, np.int64), mixed, validation)


def _batched(marked: Iterator[tuple[Document, bool]]) -> Iterator[list[tuple[Document, bool]]]:
    batch, characters = [], 0
    for item in marked:
        batch.append(item)
        characters += len(item[0].text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _write_split(
    folder: Path,
    name: Split,
    corpus: _Corpus,
    chosen: np.ndarray,
    layout: Layout,
    options: Preparation,
    progress: Progress,
) -> dict[str, Any]:
    order = np.flatnonzero(chosen)
    order = order[np.argsort(corpus.hashes[order], kind="stable")]
    lengths = corpus.lengths[order]
    entries = []
    for number, (low, high) in enumerate(_shard_ranges(lengths, options.shard_tokens)):
        inside = order[low:high]
        entries.append(_write_one(folder, f"{name}_{number:06d}", corpus, inside, layout))
        progress(f"write {name}", int(lengths[:high].sum()), int(lengths.sum()))
    return {
        "tokens": int(lengths.sum()),
        "documents": len(order),
        "bytes": int(corpus.bytes[order].sum()),
        "longest_document": int(lengths.max()),
        "long_documents": long_documents(lengths),
        "shards": entries,
    }


def _write_one(folder: Path, stem: str, corpus: _Corpus, inside: np.ndarray, layout: Layout) -> dict[str, Any]:
    path, index = folder / f"{stem}.bin", folder / f"{stem}.documents.npy"
    lengths = corpus.lengths[inside]
    parts = (corpus.stream[corpus.starts[i] : corpus.starts[i] + corpus.lengths[i]] for i in inside.tolist())
    digest = write_shard(path, layout, parts, int(lengths.sum()))
    np.save(index, np.cumsum(lengths) - lengths)
    return {
        "file": path.name,
        "tokens": int(lengths.sum()),
        "documents": len(inside),
        "sha256": digest,
        "index": index.name,
        "index_sha256": file_hash(index),
    }


def _shard_ranges(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Runs of documents that fill shards of at most `most` tokens, each of one document at least."""
    ends = np.cumsum(lengths)
    low = 0
    while low < len(lengths):
        done = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + most, "right")))
        yield low, high
        low = high


def _manifest(source: str | Path, options: Preparation, tokenizer: Tokenizer, left_out: LeftOut) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": 1,
        "source": describe(source),
        "skipped": dict(sorted(left_out.counts.items())),
        "passed_over": [{"file": name, "reason": left_out.files[name]} for name in sorted(left_out.files)],
        "lost_characters": dict(left_out.characters.most_common()),
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "tokenizer": {"name": tokenizer.name, "sha256": tokenizer.hash()},
        "seed": options.seed,
        "validation_share": options.validation_share,
        "validation_rule": RULE,
        "splits": {},
    }
