"""Text to token ids and back: raw bytes, a byte-level BPE trained on a corpus, or any `tokenizer.json`.

One thin class over the `tokenizers` library, so that every tokenizer saves to and loads from the same file. Our two
kinds keep three promises: they lose nothing (`decode(encode(text)) == text`), byte b is id b, and a digit is always a
token of its own, so " 4213" is a space and four digits wherever it stands. The end-of-text token has the last id and
never comes out of `encode`: a text that spells it is encoded as ordinary characters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_NAMES = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "<|endofdoc|>", "[EOS]")
SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Where a BPE token may not reach across: words with an optional space before, single digits, runs of other signs."""

CUT = re.compile(r"(?<=[^\W\d_])(?=\n)")
"""Between a letter and a line end every byte-level tokenizer we know starts a new word: long texts are cut there."""
PIECE = 1 << 17


class Tokenizer:
    """A tokenizer with a known end-of-text id. Build it with `byte_tokenizer`, `train_bpe` or `load_tokenizer`.

    `start` begins a text: end-of-text in ours, a token of its own in many of Hugging Face.
    """

    def __init__(self, backend: Backend, eot: int, start: int | None = None) -> None:
        backend.encode_special_tokens = True
        backend.no_padding()
        backend.no_truncation()
        self.backend = backend
        self.eot = eot
        self.start = eot if start is None else start
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._raw = backend.get_vocab(with_added_tokens=False) == {c: b for b, c in enumerate(_byte_characters())}

    @property
    def name(self) -> str:
        """What it is in one word: "bytes", or the kind of model and the vocabulary, such as "bpe-1024"."""
        return "bytes" if self._raw else f"{type(self.backend.model).__name__.lower()}-{self.vocab_size}"

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, no special tokens added. ValueError for a text that no UTF-8 can hold."""
        return self.encode_many([text])[0].tolist()

    def encode_many(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text as int32 arrays; all processor cores work on them, long texts in pieces."""
        for text in texts:
            _require_utf8(text)
        if self._raw:
            return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]
        pieces = [self._pieces(text) for text in texts]
        flat = [piece for group in pieces for piece in group]
        encoded = iter(self.backend.encode_batch_fast(flat, add_special_tokens=False))
        return [_joined([next(encoded).ids for _ in group]) for group in pieces]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, end-of-text included as it is written. ValueError for an id outside the vocabulary."""
        ids = np.asarray(ids, dtype=np.int64).tolist()
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside the vocabulary of {self.vocab_size}")
        return self.backend.decode(ids, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """The UTF-8 bytes that a token stands for; none for end-of-text and other special tokens.

        ValueError for a tokenizer that is neither byte-level nor SentencePiece-like: its tokens have no bytes.
        """
        text = self.backend.id_to_token(token) if 0 <= token < self.vocab_size else None
        if text is None:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        added = self.backend.get_added_tokens_decoder().get(token)
        if added is not None:
            return b"" if added.special else added.content.encode()
        if self._byte_level:
            return bytes(_CHARACTER_BYTES[character] for character in text)
        if self._piece_level:
            escaped = re.fullmatch("<0x([0-9A-F]{2})>", text)
            return bytes.fromhex(escaped[1]) if escaped else text.replace("\u2581", " ").encode()
        raise ValueError(f"the bytes of token {token} are unknown: bits per byte need a byte-level tokenizer")

    def bytes_of(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes that token ids stand for, special tokens counting none."""
        array = np.asarray(ids, dtype=np.int64)
        if array.size and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise ValueError(f"token ids {array.min()} to {array.max()} leave the vocabulary of {self.vocab_size}")
        return int(self._widths[array].sum())

    def save(self, path: str | Path) -> None:
        """Write `tokenizer.json`."""
        Path(path).write_text(self._text, encoding="utf-8")

    def hash(self) -> str:
        """SHA-256, in hexadecimal, of what `save` writes."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    @property
    def _text(self) -> str:
        return json.dumps(json.loads(self.backend.to_str()), ensure_ascii=False, sort_keys=True, indent=1) + "\n"

    @cached_property
    def _widths(self) -> np.ndarray:
        known = set(self.backend.get_vocab(with_added_tokens=True).values())
        return np.array([len(self.token_bytes(i)) if i in known else 0 for i in range(self.vocab_size)], np.int64)

    @cached_property
    def _byte_level(self) -> bool:
        return "ByteLevel" in _kinds(json.loads(self.backend.to_str())["decoder"])

    @cached_property
    def _piece_level(self) -> bool:
        return bool({"Metaspace", "ByteFallback"} & _kinds(json.loads(self.backend.to_str())["decoder"]))

    @cached_property
    def _cuttable(self) -> bool:
        settings = json.loads(self.backend.to_str())["pre_tokenizer"]
        return "ByteLevel" in _kinds(settings) and '"add_prefix_space": true' not in json.dumps(settings)

    def _pieces(self, text: str) -> list[str]:
        """Cut a long text where it cannot change a token, so that memory and cores are used evenly."""
        if len(text) <= PIECE or not self._cuttable:
            return [text]
        pieces, start = [], 0
        while (found := CUT.search(text, start + PIECE)) is not None:
            pieces.append(text[start : found.start()])
            start = found.start()
        return [*pieces, text[start:]]


def byte_tokenizer() -> Tokenizer:
    """256 bytes and end-of-text: 257 ids, byte b is id b, every text comes back exactly."""
    return _assemble({character: byte for byte, character in enumerate(_byte_characters())}, [])


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab_size` ids: bytes, then merges in the order they were learned, then end-of-text.

    The same texts give the same tokenizer. ValueError if the texts hold too few pairs to merge.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (bytes and end-of-text), not {vocab_size}")
    trainee = Backend(models.BPE())
    trainee.pre_tokenizer = _splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=_byte_characters(), show_progress=False, special_tokens=[]
    )
    trainee.train_from_iterator(texts, trainer)
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    if len(vocabulary) + 1 < vocab_size:
        most = len(vocabulary) + 1
        raise ValueError(f"vocab_size {vocab_size} is more than these texts can fill; take {most} or less, or bytes")
    return _assemble(vocabulary, merges)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read any `tokenizer.json`, or the one in a folder. ValueError if it is unreadable or has no end-of-text token."""
    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer file")
    try:
        backend = Backend.from_str(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not a tokenizer.json: not UTF-8 text") from None
    except Exception as error:
        if type(error) is not Exception:  # the library raises the base class for text that it cannot parse
            raise
        raise ValueError(f"{path}: not a tokenizer.json: {error}") from None
    for name in END_OF_TEXT_NAMES:
        if (eot := backend.token_to_id(name)) is not None:
            return Tokenizer(backend, eot)
    raise ValueError(f"{path}: no end-of-text token; one of {' '.join(END_OF_TEXT_NAMES)} must be in the vocabulary")


def _assemble(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> Tokenizer:
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))  # pyright: ignore[reportArgumentType]
    backend.pre_tokenizer = _splitter() if merges else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return Tokenizer(backend, len(vocabulary))


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _require_utf8(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start]
        raise ValueError(f"text holds {bad!r} at character {error.start}, which UTF-8 cannot encode") from None


def _joined(parts: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _kinds(settings: object) -> set[str]:
    """Every "type" named in a part of a tokenizer.json."""
    if isinstance(settings, list):
        return {kind for item in settings for kind in _kinds(item)}
    if isinstance(settings, dict):
        own = {settings["type"]} if isinstance(settings.get("type"), str) else set()
        return own | {kind for item in settings.values() for kind in _kinds(item)}
    return set()


def _byte_characters() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte, 0 to 255."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    table = {byte: chr(byte) for byte in shown} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
    return [table[byte] for byte in range(256)]


_CHARACTER_BYTES = {character: byte for byte, character in enumerate(_byte_characters())}
