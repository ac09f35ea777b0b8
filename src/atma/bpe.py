"""A byte-level BPE from texts, and the parts of `tokenizers` that it is made of."""

import json
from collections.abc import Iterable

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from atma.token_bytes import byte_characters
from atma.tokenizer_file import END_OF_TEXT

SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""Where a token may not reach across: words with an optional space before, single digits, runs of other signs."""


def learned_bpe(texts: Iterable[str], vocab_size: int) -> tuple[Backend, int]:
    """The backend of exactly `vocab_size` ids, and the id of end-of-text, its last.

    The same texts give the same tokenizer. ValueError if the texts hold too few pairs to merge.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257 (bytes and end-of-text), not {vocab_size}")
    trainee = Backend(models.BPE())
    trainee.pre_tokenizer = _splitter()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=byte_characters(), show_progress=False, special_tokens=[]
    )
    trainee.train_from_iterator(texts, trainer)
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    merges = [tuple(pair) for pair in json.loads(trainee.to_str())["model"]["merges"]]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    if len(vocabulary) + 1 < vocab_size:
        most = len(vocabulary) + 1
        raise ValueError(f"vocab_size {vocab_size} is more than these texts can fill; take {most} or less, or bytes")
    return _assembled(vocabulary, merges)


def bytes_alone() -> tuple[Backend, int]:
    """The backend of 256 bytes and end-of-text, and its id."""
    return _assembled({character: byte for byte, character in enumerate(byte_characters())}, [])


def _assembled(vocabulary: dict[str, int], merges: list[tuple[str, ...]]) -> tuple[Backend, int]:
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))  # pyright: ignore[reportArgumentType]
    backend.pre_tokenizer = _splitter() if merges else pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END_OF_TEXT, special=True, normalized=False)])
    return backend, len(vocabulary)


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


__all__ = ["bytes_alone", "learned_bpe"]
