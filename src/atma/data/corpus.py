"""What was tokenised, on its way into shards: every document's tokens in one stream, and the files of a split."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from atma.data.shards import Layout, write_mask, write_shard
from atma.data.summary import long_documents
from atma.folders import file_hash

Progress = Callable[[str, int, int | None], None]
"""Called with the stage, how much is done and of how much, where known: "sample" and "tokenise" count bytes of text,
"write train" and "write validation" count tokens."""


class Corpus(NamedTuple):
    """Every document's tokens in one stream, and where each starts; the rest are (documents,) arrays."""

    stream: np.ndarray
    answers: np.ndarray | None
    """Of conversations: which tokens of the stream are answers, bool."""
    starts: np.ndarray
    lengths: np.ndarray
    bytes: np.ndarray
    hashes: np.ndarray
    validation: np.ndarray


def write_split(
    folder: Path, name: str, corpus: Corpus, chosen: np.ndarray, layout: Layout, most: int, progress: Progress
) -> dict[str, Any]:
    """Write the chosen documents (bool) as shards of at most `most` tokens; returns what the manifest says of them."""
    order = np.flatnonzero(chosen)
    order = order[np.argsort(corpus.hashes[order], kind="stable")]
    lengths = corpus.lengths[order]
    entries = []
    for number, (low, high) in enumerate(_shard_ranges(lengths, most)):
        inside = order[low:high]
        entries.append(_write_one(folder, f"{name}_{number:06d}", corpus, inside, layout))
        progress(f"write {name}", int(lengths[:high].sum()), int(lengths.sum()))
    told = {
        "tokens": int(lengths.sum()),
        "documents": len(order),
        "bytes": int(corpus.bytes[order].sum()),
        "longest_document": int(lengths.max()),
        "long_documents": long_documents(lengths),
        "shards": entries,
    }
    return told | ({"answers": sum(entry["answers"] for entry in entries)} if corpus.answers is not None else {})


def _write_one(folder: Path, stem: str, corpus: Corpus, inside: np.ndarray, layout: Layout) -> dict[str, Any]:
    path, index = folder / f"{stem}.bin", folder / f"{stem}.documents.npy"
    lengths = corpus.lengths[inside]
    ranges = [slice(corpus.starts[i], corpus.starts[i] + corpus.lengths[i]) for i in inside.tolist()]
    digest = write_shard(path, layout, (corpus.stream[one] for one in ranges), int(lengths.sum()))
    np.save(index, np.cumsum(lengths) - lengths)
    entry = {
        "file": path.name,
        "tokens": int(lengths.sum()),
        "documents": len(inside),
        "sha256": digest,
        "index": index.name,
        "index_sha256": file_hash(index),
    }
    if corpus.answers is None:
        return entry
    mask = folder / f"{stem}.answers"
    answers = np.concatenate([corpus.answers[one] for one in ranges])
    digest = write_mask(mask, answers)
    return entry | {"mask": mask.name, "mask_sha256": digest, "answers": int(answers.sum())}


def _shard_ranges(lengths: np.ndarray, most: int) -> Iterator[tuple[int, int]]:
    """Runs of documents that fill shards of at most `most` tokens, each of one document at least."""
    ends = np.cumsum(lengths)
    low = 0
    while low < len(lengths):
        done = int(ends[low - 1]) if low else 0
        high = max(low + 1, int(np.searchsorted(ends, done + most, "right")))
        yield low, high
        low = high
