"""The measurements of an evaluation by length: what is read, on which text, and what cannot be."""

from collections.abc import Iterator

from atma.config import EvaluationConfig
from atma.data.dataset import TokenSet
from atma.eval.curves import Row, check_targets, fixed_targets, length_curve, tokens_read
from atma.eval.documents import choose_documents, haystack, junk_stream, text_tokens
from atma.eval.language_model import LanguageModel
from atma.eval.needle import check_room, needle
from atma.eval.stream import Advance
from atma.eval.suite import Measurement


def plan(model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig, joined: bool) -> list[Measurement]:
    """The measurements, none of them made. ValueError, with the mend, for what cannot be."""
    return list(_plan(model, token_set, evaluation, joined))


def _plan(
    model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig, joined: bool
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
    yield Measurement("nested prefixes", spec | {"measure": "nested"}, n * tokens_read(model, lengths), nested)
    yield Measurement("fixed targets", spec | {"measure": "fixed", "targets": targets}, n * sum(lengths), fixed)


def _junk_losses(model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig) -> Iterator[Measurement]:
    lengths, skipped = _fitting(token_set, evaluation, True)
    stream = junk_stream(token_set, model.tokenizer.eot, lengths[-1], evaluation.documents)
    spec: Row = {"measure": "junk", "lengths": [*lengths, *skipped], "documents": evaluation.documents}

    def junk(advance: Advance) -> list[Row]:
        return _with_skipped(length_curve(model, stream, lengths, "junk", advance), skipped)

    yield Measurement("junk stream", spec, len(stream.tokens) * tokens_read(model, lengths), junk)


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
    check_room(model.tokenizer, evaluation)
    text = haystack(token_set, model.tokenizer.eot) if counts else None
    for length, trials in counts.items():

        def run(advance: Advance, length: int = length, trials: int = trials) -> list[Row]:
            assert text is not None
            return needle(model, text, [length], trials, evaluation.seed, advance)

        spec: Row = {"measure": "needle", "length": length, "trials": trials}
        yield Measurement(f"needles at {length}", spec, 2 * trials * (length - 1), run)


def _with_skipped(rows: list[Row], skipped: list[int]) -> list[Row]:
    return [row | {"skipped_lengths": skipped} if row["kind"] == "summary" else row for row in rows]
