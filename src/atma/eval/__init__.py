"""Evaluation over context lengths, from the training length to a million tokens: loss, bits per byte and needles.

`evaluate` does it all from an EvaluationConfig; `length_curve`, `fixed_targets` and `needle` are its parts, and work
alone. Each returns rows of plain JSON data; `evaluate` adds to each where it came from.
"""

from collections.abc import Iterator
from pathlib import Path

from atma.config import EvaluationConfig
from atma.data.dataset import TokenSet
from atma.eval.curves import Row, check_targets, fixed_targets, length_curve
from atma.eval.documents import Documents, choose_documents, haystack, junk_stream, text_tokens
from atma.eval.language_model import LanguageModel, Native
from atma.eval.loaded import Loaded
from atma.eval.needle import check_room, needle
from atma.eval.provenance import provenance
from atma.eval.results import read_rows, write_rows
from atma.eval.stream import DEFAULT, Advance, Streaming, score
from atma.eval.suite import Measurement, Progress, run_measurements

__all__ = [
    "Documents",
    "LanguageModel",
    "Loaded",
    "Native",
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
    plan = list(_plan(Native(loaded, streaming), token_set, evaluation, joined))
    return run_measurements("lengths", plan, stamp, results, progress)


def _plan(
    model: LanguageModel,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    joined: bool,
) -> Iterator[Measurement]:
    yield from _document_losses(model, token_set, evaluation, joined)
    if evaluation.junk:
        yield from _junk_losses(model, token_set, evaluation)
    yield from _needles(model, token_set, evaluation)


def _document_losses(
    model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig, joined: bool
) -> Iterator[Measurement]:
    lengths, skipped = _fitting(token_set, evaluation, joined)
    count, targets = evaluation.documents, evaluation.target_tokens
    documents = choose_documents(token_set, model.tokenizer.eot, lengths[-1], count, evaluation.seed, joined)
    check_targets(lengths, targets)
    spec: Row = {"lengths": [*lengths, *skipped], "documents": count, "joined": joined}

    def nested(advance: Advance) -> list[Row]:
        return _with_skipped(length_curve(model, documents, lengths, "nested", advance), skipped)

    def fixed(advance: Advance) -> list[Row]:
        return _with_skipped(fixed_targets(model, documents, lengths, targets, advance), skipped)

    n = len(documents.tokens)
    yield Measurement("nested prefixes", spec | {"measure": "nested"}, n * lengths[-1], nested)
    yield Measurement("fixed targets", spec | {"measure": "fixed", "targets": targets}, n * sum(lengths), fixed)


def _junk_losses(model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig) -> Iterator[Measurement]:
    lengths, skipped = _fitting(token_set, evaluation, True)
    stream = junk_stream(token_set, model.tokenizer.eot, lengths[-1], evaluation.documents)
    spec: Row = {"measure": "junk", "lengths": [*lengths, *skipped], "documents": evaluation.documents}

    def junk(advance: Advance) -> list[Row]:
        return _with_skipped(length_curve(model, stream, lengths, "junk", advance), skipped)

    yield Measurement("junk stream", spec, len(stream.tokens) * lengths[-1], junk)


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
    model: LanguageModel,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
) -> Iterator[Measurement]:
    counts = {length: evaluation.trials(length) for length in evaluation.lengths}
    counts = {length: trials for length, trials in counts.items() if trials > 0}
    check_room(model.tokenizer, list(counts), evaluation.seed)
    text = haystack(token_set, model.tokenizer.eot) if counts else None
    for length, trials in counts.items():

        def run(advance: Advance, length: int = length, trials: int = trials) -> list[Row]:
            assert text is not None
            return needle(model, text, [length], trials, evaluation.seed, advance)

        spec: Row = {"measure": "needle", "length": length, "trials": trials}
        yield Measurement(f"needles at {length}", spec, 2 * trials * (length - 1), run)


def _with_skipped(rows: list[Row], skipped: list[int]) -> list[Row]:
    return [row | {"skipped_lengths": skipped} if row["kind"] == "summary" else row for row in rows]
