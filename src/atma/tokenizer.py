"""Text to token ids and back: raw bytes, a byte-level BPE trained on a corpus, or any `tokenizer.json`.

One thin class over the `tokenizers` library, so that every tokenizer saves to and loads from the same file. Our two
kinds keep three promises: they lose nothing (`decode(encode(text)) == text`), byte b is id b, and a digit is always a
token of its own, so " 4213" is a space and four digits wherever it stands. The end-of-text token has the last id and
never comes out of `encode`: a text that spells it is encoded as ordinary characters. What a read tokenizer may not be
is in `atma.tokenizer_file`.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from atma.bpe import bytes_alone, learned_bpe
from atma.rendered import Rendered
from atma.text_pieces import covered, cuttable, pieces
from atma.token_bytes import Spelling, byte_characters, unknown_token
from atma.tokenizer_file import (
    end_of_text,
    known_end,
    make_special,
    read_backend,
    recorded_beginning,
    written,
)
from atma.words import Words, words_of

PROBE = "".join(map(chr, range(1, 0x300))) + "a  b\t\tc \n\n d\r\n\u4e16\u754c \U0001f642 "
"""A text that shows whether a tokenizer drops characters."""
UNKNOWN = "\U0010fffd"


class Tokenizer:
    """A tokenizer with a known end-of-text id. Build it with `byte_tokenizer`, `train_bpe` or `load_tokenizer`.

    `start` begins a text: end-of-text in ours, a token of its own in many of Hugging Face. `beginning` is read before a
    text to go on with: that token, or what an imported checkpoint puts there, maybe nothing.
    """

    def __init__(
        self, backend: Backend, eot: int, start: int | None = None, beginning: Sequence[int] | None = None
    ) -> None:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # it draws another division of the same text at every call
        make_special(backend, eot)
        self.backend = backend
        self.eot = eot
        self.start = eot if start is None else start
        self.beginning: tuple[int, ...] = (self.start,) if beginning is None else tuple(beginning)
        ids = np.array(sorted(backend.get_vocab(with_added_tokens=True).values()), np.int64)
        self.vocab_size = int(ids[-1]) + 1
        self.holes: np.ndarray = np.setdiff1d(np.arange(self.vocab_size), ids)
        """Ids below `vocab_size` that no token has, ascending int64: they are never written."""
        self._raw = backend.get_vocab(with_added_tokens=False) == {c: b for b, c in enumerate(byte_characters())}

    @property
    def name(self) -> str:
        """What it is in one word: "bytes", or the kind of model and the vocabulary, such as "bpe-1024"."""
        return "bytes" if self._raw else f"{type(self.backend.model).__name__.lower()}-{self.vocab_size}"

    def __repr__(self) -> str:
        return f"Tokenizer({self.name!r}: {self.vocab_size:,} tokens, end of text {self.eot})"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added. ValueError for a text that no UTF-8 can hold."""
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as int32 arrays; all processor cores work on them, long texts in pieces."""
        for text in texts:
            _require_utf8(text)
        if self._raw:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        groups = [pieces(text) if self._cuttable else [text] for text in texts]
        known = self._words
        flat = [piece for group in groups for piece in group if known is None or not piece.isascii()]
        with self._refusals(texts):
            encoded = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False) if flat else ())

        def ids(piece: str) -> np.ndarray:
            return _array(next(encoded).ids) if known is None or not piece.isascii() else known.encode(piece)

        return [np.concatenate([ids(piece) for piece in group]) for group in groups]

    def encode_rendered(self, text: str, hidden: Mapping[str, str]) -> tuple[list[int], list[int]]:
        """Ids of a text in which special tokens are what they spell, and where each begins; see `atma.rendered`.

        hidden: signs in the text, and the ordinary characters, never special, that each stands for.
        """
        for part in (text, *hidden.values()):
            _require_utf8(part)
        with self._refusals([text.translate(dict.fromkeys(map(ord, "".join(hidden)))), *hidden.values()]):
            return self._rendered.encode(text, hidden)

    @cached_property
    def keeps_all(self) -> bool:
        """Whether every character of every text has a token; else `lost` tells which have none."""
        known = set(self.backend.get_vocab(with_added_tokens=False))
        fallback = self._settings["model"].get("byte_fallback") and all(f"<0x{b:02X}>" in known for b in range(256))
        complete = fallback or (self._spelling.byte_level and known.issuperset(byte_characters()))
        return bool(self._raw or (complete and not self.lost(PROBE)))

    def lost(self, text: str) -> Counter[str]:
        """The characters of a text that no token stands for: dropped, or written as an unknown token."""
        encoding = self._bare.encode(text, add_special_tokens=False)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        ids = np.array(encoding.ids, np.int64)
        unknown = (ids == self._unknown) | (ids == (self._bare.token_to_id(UNKNOWN) or -1))
        kept = covered(places[~unknown], len(text)) & ~covered(places[unknown], len(text))
        return Counter(text[i] for i in np.flatnonzero(~kept).tolist())

    def without_unknown(self, text: str) -> str:
        """A text without the characters that `encode` refuses: those of a tokenizer that has no unknown token."""
        refused = {character for character in set(text) if self._refuses(character)}
        return "".join(character for character in text if character not in refused)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, end-of-text included as it is written. ValueError for an id outside the vocabulary."""
        for i in (ids := np.asarray(ids, dtype=np.int64).tolist()):
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for special and unknown tokens and for ids that no token has.

        ValueError for a tokenizer that is neither byte-level nor SentencePiece-like: its tokens have no bytes.
        """
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        text = self.backend.id_to_token(token)
        added = self._added.get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        if text is None or token == self._unknown:
            return b""
        try:
            return self._spelling.bytes_of(text)
        except ValueError as error:
            raise ValueError(f"token {token}: {error}") from None

    def bytes_of(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes that token ids stand for, special tokens counting none."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(f"token ids {array.min()} to {array.max()} leave the vocabulary of {self.vocab_size}")
        return int(self._widths[array].sum())

    def save(self, path: str | Path, begun: bool = False) -> None:
        """Write `tokenizer.json`. `begun` tells other libraries to begin every text with `beginning`."""
        Path(path).write_text(written(self.backend, self.eot, self.beginning if begun else None), encoding="utf-8")

    def hash(self) -> str:
        """SHA-256, in hexadecimal, of what `save` writes."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @property
    def _text(self) -> str:
        return written(self.backend, self.eot)

    @property
    def end_to_record(self) -> str | None:
        """The end-of-text token, where reading the file that `save` writes would not find it by its name."""
        return None if known_end(self.backend) == self.eot else self.backend.id_to_token(self.eot)

    @cached_property
    def _widths(self) -> np.ndarray:
        return np.array([len(self.token_bytes(i)) for i in range(self.vocab_size)], np.int64)

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return json.loads(self.backend.to_str())

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        return self.backend.get_added_tokens_decoder()

    @cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._settings)

    @cached_property
    def _rendered(self) -> Rendered:
        return Rendered(self.backend)

    @cached_property
    def _unknown(self) -> int:
        """The id of the unknown token, -1 without one."""
        unknown = unknown_token(self._settings)
        found = self.backend.token_to_id(unknown) if isinstance(unknown, str) else unknown
        return -1 if found is None else found

    @cached_property
    def _bare(self) -> Backend:
        """A copy with an unknown token, if the model can have one, and the model's own offsets."""
        settings: dict[str, Any] = self._settings | {"post_processor": None}  # which may trim them
        model = settings["model"]
        if model["type"] == "BPE" and model.get("unk_token") is None:
            beyond = self.vocab_size + len(self._added)  # added tokens may be numbered anew
            vocabulary = model["vocab"] | {UNKNOWN: beyond}
            settings["model"] = model | {"vocab": vocabulary, "unk_token": UNKNOWN}
        if model["type"] == "Unigram" and model.get("unk_id") is None:
            settings["model"] = model | {"vocab": [*model["vocab"], [UNKNOWN, 0.0]], "unk_id": len(model["vocab"])}
        bare = Backend.from_str(json.dumps(settings))
        bare.encode_special_tokens = True
        return bare

    @cached_property
    def _words(self) -> Words | None:
        return words_of(self.backend, self._settings) if self._cuttable else None

    @cached_property
    def _cuttable(self) -> bool:
        return cuttable(self.backend, self._settings)

    def _refuses(self, text: str) -> bool:
        try:
            self.backend.encode(text, add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:
                raise
            return True
        return False

    @contextlib.contextmanager
    def _refusals(self, texts: Sequence[str]) -> Iterator[None]:
        """Inside, what the library cannot encode of these texts is a ValueError that names it."""
        try:
            yield
        except Exception as error:
            if type(error) is not Exception:  # the library raises the base class for a character it cannot encode
                raise
            raise ValueError(self._refused(texts, error)) from None

    def _refused(self, texts: Sequence[str], error: Exception) -> str:
        bad = next((c for text in texts for c in dict.fromkeys(text) if self._refuses(c)), None)
        if bad is None:
            return f"the tokenizer cannot encode a text: {error}"
        return f"the tokenizer has no token for {bad!r}, nor an unknown token to stand for it; leave that character out"


def byte_tokenizer() -> Tokenizer:
    """256 bytes and end-of-text: 257 ids, byte b is id b, every text comes back exactly."""
    return Tokenizer(*bytes_alone())


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: bytes, then merges in the order they were learned, then end-of-text.

    The same texts give the same tokenizer. ValueError if the texts hold too few pairs to merge.
    """
    return Tokenizer(*learned_bpe(texts, vocab_size))


def load_tokenizer(path: str | Path, end: str | None = None) -> Tokenizer:
    """Read any `tokenizer.json`, or the one in a folder; `end` names its end-of-text token where no file does.

    ValueError if it is unreadable, if texts cannot be written with it, or if it has no end-of-text token.
    """
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file")
    backend = read_backend(path)
    begun = recorded_beginning(backend, path)
    return Tokenizer(backend, end_of_text(backend, path, end), begun[0] if begun else None, begun)


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(f"text holds {bad!r} at character {error.start}, which UTF-8 cannot encode") from None


def _array(ids: list[int]) -> np.ndarray:
    return np.asarray(ids, np.int32)
