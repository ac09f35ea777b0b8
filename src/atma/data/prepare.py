"""From a source to a folder of token shards: tokenise, hold documents out, write, vouch. What `atma prepare` does.

One pass over the source writes the token ids of every document to a spool on the disk; a trained tokenizer needs a pass
before it for a sample. Then all lengths are known, the validation documents are chosen (`atma.data.split`) and both
splits are written, in the order of the documents' hashes, so that neighbours in the source are not neighbours in a
shard. Memory holds a few batches of texts and a few numbers per document, whatever the size of the source.

This process reads, and others tokenise (`atma.data.worker`), a batch each; what they return is put down in order, so
their number changes no byte. A preparation that was killed reads its source again from the beginning, which takes
little of the time, and tokenises none of the batches that its spool holds and that are what they were.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from atma.data.conversations import CONVERSATIONS, said
from atma.data.corpus import Corpus, Progress, write_split
from atma.data.dataset import FORMAT, MANIFEST, SPLITS
from atma.data.encoders import Encoding, encode_batch
from atma.data.preparation import Preparation
from atma.data.sample import sample_texts
from atma.data.shards import layout_for
from atma.data.sources import STDLIB, Document, LeftOut, describe, documents, size_of
from atma.data.split import RULE, cut, held_out, mix
from atma.data.spool import Spool
from atma.data.staging import staged
from atma.data.worker import Batch, Workers
from atma.data.writer import encoding_for, resolved
from atma.hashes import code_hash
from atma.replacing import OURS
from atma.threads import cores
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

BATCH_CHARACTERS = 1 << 21
FEW = 4
"""Batches of a source that is not worth beginning processes for."""


def prepare(
    source: str | Path,
    out: str | Path,
    options: Preparation | None = None,
    progress: Progress | None = None,
    *,
    workers: int = 0,
    restart: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Turn a source (see `atma.data.sources`) into the folder `out` and return its manifest.

    workers: processes that tokenise; 0 for one a core, 1 for none but this. restart: do not go on from what an
    interrupted preparation left. say: gets a line where it does. An older prepared folder is replaced at once at the
    end. ValueError for a bad source or option, or an `out` that holds something else; OSError for a full disk. Then
    what was there before is untouched. Same source, options and version of `tokenizers`: same bytes, whatever the
    number of workers and the interruptions.
    """
    options, progress, say = options or Preparation(), progress or _silent, say or _unsaid
    if workers < 0:
        raise ValueError(f"'workers' must be 0 (one a core) or more, not {workers}")
    out = Path(out)
    _require_replaceable(out, source)
    options = resolved(source, options)
    tokenizer, size = _tokenizer(source, options, progress)
    encoding = encoding_for(source, tokenizer, options)
    layout, left_out = layout_for(tokenizer.vocab_size), LeftOut()
    left_out.skips_bad = options.skip_bad
    with Spool(out, _key(source, options, encoding), restart, say) as spool, staged(out) as folder:
        if spool.batches:
            told = sum(batch["documents"] for batch in spool.batches)
            say(f"going on with an unfinished preparation: {told:,} documents are tokenised")
        meter = _Meter(progress, size or size_of(source))
        _fill(spool, _batched(_marked(source, options, left_out)), encoding, workers or cores(), left_out, meter)
        corpus = _corpus(spool, options, layout.dtype, left_out)
        manifest = _manifest(source, options, tokenizer, left_out) | encoding.manifest()
        for name in SPLITS:
            chosen = corpus.validation == (name == "validation")
            if chosen.any():
                most = options.shard_tokens
                manifest["splits"][name] = write_split(folder, name, corpus, chosen, layout, most, progress)
        encoding.save(folder)
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return manifest


def _unsaid(line: str) -> None:
    pass


def _key(source: str | Path, options: Preparation, encoding: Encoding) -> dict[str, Any]:
    """What decides the bytes, so that an unfinished preparation may be gone on with; but for the source's content."""
    return {
        "source": describe(source),
        "options": dataclasses.asdict(options),
        "tokenizer": encoding.tokenizer.hash(),
        "template": encoding.manifest() | {"most": encoding.most, "ends": encoding.ends},
        "code": [code_hash(), tokenizers.__version__, platform.python_version()],
    }


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
    if options.model:
        return load_tokenizer(options.model), None
    if options.tokenizer == "bytes":
        return byte_tokenizer(), None
    if options.tokenizer != "bpe":
        return load_tokenizer(options.tokenizer, options.end_of_text), None
    field = CONVERSATIONS if options.read == "conversations" else options.field
    stream = (said(document.text) for document in documents(source, field, split=options.split))
    texts, size = sample_texts(stream, options.seed, lambda done: progress("sample", done, None))
    return train_bpe(texts, options.vocab_size), size


