"""`evaluate`: losses and needles by context length on prepared data, a fixed choice from the measures of the suites.

Losses are those of `atma.eval.likelihood.prefixes`, needles those of `atma.eval.retrieval.induction`. What can never be
measured is told before anything is, and before anything is trained.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import cast

from atma.config import EvaluationConfig, Recipe
from atma.data.dataset import TokenSet
from atma.eval.language_model import LanguageModel, OwnModel, Row, by_length
from atma.eval.likelihood import prefixes
from atma.eval.loaded import Loaded, check_tokenizer
from atma.eval.provenance import provenance
from atma.eval.retrieval import induction
from atma.eval.retrieval.haystacks import split_text
from atma.eval.rope import Stretch, Stretched
from atma.eval.stream import DEFAULT, Advance, Streaming
from atma.eval.suite import Measurement, Progress, Untrained, run_measurements, told_selection
from atma.tokenizer import Tokenizer


def evaluate(
    loaded: Loaded,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    results: Path | str | None = None,
    joined: bool = True,
    streaming: Streaming = DEFAULT,
    stretch: Stretch | None = None,
) -> list[Row]:
    """Nested prefixes, loss by position, fixed targets, junk stream and needles, in this order, as rows of JSON data.

    The validation `token_set` must be of the model's tokenizer. `joined` lets consecutive documents make up for too
    few long ones (rows count them). With `results`, a .jsonl file, rows are kept as they come, those of the same
    measurement and provenance are taken from it, and rows of others stay in it. Lengths that the split has too little
    text for are left out of the loss measures and listed as `skipped_lengths` in the summaries; needles have them all.
    `stretch` is how a rope model's positions go on beyond its trained length.
    """
    model = OwnModel(loaded, streaming) if stretch is None else Stretched(loaded, stretch, streaming)
    provenance(loaded, token_set, evaluation.seed, streaming)  # data of another tokenizer are told first
    return evaluate_model(model, token_set, evaluation, progress, results, joined)


def evaluate_model(
    model: LanguageModel,
    token_set: TokenSet,
    evaluation: EvaluationConfig,
    progress: Progress | None = None,
    results: Path | str | None = None,
    joined: bool = True,
) -> list[Row]:
    """`evaluate` of any language model, also of transformers. ValueError: the data are of another tokenizer."""
    check_tokenizer(token_set, model.tokenizer, None)
    stamp = model.provenance() | {"data_hash": token_set.hash, "seed": evaluation.seed}
    planned = [told_selection(model, one) for one in plan(model, token_set, evaluation, joined)]
    return run_measurements("lengths", planned, stamp, results, progress)


def plan(
    model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig, joined: bool = True
) -> Iterator[Measurement]:
    """The measurements, none of them made. ValueError, with the mend, for what cannot be."""
    eot, every, count = model.tokenizer.eot, list(evaluation.lengths), evaluation.documents
    lengths, targets = _fitting(token_set, every, joined), evaluation.target_tokens
    texts = prefixes.choose_documents(token_set, eot, lengths[-1], count, evaluation.seed, joined)
    prefixes.check_targets(lengths, targets)
    spec: Row = {"lengths": every, "documents": count, "joined": joined, "measure": "nested"}
    yield _curve("nested prefixes", spec, model, texts, lengths)
    fixed = partial(prefixes.fixed_targets, model, texts, lengths, targets)
    spec = spec | {"measure": "fixed", "targets": targets}
    yield _losses("fixed targets", spec, len(texts.tokens) * sum(lengths), fixed)
    if evaluation.junk:
        lengths = _fitting(token_set, every, True)
        stream = prefixes.junk_stream(token_set, eot, lengths[-1], count)
        spec = {"measure": "junk", "lengths": every, "documents": count}
        yield _curve("junk stream", spec, model, stream, lengths)
    yield from _needles(model, token_set, evaluation)


def check_recipe(recipe: Recipe, evaluates: bool = False) -> list[str]:
    """What the evaluation of a recipe lacks, in lines, if it says something of one or is to be evaluated.

    ValueError, with the mend, where it cannot work.
    """
    evaluation = recipe.evaluation
    if not evaluates and evaluation == EvaluationConfig():
        return []
    data = TokenSet.open(recipe.data.path, "validation")
    if data.tokenizer is None:
        raise ValueError("[evaluation] needs a tokenizer, and the data has none; make the data with `atma prepare`")
    try:
        list(plan(cast(LanguageModel, Untrained(data.tokenizer)), data, evaluation))
    except ValueError as error:
        raise ValueError(f"[evaluation] cannot work: {error}") from None
    room = prefixes.text_tokens(data)
    short = [f"{length:,}" for length in evaluation.lengths if length > room]
    return [f"[evaluation]: too little text ({room:,} tokens) for losses at {', '.join(short)} tokens"] if short else []


def check_without_data(evaluation: EvaluationConfig, tokenizer: Tokenizer | None) -> None:
    """What can be said before there are data. ValueError, with the mend, where the evaluation cannot work."""
    try:
        prefixes.check_targets(evaluation.lengths, evaluation.target_tokens)
        if tokenizer is not None:
            _check_room(tokenizer, evaluation)
    except ValueError as error:
        raise ValueError(f"[evaluation] cannot work: {error}") from None


def _curve(name: str, spec: Row, model: LanguageModel, texts: prefixes.Documents, lengths: list[int]) -> Measurement:
    tokens = len(texts.tokens) * (sum(lengths) if by_length(model) else lengths[-1])
    return _losses(name, spec, tokens, partial(prefixes.length_curve, model, texts, lengths, spec["measure"]))


def _losses(name: str, spec: Row, tokens: int, make: Callable[[Advance], list[Row]]) -> Measurement:
    """A measurement whose summaries tell which lengths have too little text."""

    def run(advance: Advance) -> list[Row]:
        rows = make(advance)
        skipped = [length for length in spec["lengths"] if length not in rows[-1]["lengths"]]
        return [*rows[:-1], rows[-1] | {"skipped_lengths": skipped}]

    return Measurement(name, spec, tokens, run)


def _fitting(token_set: TokenSet, lengths: list[int], joined: bool) -> list[int]:
    """The lengths that the split has text for, one at least."""
    available = prefixes.text_tokens(token_set, joined)
    if available < lengths[0]:
        what = "validation split" if joined else "longest validation document"
        raise ValueError(
            f"the {what} has {available} tokens, less than the first length {lengths[0]}; "
            "choose shorter lengths or prepare more text"
        )
    return [length for length in lengths if length <= available]


def _needles(model: LanguageModel, token_set: TokenSet, evaluation: EvaluationConfig) -> Iterator[Measurement]:
    _check_room(model.tokenizer, evaluation)
    if evaluation.needle_trials == 0:
        return
    text = split_text(token_set, model.tokenizer.eot)
    for length in evaluation.lengths:
        trials = evaluation.trials(length)
        run = partial(induction.needle, model, text, [length], trials, evaluation.seed)
        spec: Row = {"measure": "needle", "length": length, "trials": trials}
        yield Measurement(f"needles at {length}", spec, 2 * trials * (length - 1), run)


def _check_room(tokenizer: Tokenizer, evaluation: EvaluationConfig) -> None:
    """ValueError, with the mend, if a length has no room for one of its needles, or the tokenizer for any."""
    drawn = induction.draw_trials(tokenizer, evaluation.needle_trials, 1, evaluation.seed)
    for length in evaluation.lengths:
        for trial in drawn[: evaluation.trials(length)]:
            induction.gap_length(trial, length)
