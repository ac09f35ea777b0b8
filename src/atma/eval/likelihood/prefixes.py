"""Losses by context length on prepared data, in the model's own tokens: prefixes, the junk stream and fixed targets.

At length L the model reads L tokens, end-of-text first, and predicts L: the row of a training batch of length L. In
nested prefixes both the targets and their contexts change with L. With fixed targets only the context does.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from atma.data.dataset import TokenSet
from atma.eval.language_model import LanguageModel, Row, by_length
from atma.eval.likelihood.texts import consecutive
from atma.eval.stream import Advance
from atma.statistics import interval_row, last_minus_first, mean_interval, slope

FIRST_EDGE = 16


class Documents(NamedTuple):
    """Texts of one length: `tokens` (documents, length) int64, `eot`, the id before them, and how many were `joined`.

    There is end-of-text within them only where they are a junk stream.
    """

    tokens: np.ndarray
    eot: int
    joined: int = 0

    def windows(self, length: int) -> np.ndarray:
        """(documents, length + 1): end-of-text, then the first `length` tokens of each: `length` inputs and targets."""
        return self._opened(self.tokens[:, :length])

    def endings(self, length: int) -> np.ndarray:
        """(documents, length + 1): end-of-text, then the last `length` tokens of each."""
        return self._opened(self.tokens[:, self.tokens.shape[1] - length :])

    def _opened(self, tokens: np.ndarray) -> np.ndarray:
        return np.concatenate([np.full((len(tokens), 1), self.eot, dtype=np.int64), tokens], axis=1)


def choose_documents(
    token_set: TokenSet, eot: int, length: int, count: int, seed: int = 0, joined: bool = False
) -> Documents:
    """The first `length` tokens of up to `count` documents that have as many, in an order fixed by the seed.

    Where fewer exist, `joined` fills up with texts made of consecutive documents, else there are fewer. ValueError
    when there is none at all.
    """
    long = np.flatnonzero(token_set.lengths > length)
    chosen = np.random.default_rng(seed).permutation(long)[:count].tolist()
    texts = [without(token_set.document(i), eot)[:length] for i in chosen]
    rest = [i for i in range(token_set.documents) if i not in chosen] if joined else []
    others = (without(token_set.document(i), eot) for i in rest)
    filled = consecutive(others, length, count - len(texts), len, lambda tokens, size: tokens[:size])
    texts += [np.concatenate(parts) for parts in filled]
    if not texts:
        mend = "choose shorter lengths or prepare longer text" + ("" if joined else ", or allow joined documents")
        raise ValueError(f"no document has {length} tokens; {mend}")
    return Documents(np.stack(texts), eot, len(filled))


def junk_stream(token_set: TokenSet, eot: int, length: int, count: int) -> Documents:
    """Up to `count` consecutive stretches of `length` tokens of all documents, with end-of-text between these."""
    whole = min(count, (token_set.tokens - 1) // length)
    if whole == 0:
        mend = "choose shorter lengths or prepare more text"
        raise ValueError(f"the split has {token_set.tokens} tokens, not {length + 1}; {mend}")
    return Documents(token_set.read(1, 1 + whole * length).reshape(whole, length), eot)


def text_tokens(token_set: TokenSet, joined: bool = True) -> int:
    """Text tokens of the whole split (`joined`) or of its longest document."""
    return token_set.tokens - token_set.documents if joined else int(token_set.lengths.max()) - 1


def without(tokens: np.ndarray, eot: int) -> np.ndarray:
    """Those that are not end-of-text."""
    return tokens[tokens != eot]


def length_curve(
    model: LanguageModel,
    documents: Documents,
    lengths: Sequence[int],
    kind: Literal["nested", "junk"] = "nested",
    progress: Advance | None = None,
) -> list[Row]:
    """Loss on the prefix of each length of the same documents, by position, and a summary of the slope.

    One pass over the longest prefix gives every length: a causal model's losses on a prefix are the first of its losses
    on the whole (the laws "causal" and "split"), so a shorter prefix's loss is a running mean. A model whose positions
    are stretched by the length reads each (`by_length`). Positions (not for junk) come in stretches that double from 16
    tokens, of the longest. ValueError: lengths not increasing or longer than the documents.
    """
    _check_lengths(lengths, documents)
    windows = documents.windows(lengths[-1])
    nats = model.score(torch.from_numpy(windows), None, progress)
    rows, means = [], []
    for length in lengths:
        own = nats[:, :length]
        if by_length(model) and length < lengths[-1]:
            own = model.score(torch.from_numpy(windows[:, : length + 1]), None, progress)
        rows.append({"kind": kind, "length": length} | _measured(model, documents, own, windows[:, 1 : length + 1]))
        means.append(own.mean(1))
    for start, end in itertools.pairwise(position_edges(lengths[-1])) if kind == "nested" else ():
        measured = _measured(model, documents, nats[:, start:end], windows[:, 1 + start : 1 + end])
        rows.append({"kind": "position", "start": start, "end": end} | measured)
    return [*rows, _summary(kind, documents, lengths, means)]


def fixed_targets(
    model: LanguageModel,
    documents: Documents,
    lengths: Sequence[int],
    target_tokens: int,
    progress: Advance | None = None,
) -> list[Row]:
    """Loss on the same `target_tokens` last tokens of each document with ever more context, and a summary.

    The targets end the documents' longest window. At length L the model reads end-of-text and the L - 1 tokens before
    the last target, so the window ends at the same token for every L. ValueError: a length below `target_tokens`.
    """
    _check_lengths(lengths, documents)
    check_targets(lengths, target_tokens)
    rows, means = [], []
    longest = documents._replace(tokens=documents.tokens[:, : lengths[-1]])
    for length in lengths:
        windows = longest.endings(length)
        nats = model.score(torch.from_numpy(windows), target_tokens, progress)
        measured = _measured(model, documents, nats, windows[:, -target_tokens:])
        rows.append({"kind": "fixed", "length": length} | measured)
        means.append(nats.mean(1))
    return [*rows, _summary("fixed", documents, lengths, means)]


def check_targets(lengths: Sequence[int], target_tokens: int) -> None:
    """ValueError unless the first length holds the targets."""
    if not 1 <= target_tokens <= lengths[0]:
        raise ValueError(
            f"{target_tokens} target tokens do not fit length {lengths[0]}; "
            f"choose 1 to {lengths[0]}, or a longer first length"
        )


def position_edges(longest: int) -> list[int]:
    """0, 16, 32, 64, … and the longest length itself."""
    edges = [0]
    while (edge := max(FIRST_EDGE, 2 * edges[-1])) < longest:
        edges.append(edge)
    return [*edges, longest]


def _check_lengths(lengths: Sequence[int], documents: Documents) -> None:
    longest = documents.tokens.shape[1]
    if not lengths or lengths[0] < 1 or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"lengths must be positive and strictly increasing, not {list(lengths)}")
    if lengths[-1] > longest:
        raise ValueError(
            f"length {lengths[-1]} is longer than the documents' {longest} tokens; choose longer documents"
        )


def _measured(model: LanguageModel, documents: Documents, nats: np.ndarray, targets: np.ndarray) -> Row:
    losses = nats.mean(1)
    found = mean_interval(losses)
    size = model.tokenizer.bytes_of(targets.ravel().tolist())
    return {
        "documents": len(nats),
        "joined_documents": documents.joined,
        "tokens": nats.size,
        "loss": found.value,
        "loss_low": found.low,
        "loss_high": found.high,
        "bits_per_byte": float(nats.sum()) / math.log(2) / size if size else None,
        "document_losses": losses.tolist(),
    }


def _summary(measure: str, documents: Documents, lengths: Sequence[int], means: Sequence[np.ndarray]) -> Row:
    """Slope (nats a doubling) and change from first length to last, over documents; one of `means` a length."""
    losses = np.stack(means, 1)
    row: Row = {"kind": "summary", "measure": measure, "lengths": list(lengths), "documents": len(losses)}
    row |= {"joined_documents": documents.joined}
    if len(lengths) > 1:
        row |= interval_row("slope", slope(losses, lengths)) | interval_row("change", last_minus_first(losses))
    return row
