"""What is read: documents that begin with records to be asked for again at every length.

`<eot> record … record document`, a record as the needle of maths.md, section 7: a cue with seven digits and a value of
five. One pass over a document gives its losses at every length, and a branch of the state at each length answers for
the records; so a change to the model costs one pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from atma.eval.likelihood.prefixes import Documents
from atma.eval.retrieval.induction import VALUE_TOKENS, draw_trials
from atma.tokenizer import Tokenizer


class Record(NamedTuple):
    """Token ids of a cue and its value, and the place of the value's first token in the text."""

    cue: list[int]
    value: list[int]
    place: int


class Laid(NamedTuple):
    """One text: tokens (T + 1,) int64, end-of-text first, and its records, which take the first `head` tokens."""

    tokens: Tensor
    records: tuple[Record, ...]
    head: int


def lay(tokenizer: Tokenizer, documents: Documents, length: int, records: int, seed: int) -> list[Laid]:
    """Each document behind `records` records of its own, `length` inputs and targets in all."""
    drawn = draw_trials(tokenizer, records * len(documents.tokens), 1, seed)
    laid = []
    for index, text in enumerate(documents.tokens):
        ids, placed = [documents.eot], []
        for trial in drawn[index * records : (index + 1) * records]:
            placed.append(Record(trial.cue, trial.value, len(ids) + len(trial.cue)))
            ids += [*trial.cue, *trial.value]
        tokens = np.concatenate([np.array(ids, dtype=np.int64), text])[: length + 1]
        laid.append(Laid(torch.from_numpy(tokens), tuple(placed), len(ids)))
    return laid


def check_lengths(laid: Sequence[Laid], lengths: Sequence[int]) -> None:
    """ValueError unless every length's second half lies behind the records, and every text is long enough."""
    head, room = max(one.head for one in laid), min(len(one.tokens) for one in laid) - 1
    if lengths[0] < 2 * head:
        raise ValueError(
            f"the first length, {lengths[0]}, must be at least {2 * head}: the records take {head} tokens; choose "
            "longer lengths or fewer records"
        )
    if lengths[-1] > room:
        raise ValueError(f"the texts have {room} tokens, less than the length {lengths[-1]}; give longer texts")


def documents_of_text(tokenizer: Tokenizer, text: str, length: int, count: int) -> Documents:
    """Up to `count` stretches of `length` tokens of a plain text, one after the other. ValueError if not one fits."""
    ids = np.array([i for i in tokenizer.encode(text) if i != tokenizer.eot], dtype=np.int64)
    whole = min(count, len(ids) // length)
    if whole == 0:
        raise ValueError(f"the text has {len(ids)} tokens, less than the length {length}; choose shorter lengths")
    return Documents(ids[: whole * length].reshape(whole, length), tokenizer.eot)


__all__ = ["VALUE_TOKENS", "Laid", "Record", "check_lengths", "documents_of_text", "lay"]
