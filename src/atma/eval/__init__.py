"""Evaluation over context lengths, from the training length to a million tokens: loss, bits per byte and needles.

`evaluate` does it all from an EvaluationConfig; `length_curve`, `fixed_targets` and `needle` are its parts, and work
alone. Each returns rows of plain JSON data; `evaluate` adds to each where it came from.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from atma.config import EvaluationConfig
from atma.data.dataset import TokenSet
from atma.eval.curves import Loaded, Row, check_targets, fixed_targets, length_curve, tokenizer_of
from atma.eval.documents import Documents, choose_documents, haystack, junk_stream, text_tokens
from atma.eval.needle import check_room, needle
from atma.eval.provenance import provenance
from atma.eval.results import measurement_key, read_rows, write_rows
from atma.eval.stream import DEFAULT, Advance, Streaming, score

__all__ = [
    "Documents",
    "Loaded",
    "Progress",
    "Row",
    "Streaming",
    "choose_documents",
    "evaluate",
    "fixed_targets",
    "haystack",
    "junk_stream",
    "length_curve",
    "needle",
    "provenance",
    "read_rows",
    "score",
    "write_rows",
]

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, tokens run and tokens in all."""


class _Measurement(NamedTuple):
    """One resumable piece of an evaluation: what it is, its cost in tokens, and how to make its rows."""

    name: str
    spec: Row
    tokens: int
    run: Callable[[Advance], list[Row]]


def evaluate(
    loaded: Loaded,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    results: Path | str | None = None,
    joined: bool = True,
    streaming: Streaming = DEFAULT,
) -> list[Row]:
    """Nested prefixes, loss by position, fixed targets, junk stream and needles, in this order, as rows of JSON data.

    The validation `token_set` must be of the model's tokenizer. `joined` lets consecutive documents make up for too
    few long ones (rows count them). With `results`, a .jsonl file, rows are kept as they come, those of the same
    measurement and provenance are taken from it, and rows of others stay in it. Lengths that the split has too little
    text for are left out of the loss measures and listed as `skipped_lengths` in the summaries; needles have them all.
    """
    stamp = provenance(loaded, token_set, evaluation.seed, streaming)
    kept = read_rows(results) if results is not None else []
    rows: list[Row] = []
    plan = list(_plan(loaded, token_set, evaluation, joined, streaming))
    for measurement in plan:
        key = measurement_key(measurement.spec, stamp)
        found = [row for row in kept if row.get("key") == key]
        if not found:
            made = measurement.run(_counter(progress, measurement))
            found = [row | stamp | {"key": key} for row in made]
            kept += found
            if results is not None:
                write_rows(results, kept)
        elif progress is not None:
            progress(measurement.name, measurement.tokens, measurement.tokens)
        rows += found
    return rows


def _plan(
    loaded: Loaded,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    joined: bool,
    streaming: Streaming,
) -> Iterator[_Measurement]:
    yield from _document_losses(loaded, token_set, evaluation, joined, streaming)
    if evaluation.junk:
        yield from _junk_losses(loaded, token_set, evaluation, streaming)
    yield from _needles(loaded, token_set, evaluation, streaming)


def _document_losses(
    loaded: Loaded, token_set: TokenSet, evaluation: EvaluationConfig, joined: bool, streaming: Streaming
) -> Iterator[_Measurement]:
    lengths, skipped = _fitting(token_set, evaluation, joined)
    count, targets = evaluation.documents, evaluation.target_tokens
    documents = choose_documents(token_set, tokenizer_of(loaded).eot, lengths[-1], count, evaluation.seed, joined)
    check_targets(lengths, targets)
    spec: Row = {"lengths": [*lengths, *skipped], "documents": count, "joined": joined}

    def nested(advance: Advance) -> list[Row]:
        return _with_skipped(length_curve(loaded, documents, lengths, "nested", streaming, advance), skipped)

    def fixed(advance: Advance) -> list[Row]:
        return _with_skipped(fixed_targets(loaded, documents, lengths, targets, streaming, advance), skipped)

    n = len(documents.tokens)
    yield _Measurement("nested prefixes", spec | {"measure": "nested"}, n * lengths[-1], nested)
    yield _Measurement("fixed targets", spec | {"measure": "fixed", "targets": targets}, n * sum(lengths), fixed)


def _junk_losses(
    loaded: Loaded, token_set: TokenSet, evaluation: EvaluationConfig, streaming: Streaming
) -> Iterator[_Measurement]:
    lengths, skipped = _fitting(token_set, evaluation, True)
    stream = junk_stream(token_set, tokenizer_of(loaded).eot, lengths[-1], evaluation.documents)
    spec: Row = {"measure": "junk", "lengths": [*lengths, *skipped], "documents": evaluation.documents}

    def junk(advance: Advance) -> list[Row]:
        return _with_skipped(length_curve(loaded, stream, lengths, "junk", streaming, advance), skipped)

    yield _Measurement("junk stream", spec, len(stream.tokens) * lengths[-1], junk)


def _fitting(token_set: TokenSet, evaluation: EvaluationConfig, joined: bool) -> tuple[list[int], list[int]]:
    """The lengths that the split has text for, one at least, and those that it has not."""
    lengths = evaluation.lengths
    available = text_tokens(token_set, joined)
    if available < lengths[0]:
        what = "validation split" if joined else "longest validation document"
        raise ValueError(
            f"the {what} has {available} tokens, less than the first length {lengths[0]}; "
            "choose shorter lengths or prepare more text"
        )
    return [x for x in lengths if x <= available], [x for x in lengths if x > available]


def _needles(
    loaded: Loaded,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    streaming: Streaming,
) -> Iterator[_Measurement]:
    counts = {length: evaluation.trials(length) for length in evaluation.lengths}
    counts = {length: trials for length, trials in counts.items() if trials > 0}
    check_room(tokenizer_of(loaded), list(counts), evaluation.seed)
    text = haystack(token_set, tokenizer_of(loaded).eot) if counts else None
    for length, trials in counts.items():

        def run(advance: Advance, length: int = length, trials: int = trials) -> list[Row]:
            assert text is not None
            return needle(loaded, text, [length], trials, evaluation.seed, streaming, advance)

        spec: Row = {"measure": "needle", "length": length, "trials": trials}
        yield _Measurement(f"needles at {length}", spec, 2 * trials * (length - 1), run)


def _with_skipped(rows: list[Row], skipped: list[int]) -> list[Row]:
    return [row | {"skipped_lengths": skipped} if row["kind"] == "summary" else row for row in rows]


def _counter(progress: Progress | None, measurement: _Measurement) -> Advance:
    done = 0

    def advance(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress(measurement.name, done, measurement.tokens)

    return advance