def _marked(source: str | Path, options: Preparation, left_out: LeftOut) -> Iterator[tuple[Document, bool]]:
    """Documents, each with whether it is for validation already: only so where there are too few to hold one out."""
    field = CONVERSATIONS if options.read == "conversations" else options.field
    stream = documents(source, field, left_out, options.split)
    if options.validation_share == 0 or options.read == "conversations":  # of which no end can be cut off
        yield from ((document, False) for document in stream)
        return
    enough = math.ceil(1 / options.validation_share)
    first = list(islice(stream, enough))
    if len(first) < enough:
        for document in first:
            yield from cut(document, options.validation_share)
        return
    yield from ((document, False) for document in first)
    yield from ((document, False) for document in stream)


def _fill(
    spool: Spool, batches: Iterator[Batch], encoding: Encoding, workers: int, left_out: LeftOut, meter: _Meter
) -> None:
    """Tokenise into the spool what it does not hold yet, and note all that is left out."""
    read: deque[tuple[str, int]] = deque()
    fresh = _unread(spool, batches, read, left_out, meter)
    dtype = layout_for(encoding.tokenizer.vocab_size).dtype
    first = list(islice(fresh, FEW if workers > 1 else 0))
    with contextlib.ExitStack() as stack:
        if workers > 1 and len(first) == FEW:
            encoded = stack.enter_context(Workers(encoding, dtype, workers)).encode(chain(first, fresh))
        else:
            writer = stack.enter_context(encoding.writer())
            encoded = (encode_batch(writer, batch, dtype) for batch in chain(first, fresh))
        for batch in encoded:
            digest, size = read.popleft()
            spool.append(digest, batch)
            left_out.add(batch.counts, batch.characters)
            meter.add(size)


def _unread(
    spool: Spool, batches: Iterator[Batch], read: deque[tuple[str, int]], left_out: LeftOut, meter: _Meter
) -> Iterator[Batch]:
    """The batches that the spool does not hold; `read` gets the hash and bytes of each."""
    held, kept = [*spool.batches], 0
    for batch in batches:
        digest, size = _read(batch)
        if kept < len(held) and held[kept]["read"] == digest:
            left_out.add(held[kept]["counts"], held[kept]["characters"])
            meter.add(size)
            kept += 1
            continue
        if held:
            spool.keep(kept)
            held = []
        read.append((digest, size))
        yield batch
    if held:
        spool.keep(kept)


def _read(batch: Batch) -> tuple[str, int]:
    """A hash of the texts of a batch, and their bytes."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    for document, mark in batch:
        data = document.text.encode("utf-8", "surrogatepass")
        size += len(data)
        digest.update(f"{len(data)} {mark}\n".encode() + data)
    return digest.hexdigest(), size


def _corpus(spool: Spool, options: Preparation, dtype: np.dtype, left_out: LeftOut) -> Corpus:
    """All that was tokenised, with the validation documents chosen."""
    records = spool.records()
    if not len(records):
        raise ValueError(f"no document is left (left out: {left_out.told()})")
    counts, validation = records["tokens"].astype(np.int64), records["held_out"].copy()
    mixed, chats = mix(records["hash"], options.seed), options.read == "conversations"
    if options.validation_share and not validation.any():
        validation = held_out(counts, mixed, options.validation_share)
    if options.validation_share and chats and len(counts) > 1 and not validation.any():
        validation[np.argmin(mixed)] = True  # of few, one
    scored = spool.stream(np.dtype(bool), "answers") if chats else None
    sizes = records["bytes"].astype(np.int64)
    return Corpus(spool.stream(dtype), scored, np.cumsum(counts) - counts, counts, sizes, mixed, validation)


def _batched(marked: Iterator[tuple[Document, bool]]) -> Iterator[Batch]:
    batch: list[tuple[Document, bool]] = []
    characters = 0
    for item in marked:
        batch.append(item)
        characters += len(item[0].text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


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
