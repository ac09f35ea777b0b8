"""From a source to a folder of token shards: tokenise, hold documents out, write, vouch. What `atma prepare` does.

One pass over the source writes the token ids of every document to a spool file; a trained tokenizer needs a pass before
it for a sample. Then all lengths are known, the validation documents are chosen (`atma.data.split`) and both splits are
written, in the order of the documents' hashes, so that neighbours in the source are not neighbours in a shard. Memory
holds a batch of texts and a few numbers per document, whatever the size of the source.

Tokenising uses every core through the threads of the `tokenizers` library. A process that forks afterwards makes that
library write a remark about TOKENIZERS_PARALLELISM; set that variable to "false" to keep to one thread without it.
"""

import contextlib
import hashlib
import json
import math
import os
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from atma.data.conversations import CONVERSATIONS, said
from atma.data.corpus import Corpus, Progress, write_split
from atma.data.dataset import FORMAT, MANIFEST, SPLITS
from atma.data.preparation import Preparation
from atma.data.sample import sample_texts
from atma.data.shards import layout_for
from atma.data.sources import STDLIB, Document, LeftOut, describe, documents
from atma.data.split import RULE, cut, held_out, mix
from atma.data.staging import staged
from atma.data.writer import ChatWriter, Writer, resolved, writer_for
from atma.replacing import OURS
from atma.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe

BATCH_CHARACTERS = 1 << 22


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
    options = resolved(source, options)
    left_out.skips_bad = options.skip_bad
    tokenizer, size = _tokenizer(source, options, progress)
    layout = layout_for(tokenizer.vocab_size)
    with contextlib.ExitStack() as stack:
        writer = stack.enter_context(writer_for(source, tokenizer, options, left_out))
        folder = stack.enter_context(staged(out))
        spool = folder / "spool"
        corpus = _tokenise(spool, _marked(source, options, left_out), writer, options, _Meter(progress, size))
        manifest = _manifest(source, options, tokenizer, left_out) | writer.manifest()
        for name in SPLITS:
            chosen = corpus.validation == (name == "validation")
            if chosen.any():
                most = options.shard_tokens
                manifest["splits"][name] = write_split(folder, name, corpus, chosen, layout, most, progress)
        for path in (spool, _beside(spool)):
            path.unlink(missing_ok=True)
        tokenizer.save(folder / "tokenizer.json")
        writer.save(folder)
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


def _tokenise(
    spool: Path,
    marked: Iterator[tuple[Document, bool]],
    writer: Writer | ChatWriter,
    options: Preparation,
    meter: _Meter,
) -> Corpus:
    """Write the ids of every document to the spool, each after end-of-text, and choose the validation documents."""
    tokenizer = writer.tokenizer
    dtype = layout_for(tokenizer.vocab_size).dtype
    lengths, sizes, hashes, marks = array("q"), array("q"), array("Q"), array("b")
    with spool.open("wb") as file, _beside(spool).open("wb") as answers:
        for batch in _batched(marked):
            read = 0
            for (document, mark), told in zip(batch, writer.encode([document for document, _ in batch]), strict=True):
                data = document.text.encode()
                read += len(data)
                if told is None:
                    continue
                file.write(told.ids.astype(dtype).tobytes())
                answers.write(told.answers.tobytes())
                lengths.append(len(told.ids))
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
    if options.validation_share and options.read == "conversations" and len(counts) > 1 and not validation.any():
        validation[np.argmin(mixed)] = True  # of few, one
    stream = np.memmap(spool, dtype, "r")
    scored = np.memmap(_beside(spool), bool, "r") if options.read == "conversations" else None
    return Corpus(stream, scored, np.cumsum(counts) - counts, counts, np.array(sizes, np.int64), mixed, validation)


def _beside(spool: Path) -> Path:
    """The spool of which tokens are answers."""
    return spool.with_name("spool.answers")


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
