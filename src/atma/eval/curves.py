"""Loss and bits per byte by context length: nested prefixes, fixed targets, by position, and on the junk stream.

At length L the model reads L tokens, end-of-text first, and predicts L: the row of a training batch of length L. In
nested prefixes both the targets and their contexts change with L. With fixed targets only the context does.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from atma.eval.documents import Documents, check_lengths
from atma.eval.language_model import LanguageModel, by_length
from atma.eval.stream import Advance
from atma.statistics import interval_row, last_minus_first, mean_interval, slope

Row = dict[str, Any]
FIRST_EDGE = 16


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
    check_lengths(lengths, documents)
    windows = documents.windows(lengths[-1])
    nats = model.score(torch.from_numpy(windows), None, progress)
    targets = windows[:, 1:]
    rows, means = [], []
    for length in lengths:
        own = nats[:, :length]
        if by_length(model) and length < lengths[-1]:
            own = model.score(torch.from_numpy(windows[:, : length + 1]), None, progress)
        rows.append({"kind": kind, "length": length} | _measured(model, documents, own, targets[:, :length]))
        means.append(own.mean(1))
    if kind == "nested":
        rows += _by_position(model, documents, nats, targets)
    return [*rows, summary(kind, documents, lengths, np.stack(means, 1))]


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
    check_lengths(lengths, documents)
    check_targets(lengths, target_tokens)
    rows, means = [], []
    longest = Documents(documents.tokens[:, : lengths[-1]], documents.eot, documents.joined)
    for length in lengths:
        windows = longest.endings(length)
        nats = model.score(torch.from_numpy(windows), target_tokens, progress)
        measured = _measured(model, documents, nats, windows[:, -target_tokens:])
        rows.append({"kind": "fixed", "length": length} | measured)
        means.append(nats.mean(1))
    return [*rows, summary("fixed", documents, lengths, np.stack(means, 1))]


def check_targets(lengths: Sequence[int], target_tokens: int) -> None:
    """ValueError unless the first length holds the targets."""
    if not 1 <= target_tokens <= lengths[0]:
        raise ValueError(
            f"{target_tokens} target tokens do not fit length {lengths[0]}; "
            f"choose 1 to {lengths[0]}, or a longer first length"
        )


def summary(measure: str, documents: Documents, lengths: Sequence[int], losses: np.ndarray) -> Row:
    """Slope (nats a doubling) and change from first length to last, over documents. losses (documents, lengths)."""
    row: Row = {"kind": "summary", "measure": measure, "lengths": list(lengths), "documents": len(losses)}
    row |= {"joined_documents": documents.joined}
    if len(lengths) < 2:
        return row
    for name, found in (("slope", slope(losses, lengths)), ("change", last_minus_first(losses))):
        row |= interval_row(name, found)
    return row


def tokens_read(model: LanguageModel, lengths: Sequence[int]) -> int:
    """Tokens that `length_curve` reads of each document."""
    return sum(lengths) if by_length(model) else lengths[-1]


def position_edges(longest: int) -> list[int]:
    """0, 16, 32, 64, … and the longest length itself."""
    edges = [0]
    while (edge := max(FIRST_EDGE, 2 * edges[-1])) < longest:
        edges.append(edge)
    return [*edges, longest]


def _by_position(model: LanguageModel, documents: Documents, nats: np.ndarray, targets: np.ndarray) -> list[Row]:
    edges = position_edges(nats.shape[1])
    rows: list[Row] = []
    for start, end in itertools.pairwise(edges):
        measured = _measured(model, documents, nats[:, start:end], targets[:, start:end])
        rows.append({"kind": "position", "start": start, "end": end} | measured)
    return rows


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
