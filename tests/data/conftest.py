"""A small corpus, prepared once, and shards written by hand."""

import numpy as np
import pytest

from atma.data.prepare import Preparation, prepare
from atma.data.shards import layout_for, write_shard


def text_of(number: int) -> str:
    """A text that no other number gives; the longer the larger the number."""
    return "".join(f"line {i} of document {number}\n" for i in range(number + 1))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of sixty text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(60):
        (folder / f"{number:02}.txt").write_text(text_of(number), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def prepared(corpus, tmp_path_factory):
    """The corpus in bytes, in several shards. Read only."""
    out = tmp_path_factory.mktemp("data") / "set"
    prepare(corpus, out, Preparation(shard_tokens=10_000))
    return out


@pytest.fixture
def shard(tmp_path):
    """Write a shard of ids without a manifest, as others publish them."""

    def write(name: str, ids: list[int] | np.ndarray, vocab_size: int = 50_257):
        path = tmp_path / name
        write_shard(path, layout_for(vocab_size), [np.asarray(ids)], len(ids))
        return path

    return write
