"""The texts that likelihood is measured on: the same bytes for every model, whatever its tokenizer.

Texts are chosen and cut in bytes, before any tokenizer sees them. A text is a long document, or consecutive shorter
ones where there are too few; the junk stretches are the documents of the source one after the other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from atma.data.dataset import MANIFEST, TokenSet
from atma.data.sources import documents
from atma.tokenizer import Tokenizer

MOST_BYTES = 256 << 20
"""Of a source, what is read at most."""

Part = TypeVar("Part", str, np.ndarray)


class Text(NamedTuple):
    """A text as the documents that it is made of, of which the last may be cut."""

    parts: tuple[str, ...]

    @property
    def whole(self) -> str:
        """Its documents in one, with nothing between."""
        return "".join(self.parts)


class Ids(NamedTuple):
    """A text in tokens: ids (n,) int64, and bytes (n,) int64 of the text that each stands for; end-of-text is none."""

    ids: np.ndarray
    sizes: np.ndarray


def read_source(source: str, field: str) -> list[str]:
    """The documents of any source of `atma prepare`, or of the validation split of prepared data, up to MOST_BYTES."""
    found: list[str] = []
    size = 0
    for text in _prepared(Path(source)) if (Path(source) / MANIFEST).is_file() else _texts(source, field):
        found.append(text)
        size += len(text)
        if size >= MOST_BYTES:
            break
    return found


def choose(sources: Sequence[str], size: int, count: int, seed: int) -> tuple[list[Text], int]:
    """Up to `count` texts of `size` bytes, cut at a character, and how many are joined.

    Long documents first, in an order of the seed; then consecutive others joined. ValueError if there is none.
    """
    long = [i for i, text in enumerate(sources) if len(text) >= size // 4 and len(text.encode()) >= size]
    taken: list[int] = np.random.default_rng(seed).permutation(long)[:count].astype(int).tolist()
    alone = [Text((beginning(sources[i], size),)) for i in taken]
    rest = stretches([text for i, text in enumerate(sources) if i not in taken], size, count - len(alone))
    if not alone and not rest:
        total = sum(len(text.encode()) for text in sources)
        raise ValueError(f"the source has {total:,} bytes of text, not {size:,}; choose shorter lengths or more text")
    return alone + rest, len(rest)


def stretches(sources: Sequence[str], size: int, count: int, go_on: bool = False) -> list[Text]:
    """Up to `count` texts of `size` bytes (`consecutive`)."""
    found = consecutive(sources, size, count, lambda text: len(text.encode()), beginning, go_on)
    return [Text(tuple(parts)) for parts in found]


def consecutive(
    sources: Iterable[Part],
    size: int,
    count: int,
    measure: Callable[[Part], int],
    cut: Callable[[Part, int], Part],
    go_on: bool = False,
) -> list[list[Part]]:
    """Up to `count` texts of `size`, of consecutive documents, whose last is cut, or goes on in the next; their parts.

    A document is a text or its tokens: `measure` tells its size, `cut` makes the beginning that a size has room for.
    """
    found: list[list[Part]] = []
    parts: list[Part] = []
    left = size
    for document in sources if count > 0 else ():
        while len(document):
            parts.append(cut(document, left))
            document = document[len(parts[-1]) :]
            left -= measure(parts[-1])
            if left == 0 or len(document):
                found.append([part for part in parts if len(part)])
                parts, left = [], size
            if len(found) == count:
                return found
            if not go_on:
                break
    return found


def beginning(text: str, size: int) -> str:
    """As many characters of a text as `size` bytes of UTF-8 hold."""
    return text[:size].encode()[:size].decode("utf-8", "ignore")


def ending(text: str, size: int) -> str:
    """As many characters of a text's end as `size` bytes of UTF-8 hold."""
    return text[-size:].encode()[-size:].decode("utf-8", "ignore")


def tokens_of(pieces: Sequence[str], tokenizer: Tokenizer) -> list[Ids]:
    """Each piece of a text in tokens of its own.

    ValueError where the tokens of a piece are not its bytes: a tokenizer that loses or changes text cannot be compared.
    """
    known: dict[int, bytes] = {}
    encoded = tokenizer.encode_many(pieces)
    return [
        Ids(ids.astype(np.int64), _sizes(ids, piece.encode(), tokenizer, known))
        for piece, ids in zip(pieces, encoded, strict=True)
    ]


def joined(parts: Sequence[Ids]) -> Ids:
    """One after the other."""
    return Ids(*(np.concatenate([np.empty(0, np.int64), *column]) for column in zip(*parts, strict=True)))


def _sizes(ids: np.ndarray, data: bytes, tokenizer: Tokenizer, known: dict[int, bytes]) -> np.ndarray:
    for i in np.unique(ids).tolist():
        if i not in known:
            known[i] = tokenizer.token_bytes(i)
    written = [known[i] for i in ids.tolist()]
    sizes = np.array([len(one) for one in written], np.int64)
    whole = b"".join(written)
    if whole == b" " + data:  # the blank that some tokenizers put before a text
        sizes[0] -= 1
    elif whole != data:
        raise ValueError(
            f"the tokenizer {tokenizer.name} does not keep this text, which begins {data[:40]!r}; "
            "bits per byte need one that does"
        )
    return sizes


def _texts(source: str, field: str) -> Iterator[str]:
    for document in documents(source, field):
        yield document.text


def _prepared(folder: Path) -> Iterator[str]:
    """The validation split as text, whatever tokenizer it was prepared with."""
    token_set = TokenSet.open(folder, "validation")
    if token_set.tokenizer is None:
        raise ValueError(f"{folder}: prepared without a tokenizer; name the text itself")
    for i in range(token_set.documents):
        yield token_set.tokenizer.decode(token_set.document(i)[1:].tolist())
